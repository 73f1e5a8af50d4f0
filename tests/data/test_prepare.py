"""Prepared rows: split, tokenized, and identified by content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from row_files import as_jsonl, write

from jetson_ft.data import store
from jetson_ft.data.prepare import PreparedRows, prepare_rows
from jetson_ft.data.templates import TEMPLATES
from jetson_ft.errors import Message, UserError
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.models.loading import load_tokenizer
from jetson_ft.recipe import DataRecipe
from jetson_ft.runs.inspection import inspect_data


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    return load_tokenizer(BaseModelFiles("tiny", tiny_llama))


def rows_file(folder: Path, name: str) -> str:
    answers = ["a", "b", "c", "d"]
    questions = ["q", "q", "q" * 200, "q"]  # the third has no answer within 100 tokens
    rows = [{"question": q, "answer": a} for q, a in zip(questions, answers, strict=True)]
    return str(write(folder, name, as_jsonl(rows)))


def test_heldout_messages_are_those_of_the_heldout_tokens(tmp_path: Path, tokenizer: Any) -> None:
    data = DataRecipe(train=rows_file(tmp_path, "a.jsonl"), heldout=2, max_length=100)
    rows = prepare_rows(data, tokenizer)
    assert rows.train["row"][:] == [1, 2]
    assert rows.heldout["row"][:] == rows.heldout_messages["row"][:] == [4]
    assert rows.heldout_characters == 1
    assert rows.report["heldout"]["dropped"] == {"no answer within max_length": 1}


def notices_of(rows: PreparedRows, part: str) -> list[str]:
    return [str(Message.from_json(notice)) for notice in rows.report[part]["notices"]]


def test_heldout_rows_without_an_answer_within_max_length_have_a_notice(
    tmp_path: Path, tokenizer: Any
) -> None:
    data = DataRecipe(train=rows_file(tmp_path, "a.jsonl"), heldout=2, max_length=100)
    rows = prepare_rows(data, tokenizer)
    assert notices_of(rows, "train") == []
    assert notices_of(rows, "heldout") == [
        "1 of 2 held-out rows are not used: no answer within max_length."
    ]


def test_heldout_rows_refused_by_the_template_have_one_notice_that_names_them(
    tmp_path: Path, tiny_llama: Path
) -> None:
    template = tmp_path / "refusing.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('never') }}{% endif %}"
        "{{ m.role + '> ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant> ' }}{% endif %}"
    )
    rows = [{"question": q, "answer": "a"} for q in ("q", "p", "no", "o")]
    train = str(write(tmp_path, "rows.jsonl", as_jsonl(rows)))
    data = DataRecipe(train=train, heldout=2, on_invalid="skip", chat_template=str(template))
    tokenizer = load_tokenizer(BaseModelFiles("tiny", tiny_llama), str(template))
    prepared = prepare_rows(data, tokenizer)
    assert notices_of(prepared, "train") == []
    (notice,) = notices_of(prepared, "heldout")
    assert notice.startswith("Held-out rows: refused: 1 (row 3): ") and "never" in notice


def test_sha256_is_the_same_for_equal_content_and_settings(tmp_path: Path, tokenizer: Any) -> None:
    one, two = (rows_file(tmp_path, name) for name in ("a.jsonl", "b.jsonl"))
    recipes = [
        DataRecipe(train=one, heldout=1),
        DataRecipe(train=two, heldout=1),
        DataRecipe(train=two, heldout=2),
    ]
    sums = [prepare_rows(data, tokenizer).report["sha256"] for data in recipes]
    assert sums[0] == sums[1] != sums[2]


def test_new_version_of_the_row_cache_tokenizes_again(
    tmp_path: Path, tokenizer: Any, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataRecipe(train=rows_file(tmp_path, "a.jsonl"), heldout=2, max_length=100)

    def from_cache() -> list[bool]:
        rows = prepare_rows(data, tokenizer).report
        inspection = inspect_data(DataRecipe(train=data.train), str(tiny_llama))
        return [part["from_cache"] for part in (rows["train"], rows["heldout"], inspection.tokens)]

    assert from_cache() == [False] * 3
    assert from_cache() == [True] * 3
    monkeypatch.setattr(store, "_VERSION", 0)
    assert from_cache() == [False] * 3


@pytest.mark.parametrize("name", ["chatml", "file"])
def test_chat_template_of_the_recipe_is_used_and_part_of_the_sha256(
    tmp_path: Path, tiny_phi: Path, name: str
) -> None:
    if name == "file":
        name = str(tmp_path / "mine.jinja")
        Path(name).write_text(TEMPLATES["chatml"], encoding="utf-8-sig")
    base = BaseModelFiles("tiny", tiny_phi)
    data = DataRecipe(train=rows_file(tmp_path, "a.jsonl"), heldout=2, chat_template=name)
    own = prepare_rows(data, load_tokenizer(base))
    rows = prepare_rows(data, load_tokenizer(base, name))
    text = rows.tokenizer.decode(rows.train[0]["input_ids"])
    assert text.startswith("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na")
    assert rows.report["sha256"] != own.report["sha256"]
    assert rows.report["train"]["from_cache"] is False


def test_rows_that_the_template_refuses_are_left_out_of_both_sets(
    tmp_path: Path, tokenizer: Any
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['content'] == 'no' %}{{ raise_exception('x') }}{% endif %}"
        "{{ m['content'] + eos_token }}{% endfor %}"
    )
    questions = ("a", "no", "b", "no", "c")
    rows = [{"question": q, "answer": str(n)} for n, q in enumerate(questions)]
    path = str(write(tmp_path, "a.jsonl", as_jsonl(rows)))
    data = DataRecipe(train=path, heldout=2, on_invalid="skip")
    prepared = prepare_rows(data, tokenizer)
    assert prepared.train["row"][:] == [1, 3] and prepared.heldout["row"][:] == [5]
    with pytest.raises(UserError, match="row 2") as caught:
        prepare_rows(data.model_copy(update={"on_invalid": "error"}), tokenizer)
    assert str(caught.value.where) == path
