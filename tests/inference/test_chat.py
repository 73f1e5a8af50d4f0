"""A conversation: what the model is shown, with and without its adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jetson_ft.errors import UserError
from jetson_ft.inference.chat import Chat, open_chat, read_examples
from jetson_ft.inference.generate import Sampling
from jetson_ft.models.load import Weights

SHORT = Sampling(max_new_tokens=8)


@pytest.fixture
def chat(writer: Any) -> Chat:
    return Chat(writer.model, writer.tokenizer, has_adapter=False, max_context=2048)


@pytest.fixture(scope="module")
def adapter_folder(tiny_phi: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes what the model says."""
    import torch

    from jetson_ft.models import adapter, load
    from jetson_ft.models.resolve import Base
    from jetson_ft.recipe import LoraRecipe

    base = Base(str(tiny_phi), tiny_phi)
    model = adapter.attach(load.load_model(base, Weights("fp32"), "cpu"), LoraRecipe(rank=2), 0)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value)
    folder = tmp_path_factory.mktemp("adapter")
    adapter.save(model, load.load_tokenizer(base), base, folder)
    return folder


def said(chat: Chat, text: str, **options: Any) -> str:
    return "".join(chat.reply(text, SHORT, **options))


def roles(messages: list[Any]) -> str:
    return "".join(message["role"][0] for message in messages)


def test_messages_come_in_order(chat: Chat) -> None:
    chat.system = "be brief"
    chat.examples = [{"role": "user", "content": "e"}, {"role": "assistant", "content": "f"}]
    chat.keep("q", " a \n")
    assert roles(chat.messages("now")) == "suauau"
    assert [m["content"] for m in chat.messages("now")] == ["be brief", "e", "f", "q", "a", "now"]


def test_reset_forgets_the_turns_alone(chat: Chat) -> None:
    chat.system, chat.examples = "s", [{"role": "user", "content": "e"}]
    chat.keep("q", "a")
    chat.reset()
    assert roles(chat.messages("x")) == "suu"


def test_what_came_before_changes_the_reply(chat: Chat) -> None:
    plain = said(chat, "你好")
    assert said(chat, "你好") == plain, "a reply keeps nothing by itself"
    chat.keep("第1题", "等于3。")
    after = said(chat, "你好")
    chat.reset()
    chat.system = "等于"
    assert len({plain, after, said(chat, "你好")}) == 3


def test_a_conversation_that_outgrew_the_model_is_said_so(chat: Chat) -> None:
    chat.max_context = 60
    with pytest.raises(UserError, match=r"has \d+ tokens; .* the model's 60") as caught:
        said(chat, "长" * 30)
    assert "/reset" in caught.value.fix


def test_the_context_is_filled_to_the_last_token(chat: Chat) -> None:
    from jetson_ft.data.template import encode_prompt

    length = len(encode_prompt(chat.tokenizer, chat.messages("你好")))
    chat.max_context = length + SHORT.max_new_tokens
    assert said(chat, "你好")
    chat.max_context -= 1
    with pytest.raises(UserError):
        said(chat, "你好")


def test_base_and_adapter_speak_through_one_model(
    tiny_phi: Path, adapter_folder: Path, chat: Chat
) -> None:
    opened = open_chat(str(tiny_phi), Weights("fp32"), "cpu", adapter_folder)
    assert opened.has_adapter and opened.max_context == 2048
    assert said(opened, "你好", use_adapter=False) == said(chat, "你好")
    assert said(opened, "你好") != said(chat, "你好")
    assert said(opened, "你好", use_adapter=False) == said(chat, "你好")


def test_a_base_alone_has_no_adapter(tiny_phi: Path) -> None:
    assert not open_chat(str(tiny_phi), Weights("fp32"), "cpu", None).has_adapter


def test_a_folder_without_adapter_is_refused(tiny_phi: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No adapter lies there"):
        open_chat(str(tiny_phi), Weights("fp32"), "cpu", tmp_path)


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
def test_examples_as_list_lines_or_with_a_bom(tmp_path: Path, text: str) -> None:
    path = tmp_path / "few.json"
    path.write_text(text, encoding="utf-8")
    messages = read_examples(path)
    assert [m["content"] for m in messages] == ["问", "答", "u", "a"]
    assert roles(messages) == "uaua", "a system message stays the conversation's own"


@pytest.mark.parametrize(
    "content", [b'{"a": 1}', b"[1, 2]", b'["x"]', b"{", b"\xff\xfe\x00x", b"[null]"]
)
def test_what_is_no_example_is_refused_plainly(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "few.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="These are no examples") as caught:
        read_examples(path)
    assert caught.value.where == str(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_examples(tmp_path / "none.json")
    assert str(tmp_path / "none.json") in str(caught.value)
