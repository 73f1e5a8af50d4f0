"""Histograms keep what planning needs of rows, and the built-in ones are true."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jetson_ft.data import lengths, sources, store, tokenize
from jetson_ft.data.formats import ChatMessage
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


# Counted in tokens over texts without a template: 690 bundled rows, 800 of alpaca_zh.
@pytest.mark.parametrize(
    ("vocabulary", "bundled", "alpaca"),
    [(49_152, 234.2, 331.0), (128_256, 122.3, 157.1), (151_936, 102.4, 124.3)],
    ids=["SmolLM2", "Llama 3", "Qwen3"],
)
def test_converted_lengths_are_near_what_other_tokenizers_count(
    vocabulary: int, bundled: float, alpaca: float
) -> None:
    template = 15  # tokens that a usual one adds to two messages
    by_phi = KNOWN_LENGTHS["llamafactory/alpaca_zh", "microsoft/phi-1_5"]
    converted = by_phi.scaled(lengths.token_factor(51_200, vocabulary))
    assert converted.mean == pytest.approx(alpaca + template, rel=0.2)
    by_smollm = KNOWN_LENGTHS["bundled", "embedded"]
    converted = by_smollm.scaled(lengths.token_factor(49_152, vocabulary))
    assert converted.mean == pytest.approx(bundled + template, rel=0.2)
    assert converted.supervised == pytest.approx(by_smollm.supervised)
    assert converted.longest >= converted.groups[-1][0]


@pytest.mark.parametrize(
    ("vocabulary", "counted"), [(49_152, 234.2), (128_256, 122.3), (151_936, 102.4)]
)
def test_estimate_from_characters_is_near_what_tokenizers_count(
    vocabulary: int, counted: float
) -> None:
    rows = [
        json.loads(line)["messages"]
        for line in sources.BUNDLED["bundled"].train.read_text(encoding="utf-8").splitlines()
    ]
    estimated = lengths.estimate_lengths(rows, vocabulary, 131_072)
    assert estimated.rows == 690
    assert estimated.mean == pytest.approx(counted + 10, rel=0.2)


@given(st.lists(st.text(max_size=40), min_size=2, max_size=4))
def test_any_text_has_an_estimate(texts: list[str]) -> None:
    roles = ("user", "assistant")
    row = [ChatMessage(role=roles[i % 2], content=text) for i, text in enumerate(texts)]
    estimated = lengths.estimate_lengths([row], 151_936, 131_072)
    ((size, supervised),) = estimated.groups
    assert 0 < supervised <= size == estimated.longest


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


@given(st.lists(st.lists(st.sampled_from("cae"), min_size=1, max_size=9), min_size=1, max_size=4))
def test_longest_prompt_ends_where_a_rows_last_answer_begins(roles: list[list[str]]) -> None:
    from datasets import Dataset

    rows = [[*row, "c", "a"] if "a" not in row else row for row in roles]
    expected = 0
    for row in rows:
        starts = [i for i, role in enumerate(row) if role == "a" and row[:i][-1:] != ["a"]]
        expected = max(expected, starts[-1])
    encoded = Dataset.from_dict({"segments": [["cae".index(role) for role in row] for row in rows]})
    assert lengths.longest_prompt(encoded) == expected


@given(ROWS)
def test_longest_prompt_of_a_histogram_is_that_of_its_groups(rows: list[tuple[int, int]]) -> None:
    sizes, supervised = np.array(rows[:40]).T
    histogram = lengths.lengths_from_counts(sizes, supervised)
    assert histogram.longest_prompt == max(sizes - supervised)
