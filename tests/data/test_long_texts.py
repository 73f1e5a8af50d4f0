"""Texts that are tokenized in pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jetson_ft.data import long_texts
from jetson_ft.data.long_texts import token_ids


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "versions" / "1" / "model")


@settings(max_examples=60, deadline=None)
@given(text=st.text("ab汉 \n", max_size=60), size=st.integers(1, 20))
def test_pieces_have_the_ids_of_the_whole(tokenizer: Any, text: str, size: int) -> None:
    whole = token_ids(tokenizer, text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_texts, "_PIECE_CHARACTERS", size)
        pieces = list(long_texts._pieces(text))
        assert "".join(pieces) == text
        assert all(len(piece) <= size for piece in pieces)
        assert token_ids(tokenizer, text) == whole


def test_cuts_are_behind_line_breaks_and_before_blanks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "_PIECE_CHARACTERS", 8)
    assert list(long_texts._pieces("abc\ndef ghi jklmnopqrst")) == [
        "abc\n", "def ghi", " jklmnop", "qrst",
    ]  # fmt: skip
