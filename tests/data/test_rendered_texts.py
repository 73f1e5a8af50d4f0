"""What templates write beside the messages, and what they leave out of them."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Any

import pytest
from chat_templates import DATED
from transformers.utils import chat_template_utils

from jetson_ft.data.chat_template import encode, encode_prompt
from jetson_ft.data.formats import ChatMessage
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.models.loading import load_tokenizer

FIRST = [ChatMessage(role="user", content="q"), ChatMessage(role="assistant", content="a")]


@pytest.fixture
def chat(tiny_llama: Path) -> Any:
    return load_tokenizer(BaseModelFiles("tiny", tiny_llama))


# The date


class Later(datetime.datetime):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Later:
        return cls(2031, 2, 3, tzinfo=tz)


def test_template_with_the_date_writes_the_same_one_every_day(
    chat: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat.chat_template = DATED
    ids, prompt = encode(chat, FIRST).ids, encode_prompt(chat, FIRST[:1])
    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    assert "2031" in chat.apply_chat_template(FIRST, tokenize=False)
    assert encode(chat, FIRST).ids == ids
    assert encode_prompt(chat, FIRST[:1]) == prompt == ids[: len(prompt)]
    dates = "26 Jul 2024; 26 July 24, 00:00; 2024-07-26\n"
    assert chat.decode(ids).startswith(dates + "<|im_start|>user")


@pytest.mark.parametrize("start", ["", " ", "\n", "\n\n", "  {% if true %}", "{%- if true %}\n"])
def test_template_with_the_date_is_rendered_as_it_is_otherwise(chat: Any, start: str) -> None:
    end = "{% endif %}" if "{%" in start else ""
    chat.chat_template = start + end + DATED.lstrip()
    whole = chat.apply_chat_template(FIRST, tokenize=False)
    rendered = chat.decode(encode(chat, FIRST).ids)
    assert re.split(r"\d", rendered)[0] == re.split(r"\d", whole)[0]
    assert rendered.partition("<|im_start|>")[2] == whole.partition("<|im_start|>")[2]


def test_named_templates_are_rendered_with_the_fixed_date(chat: Any) -> None:
    chat.chat_template = {"default": DATED}
    assert chat.decode(encode_prompt(chat, FIRST[:1])).startswith("26 Jul 2024; ")
