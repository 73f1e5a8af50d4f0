"""The page: a Gradio form and chat, live HTML of the runs, and access control around them.

It has no logic of its own: buttons call the functions of `runs` and `chat` that the commands call,
or run a command (`cli_json`), because the page's process loads no torch. HTML comes from
`templates/` (`render`), texts are translated by `render.Locale`. Start at `page.make_app`.
"""
