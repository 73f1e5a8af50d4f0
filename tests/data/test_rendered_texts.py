"""What templates write beside the messages, and what they leave out of them."""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from typing import Any

import pytest
from chat_templates import DATED, GEMMA_3, LLAMA_2, LLAMA_3, PHI_3, QWEN_3_THINKING, R1
from datasets import Dataset
from transformers.utils import chat_template_utils

from jetson_ft.data.chat_template import encode, encode_prompt
from jetson_ft.data.formats import ChatMessage
from jetson_ft.data.templates import TEMPLATES
from jetson_ft.data.tokenize import tokenize_rows
from jetson_ft.errors import UserError
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


# What is left out

# The second of several questions is not rendered.
FORGETFUL = (
    "{% for m in messages %}{% if loop.index0 != 2 or m['role'] != 'user' %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Writes an answer's thought in its own way, and none into a prompt.
OWN_THOUGHTS = QWEN_3_THINKING.replace("not enable_thinking", "false").replace(
    "(loop.last or thought)", "thought"
)
CALL = json.dumps([{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}])


def two_turns(question: str) -> list[ChatMessage]:
    last = ChatMessage(role="assistant", content="a longer answer with q in it")
    return [*FIRST, ChatMessage(role="user", content=question), last]


def calling(text: str) -> list[ChatMessage]:
    return [FIRST[0], ChatMessage(role="assistant", content=text, tool_calls=CALL)]


@pytest.mark.parametrize("question", ["another", "q", " <|im_end|> "])
def test_template_that_leaves_out_a_user_message_is_refused(chat: Any, question: str) -> None:
    chat.chat_template = FORGETFUL
    encode(chat, FIRST)
    with pytest.raises(UserError, match="leaves out a user message") as caught:
        encode(chat, two_turns(question))
    assert "data.chat_template" in str(caught.value.fix)


@pytest.mark.parametrize("template", [GEMMA_3, LLAMA_2, PHI_3, QWEN_3_THINKING, R1, LLAMA_3])
@pytest.mark.parametrize("question", [" a\n", "q", "<|im_end|>", "</think> <think>"])
def test_texts_that_a_template_trims_or_breaks_are_not_left_out(
    chat: Any, template: str, question: str
) -> None:
    chat.chat_template, chat.bos_token = template, "<|endoftext|>"
    encoded = encode(chat, two_turns(question))
    assert question.strip() in chat.decode(encoded.ids)


@pytest.mark.parametrize("text", ["Let me look.", "<think>t</think>Let me look.", "<|im_end|>"])
def test_template_that_leaves_out_the_text_beside_a_call_is_refused(chat: Any, text: str) -> None:
    chat.chat_template = LLAMA_3
    with pytest.raises(UserError, match="leaves out text beside a tool call"):
        encode(chat, calling(text))
    untrained = calling(text)
    untrained[1]["train"] = False
    result = ChatMessage(role="tool", content='"1"')  # the template quotes it
    assert encode(chat, [*untrained, result, FIRST[1]]).ids


@pytest.mark.parametrize("template", [TEMPLATES["chatml"], OWN_THOUGHTS])
@pytest.mark.parametrize("text", ["", " Look: ", "<think>t</think>Look:", "<|im_end|>"])
def test_text_beside_a_call_with_its_tags_moved_is_not_left_out(
    chat: Any, template: str, text: str
) -> None:
    chat.chat_template = template
    encoded = encode(chat, calling(text))
    assert text.strip().rpartition(">")[2] in chat.decode(encoded.ids)


def test_row_with_a_message_that_is_left_out_can_be_skipped(chat: Any) -> None:
    chat.chat_template = FORGETFUL
    rows = [{"row": number, "messages": m} for number, m in enumerate((FIRST, two_turns("b")), 1)]
    kept, report = tokenize_rows(Dataset.from_list(rows), "sum", chat, 1000, on_invalid="skip")
    assert (kept["row"][:], report.dropped) == ([1], {"refused by the chat template": 1})
    assert "leaves out a user message" in str(report.notices)
