"""Histograms keep what planning takes from rows, and the built-in ones are still true."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jetson_ft.data import lengths, read, store, tokens
from jetson_ft.data.lengths import KNOWN
from jetson_ft.models import embedded, load
from jetson_ft.models.resolve import Base

ROWS = st.lists(
    st.integers(2, 2000).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), min_size=1
)


@given(ROWS, st.integers(16, 2500))
def test_few_rows_are_kept_exactly(rows: list[tuple[int, int]], limit: int) -> None:
    rows = rows[:40]  # one a group
    sizes, learnt = np.array(rows).T
    found = lengths.from_counts(sizes, learnt).cut(limit)
    cut = np.minimum(sizes, limit)
    assert found.tokens == pytest.approx(cut.sum())
    assert found.longest == cut.max()
    assert found.row_of_a_token == pytest.approx((cut**2).sum() / cut.sum())
    assert found.supervised * found.tokens == pytest.approx(
        np.maximum(0, learnt - (sizes - cut)).sum()
    )


@given(ROWS)
def test_many_rows_keep_their_mean(rows: list[tuple[int, int]]) -> None:
    sizes, learnt = np.array(rows * 41).T
    found = lengths.from_counts(sizes, learnt)
    assert found.tokens == pytest.approx(sizes.sum(), rel=0.03)
    assert 0 < found.supervised <= 1


def test_alpaca_under_phi_is_as_it_was_counted() -> None:
    known = KNOWN["llamafactory/alpaca_zh", "microsoft/phi-1_5"]
    assert known.mean == pytest.approx(407, abs=0.5)
    assert known.supervised == pytest.approx(0.88, abs=0.005)
    assert known.cut(1024).longest == 1024


@pytest.mark.slow
def test_the_bundled_rows_are_as_they_were_counted() -> None:
    from jetson_ft.runs.forecast import _BUNDLED_HELDOUT

    found = lengths.of(tokenised(read.bundled_train()))
    known = KNOWN["bundled", "embedded"].cut(512)
    assert (found.rows, found.longest) == (known.rows, known.longest)
    assert found.mean == pytest.approx(known.mean, rel=0.01)
    assert found.supervised == pytest.approx(known.supervised, rel=0.01)
    assert len(read.bundled_heldout().read_text(encoding="utf-8").splitlines()) == _BUNDLED_HELDOUT


def tokenised(path: Path) -> Any:
    """The rows under the embedded model's own tokenizer, taken from its package."""
    gguf = embedded._packaged_gguf()
    tokenizer = load.load_tokenizer(Base("embedded", gguf.parent, gguf.name))
    rows, _ = store.read(read.resolve(str(path)))
    return tokens.tokenise(rows, "bundled", tokenizer, 512)[0]
