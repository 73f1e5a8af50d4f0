"""Histograms keep what planning needs of rows, and the built-in ones are true."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jetson_ft.data import lengths, sources, store, tokenize
from jetson_ft.data.lengths import KNOWN_LENGTHS
from jetson_ft.models import embedded, loading
from jetson_ft.models.files import BaseModelFiles

ROWS = st.lists(
    st.integers(2, 2000).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), min_size=1
)


@given(ROWS, st.integers(16, 2500))
def test_few_rows_have_exact_lengths(rows: list[tuple[int, int]], limit: int) -> None:
    rows = rows[:40]  # one a group
    sizes, supervised = np.array(rows).T
    histogram = lengths.lengths_from_counts(sizes, supervised).cut(limit)
    cut = np.minimum(sizes, limit)
    assert histogram.tokens == pytest.approx(cut.sum())
    assert histogram.longest == cut.max()
    assert histogram.token_weighted_mean_length == pytest.approx((cut**2).sum() / cut.sum())
    assert histogram.supervised * histogram.tokens == pytest.approx(
        np.maximum(0, supervised - (sizes - cut)).sum()
    )


@given(ROWS)
def test_many_rows_keep_their_mean(rows: list[tuple[int, int]]) -> None:
    sizes, supervised = np.array(rows * 41).T
    histogram = lengths.lengths_from_counts(sizes, supervised)
    assert histogram.tokens == pytest.approx(sizes.sum(), rel=0.03)
    assert 0 < histogram.supervised <= 1


def test_known_lengths_of_alpaca_have_the_counted_mean() -> None:
    known = KNOWN_LENGTHS["llamafactory/alpaca_zh", "microsoft/phi-1_5"]
    assert known.mean == pytest.approx(407, abs=0.5)
    assert known.supervised == pytest.approx(0.88, abs=0.005)
    assert known.cut(1024).longest == 1024


@pytest.mark.slow
@pytest.mark.parametrize("name", sources.BUNDLED)
def test_known_lengths_of_the_bundled_rows_are_true(name: str) -> None:
    bundled = sources.BUNDLED[name]
    histogram = lengths.measure_lengths(tokenized(bundled.train))
    known = KNOWN_LENGTHS[name, "embedded"].cut(512)
    assert (histogram.rows, histogram.longest) == (known.rows, known.longest)
    assert histogram.mean == pytest.approx(known.mean, rel=0.01)
    assert histogram.supervised == pytest.approx(known.supervised, rel=0.01)
    assert len(bundled.heldout.read_text(encoding="utf-8").splitlines()) == bundled.heldout_rows


def tokenized(path: Path) -> Any:
    """The rows under the embedded model's own tokenizer, taken from its package."""
    gguf = embedded._packaged_gguf()
    tokenizer = loading.load_tokenizer(BaseModelFiles("embedded", gguf.parent, gguf.name))
    rows, _ = store.read_source(sources.resolve_source(str(path)))
    return tokenize.tokenize_rows(rows, str(path), tokenizer, 512)[0]
