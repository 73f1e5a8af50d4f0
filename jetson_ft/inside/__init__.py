"""What a model does inside, computed for people: tokens, attention, the next token, numbers.

Here: `model` (a loaded model, its base and its adapter), `tokens`, `attention`, `next_token`,
`in_context`, `numbers` (sizes and memory), `quantization` (of one matrix), `adapter_change`, and
`views` (each of them by name, for the process that holds a chat's model). A result is a frozen
dataclass with `to_json`. `static/inside.js` draws it, with the words of `texts`; `page` puts both
into one HTML file. Start reading at `views.compute_view`.
"""
