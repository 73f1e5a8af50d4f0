"""A conversation: its prompt, its replies with and without adapter, few-shot examples."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jetson_ft.chat.session import ChatSession, parse_examples, read_examples
from jetson_ft.data.chat_template import encode_prompt, end_ids
from jetson_ft.errors import UserError
from jetson_ft.inference.generate import Sampling, stream_reply

SHORT = Sampling(max_new_tokens=8)


@pytest.fixture
def chat(phi: Any) -> ChatSession:
    return ChatSession(phi.model, phi.tokenizer, has_adapter=False, context_length=2048)


def reply_to(chat: ChatSession, text: str, **options: Any) -> str:
    return "".join(chat.reply(text, SHORT, **options))


def roles(messages: list[Any]) -> str:
    return "".join(message["role"][0] for message in messages)


def test_messages_are_system_examples_turns_and_question(chat: ChatSession) -> None:
    chat.system = "be brief"
    chat.examples = [{"role": "user", "content": "e"}, {"role": "assistant", "content": "f"}]
    chat.add_turn("q", " a \n")
    assert roles(chat.messages("now")) == "suauau"
    assert [m["content"] for m in chat.messages("now")] == ["be brief", "e", "f", "q", "a", "now"]


def test_cleared_turns_leave_system_message_and_examples(chat: ChatSession) -> None:
    chat.system, chat.examples = "s", [{"role": "user", "content": "e"}]
    chat.add_turn("q", "a")
    chat.turns.clear()
    assert roles(chat.messages("x")) == "suu"


def test_turns_and_system_message_change_the_reply(chat: ChatSession) -> None:
    plain = reply_to(chat, "你好")
    assert reply_to(chat, "你好") == plain, "a reply adds no turn"
    chat.add_turn("第1题", "等于3。")
    continued = reply_to(chat, "你好")
    chat.turns.clear()
    chat.system = "等于"
    assert len({plain, continued, reply_to(chat, "你好")}) == 3


def test_ask_returns_the_whole_reply_and_adds_the_turn(chat: ChatSession) -> None:
    reply = reply_to(chat, "你好").strip()
    assert chat.ask("你好", SHORT) == reply
    assert [turn["content"] for turn in chat.turns] == ["你好", reply]
    assert len(chat.ask("你好", SHORT)) and len(chat.turns) == 4


def test_conversation_longer_than_the_context_is_refused(chat: ChatSession) -> None:
    chat.context_length = 60
    with pytest.raises(UserError, match=r"has \d+ tokens, .* reads 60 at most") as caught:
        reply_to(chat, "长" * 30)
    assert "/reset" in str(caught.value.fix)


@pytest.mark.parametrize("left", [1, SHORT.max_new_tokens - 1, SHORT.max_new_tokens, 100])
def test_reply_ends_where_the_context_does(chat: ChatSession, left: int) -> None:
    length = len(encode_prompt(chat.tokenizer, chat.messages("你好")))
    chat.context_length = length + left
    expected = Sampling(max_new_tokens=min(left, SHORT.max_new_tokens))
    chat_without_limit = replace(chat, context_length=2048)
    assert reply_to(chat, "你好") == "".join(chat_without_limit.reply("你好", expected))
    chat.context_length = length
    with pytest.raises(UserError):
        reply_to(chat, "你好")


def test_half_a_surrogate_pair_is_replaced(chat: ChatSession) -> None:
    chat.system = "\udc80"
    chat.add_turn("\ud800", "b")
    assert reply_to(chat, "a\udfff")
    assert [m["content"] for m in chat.messages("a\udfff")] == ["?", "?", "b", "a?"]
    assert chat.turns[0]["content"] == "\ud800", "the session itself stays as it is"


def test_a_reply_that_was_begun_is_continued(chat: ChatSession) -> None:
    prompt = encode_prompt(chat.tokenizer, chat.messages("你好"))
    prefill_ids = chat.tokenizer("等于", add_special_tokens=False)["input_ids"]
    ends = end_ids(chat.tokenizer, chat.model)
    expected = "".join(stream_reply(chat.model, chat.tokenizer, prompt + prefill_ids, ends, SHORT))
    assert "".join(chat.reply("你好", SHORT, prefill="等于")) == expected != reply_to(chat, "你好")
    chat.context_length = len(prompt) + len(prefill_ids)
    with pytest.raises(UserError, match=f"has {chat.context_length} tokens"):
        next(chat.reply("你好", SHORT, prefill="等于"))


def test_the_whole_reply_is_returned_with_its_tokens(chat: ChatSession) -> None:
    stream, deltas = chat.reply("你好", SHORT), []
    while True:
        try:
            deltas.append(next(stream))
        except StopIteration as end:
            reply = end.value
            break
    assert reply.text == "".join(deltas).strip() and reply.tokens == 8 and not reply.ended


# --- examples ------------------------------------------------------------------------------

ROW = {"instruction": "问", "output": "答"}
CHAT_ROW = {
    "messages": [
        {"role": "system", "content": "s"}, {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
}  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([ROW, CHAT_ROW]),
        f"{json.dumps(ROW)}\n\n{json.dumps(CHAT_ROW)}\n",
        "\ufeff" + json.dumps([ROW, CHAT_ROW], ensure_ascii=False),
    ],
)
def test_examples_are_read_from_a_list_from_lines_and_with_a_bom(tmp_path: Path, text: str) -> None:
    path = tmp_path / "few.json"
    path.write_text(text, encoding="utf-8")
    messages = read_examples(path)
    assert [m["content"] for m in messages] == ["问", "答", "u", "a"]
    assert roles(messages) == "uaua", "system messages are left out"


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85"])
def test_only_a_newline_ends_a_row(end: str) -> None:
    row = json.dumps({"instruction": f"a{end}b", "output": "c"}, ensure_ascii=False)
    messages = parse_examples(f"{row}\r\n{row}\n", "here")
    assert [m["content"] for m in messages] == [f"a{end}b", "c"] * 2


@pytest.mark.parametrize(
    "content", [b'{"a": 1}', b"[1, 2]", b'["x"]', b"{", b"\xff\xfe\x00x", b"[null]", b"[" * 100_000,
                b'{"a":' * 100_000, b"1" * 5_000, b'{"instruction": "a", "output": "\xff"}']
)  # fmt: skip
def test_content_without_examples_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "few.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="The examples can't be read") as caught:
        read_examples(path)
    assert str(caught.value.where) == str(path)


@pytest.mark.parametrize("name", ["none.json", "a\x00b", "\ud800"])
def test_missing_examples_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="not found") as caught:
        read_examples(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
