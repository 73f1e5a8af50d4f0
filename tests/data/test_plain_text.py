"""Plain text: which rows are text, and their tokens without a chat template."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from row_files import as_json, as_jsonl, quick, write

from jetson_ft.data import lengths, store
from jetson_ft.data.chat_template import ANSWER, CONTEXT, END, encode, prompt_and_reference
from jetson_ft.data.formats import TEXT, ChatMessage, RowError
from jetson_ft.data.layouts import detect_layout, to_conversation
from jetson_ft.data.prepare import prepare_rows
from jetson_ft.data.readers import read_rows
from jetson_ft.data.sources import resolve_source
from jetson_ft.data.tokenize import tokenize_rows
from jetson_ft.errors import UserError
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.models.loading import load_tokenizer
from jetson_ft.recipe import DataRecipe

EOS = 2  # <|im_end|>


@pytest.fixture(scope="module")
def chat(tiny_llama: Path) -> Any:
    return load_tokenizer(BaseModelFiles("tiny", tiny_llama))


def document(text: str) -> list[ChatMessage]:
    return [ChatMessage(role=TEXT, content=text)]


def texts(rows: Any) -> list[str]:
    return [messages[0]["content"] for messages in rows["messages"]]


# Rows and files


@pytest.mark.parametrize(
    "value",
    [{"text": "a"}, {"text": "a", "title": "t", "meta": {"x": 1}}, {"Text": "a", "label": None}],
)
def test_row_with_only_text_is_plain_text(value: dict[str, Any]) -> None:
    assert detect_layout(value) == "text"
    assert to_conversation(value, "text").messages == document("a")


@pytest.mark.parametrize(
    "value",
    [
        {"text": "a", "label": 1}, {"text": "a", "answer": "b"}, {"text": ["a"]}, {"text": None},
        {"title": "t", "content": "a"},
    ],
)  # fmt: skip
def test_row_that_could_mean_something_else_is_not_detected_as_text(value: dict[str, Any]) -> None:
    assert detect_layout(value) is None


def test_column_of_the_text_can_be_chosen() -> None:
    row = {"title": "t", "content": "a", "question": "q", "answer": "b"}
    assert detect_layout(row) == "alpaca"
    assert detect_layout(row, {"text": "content"}) == "text"
    conversation = to_conversation(row, "text", {"text": "content"})
    assert conversation.messages == document("a")
    assert conversation.unread == ["answer", "question", "title"]
    assert to_conversation(row, "text").messages == document("a")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (" \n\u200b", "no text"), ("a\ufffd", "damaged text"), (None, "`text` is null"),
        ("<|im_start|>user\nq<|im_end|>", r"a conversation written out .* with `<\|im_start\|>`"),
        ("<s> [INST] q [/INST] a</s>", r"a conversation written out .* with `\[INST\]`"),
        ("<|begin_of_text|><|start_header_id|>user", r".*with `<\|start_header_id\|>`"),
    ],
)  # fmt: skip
def test_unusable_text_has_a_reason(text: Any, reason: str) -> None:
    with pytest.raises(RowError, match=f"^{reason}"):
        to_conversation({"text": text}, "text")


def test_conversations_written_out_are_refused_with_a_fix(tmp_path: Path) -> None:
    rows = [{"text": f"<|im_start|>user\nq{n}<|im_end|>"} for n in range(3)]
    source = resolve_source(str(write(tmp_path, "a.jsonl", as_jsonl(rows))))
    with pytest.raises(UserError, match=r"3 of 3 rows can't be used") as caught:
        store.read_source(source)
    assert str(caught.value.fix).startswith("Give the conversations as `messages`, a list of {role")


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.txt", "一。\n\n二。\n", ["一。\n\n二。\n"]),
        ("a.txt", "[第一章] 一, 二\n", ["[第一章] 一, 二\n"]),
        ("a.txt", "{一}", ["{一}"]),
        ("a.txt", '{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),
        ("a.txt", '["a", "b"]', ["a", "b"]),
        ("a.jsonl", '"a"\n"b"\n', ["a", "b"]),
        ("a.json", '["a", "b"]', ["a", "b"]),
        ("a.csv", "text\na\nb\n", ["a", "b"]),
    ],
)
def test_files_of_text_are_read(tmp_path: Path, name: str, content: str, rows: list[str]) -> None:
    read, report = store.read_source(resolve_source(str(write(tmp_path, name, content))))
    assert (texts(read), report.layout) == (rows, "text")


def test_text_file_is_one_row_in_any_encoding(tmp_path: Path) -> None:
    for encoding in ("utf-8-sig", "utf-16", "gb18030"):
        content = "他说：“这是中国的大学。”什么是的一是不了在人有我？\r\n" * 20
        info, rows = read_rows(write(tmp_path, "a.txt", content.encode(encoding)))
        assert info.container == "txt"
        assert [row.value for row in rows] == [{"text": content}]


def test_text_among_conversations_is_unusable(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": "a"}, {"question": "q", "answer": "b"}, {"text": "c"}]
    source = resolve_source(str(write(tmp_path, "a.json", as_json(rows))))
    with pytest.raises(UserError, match="layout `text` among rows of layout `alpaca`: 1"):
        store.read_source(source)


# Tokens


def test_every_token_of_a_document_is_trained_on_and_the_end_token_follows(chat: Any) -> None:
    encoded = encode(chat, document("江a"))
    assert encoded.ids == [*chat("江a", add_special_tokens=False)["input_ids"], EOS]
    assert encoded.segments == [ANSWER] * 4 + [END]
    assert encoded.characters == 2


def test_start_token_of_the_tokenizer_comes_first_and_is_not_trained_on(tiny_llama: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(BaseModelFiles("tiny", tiny_llama))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    encoded = encode(tokenizer, document("a"))
    assert encoded.ids[0] == 0 and encoded.ids[-1] == EOS and len(encoded.ids) == 3
    assert encoded.segments == [CONTEXT, ANSWER, END]


def test_control_tokens_in_a_document_are_encoded_as_text(chat: Any) -> None:
    text = "如何写 <|im_start|>user\n?<|im_end|>"
    encoded = encode(chat, document(text))
    assert encoded.ids.count(EOS) == 1 and encoded.ids[-1] == EOS
    assert chat.decode(encoded.ids[:-1]) == text
    assert encoded.control_texts == 2


@quick
@given(
    contents=st.lists(st.text(min_size=1, max_size=80), min_size=1, max_size=4),
    max_length=st.integers(16, 40),
)
def test_documents_are_split_without_loss(chat: Any, contents: list[str], max_length: int) -> None:
    rows = Dataset.from_list(
        [{"row": n, "messages": document(text)} for n, text in enumerate(contents, 1)]
    )
    encoded, report = tokenize_rows(rows, str([contents, max_length]), chat, max_length, "drop")
    for number, text in enumerate(contents, 1):
        pieces = [row for row in encoded if row["row"] == number]
        ids = [token for row in pieces for token in row["input_ids"]]
        assert ids == encode(chat, document(text)).ids
        assert len(pieces) == math.ceil(len(ids) / max_length)
        assert all(1 < row["length"] <= max_length for row in pieces)
        assert sum(row["answer_characters"] for row in pieces) == len(text)
        assert sum(row["supervised"] for row in pieces) == len(ids) - len(pieces)
    assert report.rows == len(encoded) and report.truncated == 0 and not report.dropped
    assert report.split == len({row["row"] for row in encoded if row["pieces_left"]})


def test_pieces_come_from_the_cache_unless_the_file_is_cut(chat: Any) -> None:
    rows = Dataset.from_list([{"row": 1, "messages": document("a" * 100)}])
    first, report = tokenize_rows(rows, "text", chat, 16)
    assert (report.rows, report.split, report.from_cache) == (7, 1, False)
    again, report = tokenize_rows(rows, "text", chat, 16)
    assert report.from_cache and again[:] == first[:]
    path = Path(first.cache_files[0]["filename"])
    first.select(range(6)).map(lambda row: row, cache_file_name=str(path) + "x")
    Path(str(path) + "x").replace(path)
    again, report = tokenize_rows(rows, "text", chat, 16)
    assert not report.from_cache and again[:] == first[:]


def test_prepared_documents_count_in_the_report_and_by_source(tmp_path: Path, chat: Any) -> None:
    long = write(tmp_path, "long.txt", "江面很宽。\n" * 20)
    short = write(tmp_path, "short.jsonl", as_jsonl([{"text": f"短{n}"} for n in range(10)]))
    data = DataRecipe(train=[str(long), str(short)], heldout=2, max_length=64)
    rows = prepare_rows(data, chat)
    assert rows.report["train"]["split"] == 1
    one, two = rows.report["read"]["sources"]
    assert (one["rows"], two["rows"], two["heldout_rows"]) == (1, 8, 2)
    assert one["tokens"] == 20 * 16 + 1 and two["tokens"] == 8 * 5
    assert one["tokens"] + two["tokens"] == rows.report["train"]["tokens"]
    assert rows.heldout_characters == 4
    table = rows.source_table()
    assert [part["rows_read"] for part in table] == [1, 10]


def test_sha256_covers_all_sources_and_shares(tmp_path: Path, chat: Any) -> None:
    names = []
    for name in ("a.jsonl", "b.jsonl"):
        rows = [{"text": f"{name}{n}"} for n in range(10)]
        names.append(str(write(tmp_path, name, as_jsonl(rows))))
    trains: list[Any] = [
        names[0], names, names[::-1], [names[0], {"source": names[1], "share": 0.5}],
        [names[0], {"source": names[1], "rows": 5}],
    ]  # fmt: skip

    def sums() -> list[str]:
        recipes = [DataRecipe.model_validate({"train": train}) for train in trains]
        return [prepare_rows(data, chat).report["sha256"] for data in recipes]

    before = sums()
    assert len(set(before)) == 5 and sums() == before
    write(tmp_path, "b.jsonl", as_jsonl([{"text": f"new{n}"} for n in range(10)]))
    after = sums()
    assert after[0] == before[0] and not set(after[1:]) & set(before)


def test_prompt_is_the_beginning_of_a_document_and_the_reference_what_follows(chat: Any) -> None:
    ids, reference = prompt_and_reference(chat, document("abcdefg"), max_tokens=100)
    assert (chat.decode(ids), reference) == ("abcd", "efg")
    ids, reference = prompt_and_reference(chat, document("abcdefghij"), max_tokens=3)
    assert (chat.decode(ids), reference) == ("abc", "def")


def test_lengths_of_documents_are_estimated_in_pieces() -> None:
    estimated = lengths.estimate_lengths([document("江" * 1000)], 151_936, 256)
    assert estimated.longest <= 256 and estimated.rows == 3
    assert estimated.tokens == pytest.approx(751, rel=0.01)
    assert estimated.supervised == 1
