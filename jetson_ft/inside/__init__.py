"""What a model does inside, computed for people: tokens, attention, the next token, numbers.

Here: `model` (a loaded model, its base and its adapter), `tokens`, `attention`, `next_token`,
`in_context`, and `views` (each of them by name, for the process that holds a chat's model). A
result is a frozen dataclass with `to_json`. Not here: how a view is drawn.
Start reading at `views.compute_view`.
"""
