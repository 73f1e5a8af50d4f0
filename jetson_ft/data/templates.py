"""Chat templates that a recipe can name instead of the model's own, as Jinja text."""

from __future__ import annotations

import datetime
from functools import lru_cache

from jetson_ft.errors import _

CHOOSE_TEMPLATE = _(
    "Set `data.chat_template`: to `chatml`, which keeps every message, or to a file with a "
    "template of your own."
)

# What stands for today in every conversation: the date that Llama 3's templates fall back on.
_TODAY = datetime.datetime(2024, 7, 26)
_DATE_CODES = ("-d", "-m", *"AaBbdejmYyHIMSpFDT")

# By name. No turn changes when others follow it, so that every answer is trained on.
TEMPLATES = {
    # The control tokens of Qwen, SmolLM and others, with their form of tool calls.
    "chatml": """\
{%- if tools %}
  {{- '<|im_start|>system\\n' }}
  {%- if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\\n\\n' }}{% endif %}
  {{- 'These functions can be called:\\n<tools>\\n' }}
  {%- for tool in tools %}{{ (tool | tojson) + '\\n' }}{% endfor %}
  {{- '</tools>\\nTo call one, write its name and arguments as JSON:\\n<tool_call>\\n' }}
  {{- '{"name": ..., "arguments": {...}}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
  {%- if message['role'] == 'tool' %}
    {{- '<|im_start|>user\\n<tool_response>\\n' + message['content'] }}
    {{- '\\n</tool_response><|im_end|>\\n' }}
  {%- elif not (tools and loop.first and message['role'] == 'system') %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] }}
    {%- for call in message['tool_calls'] or [] %}
      {{- '\\n' if message['content'] or not loop.first else '' }}
      {{- '<tool_call>\\n' + (call['function'] | tojson) + '\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    # Text whose end token is supervised, so that the model learns to stop. GPT-2 style base models
    # have no chat format; they get this one.
    "plain": (
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'user' %}{{ 'Human:\\n' + message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'assistant' %}"
        "{{ 'Assistant:\\n' + message['content'] + eos_token + '\\n\\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
    ),
}


@lru_cache(maxsize=4)
def with_fixed_date(template: str) -> str:
    """Return a template that renders alike on every day.

    A macro takes the place of `strftime_now`, a function of transformers' for templates.
    """
    if "strftime_now" not in template:
        return template
    replaced = "".join(f" | replace('%{code}', '{_TODAY:%{code}}')" for code in _DATE_CODES)
    # Jinja removes the line break after the macro (`trim_blocks`).
    return f"{{% macro strftime_now(form) %}}{{{{ form{replaced} }}}}{{% endmacro %}}\n{template}"
