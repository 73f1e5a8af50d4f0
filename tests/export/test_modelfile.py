"""Ollama's Modelfile: a Go template that renders as the model's own chat template."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_tokenizer

from jetson_ft.data.templates import TEMPLATES
from jetson_ft.export.modelfile import chat_parts, write_modelfile

_DEFAULT_SYSTEM = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nBe helpful<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] + '\\n\\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + (first if loop.first else '') + m['content'] }}"
    "{{ '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim }}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
_PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
_THINKING = TEMPLATES["chatml"].replace(
    "'<|im_start|>assistant\\n' }}{% endif %}",
    "'<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}{% endif %}",
)
_NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}"
    "{{ '[' + m['role'] + ']' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
_KNOWN = {
    **TEMPLATES, "default system": _DEFAULT_SYSTEM, "gemma": _GEMMA, "llama 3": _LLAMA3,
    "phi": _PHI, "thinking": _THINKING, "no system": _NO_SYSTEM,
}  # fmt: skip


def go_render(template: str, messages: list[dict[str, str]]) -> str:
    """Render the part of Go's template language that Modelfiles use here: a small interpreter."""
    tokens = re.split(r"(\{\{.*?\}\})", template)
    system = next((m["content"] for m in messages if m["role"] == "system"), "")

    def run(position: int, scope: dict[str, Any], active: bool) -> tuple[str, int]:
        text = ""
        while position < len(tokens):
            token = tokens[position]
            action = token[2:-2].strip() if token.startswith("{{") else None
            if action is None:
                text += token if active else ""
            elif action in ("else", "end"):
                return text, position
            elif action == ".Content":
                text += scope["message"]["content"] if active else ""
            elif action == "$.System":
                text += system if active else ""
            elif action.startswith("if "):
                truth = _truth(action[3:], scope, system)
                part, position = run(position + 1, scope, active and truth)
                text += part
                if tokens[position][2:-2].strip() == "else":
                    part, position = run(position + 1, scope, active and not truth)
                    text += part
            elif action == "range $i, $_ := .Messages":
                start, end = position, position
                for index, message in enumerate(messages):
                    inner = {"message": message, "index": index}
                    part, end = run(start + 1, inner, active)
                    text += part
                position = end
            else:
                raise ValueError(action)
            position += 1
        return text, position

    return run(0, {}, True)[0]


def _truth(condition: str, scope: dict[str, Any], system: str) -> bool:
    if match := re.fullmatch(r'eq \.Role "(\w+)"', condition):
        return bool(scope["message"]["role"] == match[1])
    if condition == "not $.System":
        return not system
    if condition == "and $.System (eq $i 1)":
        return bool(system) and scope["index"] == 1
    raise ValueError(condition)


@pytest.mark.parametrize("name", _KNOWN)
def test_the_go_template_renders_as_the_chat_template(name: str) -> None:
    tokenizer = make_tokenizer(_KNOWN[name])
    parts = chat_parts(tokenizer)
    assert parts
    turns = [("user", "Hi there"), ("assistant", "你好"), ("user", "What?")]
    for roles in (turns[:1], turns, [("system", "Be kind"), *turns]):
        if name == "no system" and roles[0][0] == "system":
            continue
        messages = [{"role": role, "content": content} for role, content in roles]
        expected = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        assert go_render(parts.go_template(), messages) == expected


def test_the_start_token_is_left_to_the_file() -> None:
    tokenizer = make_tokenizer(_GEMMA)
    tokenizer.bos_token = "<|endoftext|>"
    parts = chat_parts(tokenizer)
    assert parts and "<|endoftext|>" not in parts.go_template()


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index ~ m['role'] + m['content'] + '.' }}{% endfor %}",
        # Go would take it for an action.
        "{% for m in messages %}{{ '{{' + m['role'] + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '{{assistant' }}{% endif %}",
        # Ends the text in a Modelfile.
        "{% for m in messages %}{{ '\"\"\"' + m['role'] + m['content'] + eos_token }}{% endfor %}"
        '{% if add_generation_prompt %}{{ \'"""assistant\' }}{% endif %}',
    ],
)
def test_another_template_is_left_out(template: str) -> None:
    assert chat_parts(make_tokenizer(template)) is None


def test_the_file_names_model_template_and_stop_words(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    out.mkdir()
    make_tokenizer(TEMPLATES["chatml"]).save_pretrained(model)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    write_modelfile(out, "run-f16.gguf", model)
    text = (out / "Modelfile").read_text()
    assert text.startswith('FROM ./run-f16.gguf\nTEMPLATE """')
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert 'PARAMETER stop "<|endoftext|>"' in text
    assert "PARAMETER temperature 0\n" in text


def test_a_template_that_cant_be_written_is_reported(tmp_path: Path) -> None:
    model = tmp_path / "model"
    make_tokenizer(
        "{% for m in messages %}{{ loop.index ~ m['content'] }}{% endfor %}"
    ).save_pretrained(model)
    write_modelfile(tmp_path, "m.gguf", model)
    text = (tmp_path / "Modelfile").read_text()
    assert "TEMPLATE" not in text
    assert "can't be written in Ollama's language" in text
