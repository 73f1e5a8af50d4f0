"""Conversations with a base model or with a run's adapter.

Here: `target` (what a name means, and its model as a `ChatSession`), `session` (the conversation),
`memory_guard` (whether a chat fits into memory while a run trains), `server` and `client` (the
same in a process of its own, for the page). Not here: how text is generated
(`jetson_ft.inference`), and the terminal and the page that show a chat.
Start reading at `target.resolve_target`.
"""
