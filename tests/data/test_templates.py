"""Templates that a recipe names: shipped ones and files."""

from __future__ import annotations

from pathlib import Path

import pytest

from jetson_ft.data.template_files import read_template
from jetson_ft.data.templates import TEMPLATES
from jetson_ft.errors import UserError
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.models.loading import load_tokenizer


def test_name_is_a_shipped_template_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.jinja").write_bytes("\ufeff问：{{ messages }}".encode())
    assert read_template(str(tmp_path / "a.jinja")) == "问：{{ messages }}"
    assert read_template("chatml") == TEMPLATES["chatml"]


@pytest.mark.parametrize(
    ("content", "what"),
    [(None, "not found"), (b" \n", "is empty"), ("中".encode("gb18030"), "not UTF-8")],
)
def test_unusable_file_is_refused(tmp_path: Path, content: bytes | None, what: str) -> None:
    file = tmp_path / "a.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=what) as caught:
        read_template(str(file))
    assert "chatml, plain" in str(caught.value.fix)


@pytest.mark.parametrize(
    "text",
    [
        "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}",
        "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{% endfor %}x",
        "{% if messages %}{{ raise_exception('only with tools') }}{% endif %}",
        "{{ messages[7]['content'] }}",
    ],
)
def test_template_with_tags_of_transformers_or_for_other_messages_is_read(
    tmp_path: Path, text: str
) -> None:
    file = tmp_path / "a.jinja"
    file.write_text(text)
    assert read_template(str(file)) == text


def test_template_that_is_not_jinja_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jinja"
    file.write_text("{% for m in messages %}\n{{ m }")
    with pytest.raises(UserError, match="not valid Jinja: line 2") as caught:
        read_template(str(file))
    assert str(caught.value.where) == str(file)


def test_shipped_template_starts_with_the_start_token_as_the_tokenizer_does(
    tmp_path: Path, tiny_llama: Path
) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(BaseModelFiles("tiny", tiny_llama))
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save_pretrained(tmp_path)
    template = load_tokenizer(BaseModelFiles("x", tmp_path), "chatml").chat_template
    assert template == "{{ bos_token }}" + TEMPLATES["chatml"]
