"""The YAML reader: values, line numbers, and what it refuses."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jetson_ft.recipe import strict_yaml


def read(text: str) -> Any:
    value, _, problems = strict_yaml.parse_yaml(text)
    assert not problems, [str(problem.message) for problem in problems]
    return value


def refusal(text: str) -> str:
    """The one problem of a text that can't be read at all."""
    value, _, problems = strict_yaml.parse_yaml(text)
    assert value is None
    assert len(problems) == 1
    return str(problems[0].as_message())


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E4", 1e4), ("-2.5e+3", -2500.0), (".5", 0.5), ("3.", 3.0), ("1.0", 1.0),
        ("0", 0), ("-7", -7), ("+7", 7), ("010", 10), ("1_000", 1000), (".inf", math.inf),
        ("-.inf", -math.inf), ("true", True), ("False", False), ("null", None), ("~", None),
        ("no", "no"), ("yes", "yes"), ("on", "on"), ("off", "off"), ("y", "y"), ("0x10", "0x10"),
        ("12:30", "12:30"), ("2026-11-21", "2026-11-21"), ("1e", "1e"), ("e5", "e5"),
        ("'1e-4'", "1e-4"), ('"true"', "true"), ("中文 text", "中文 text"), ("-.", "-."),
    ],
)  # fmt: skip
def test_scalar_has_the_value_of_yaml_1_2(text: str, value: Any) -> None:
    value_read = read(f"key: {text}")["key"]
    assert (value_read, type(value_read)) == (value, type(value))


def test_nan_is_read() -> None:
    assert math.isnan(read("key: .nan")["key"])


def test_empty_text_is_an_empty_mapping() -> None:
    assert read("") == read("# a comment\n") == {}
    assert read("key:") == {"key": None}


def test_keys_are_always_text() -> None:
    assert read("1: a\ntrue: b\n1.0: c\n") == {"1": "a", "true": "b", "1.0": "c"}


def test_merge_key_of_yaml_1_1_is_an_ordinary_key() -> None:
    assert read("<<: {a: 1}\nb: 2") == {"<<": {"a": 1}, "b": 2}


def test_every_key_and_item_has_its_line() -> None:
    text = "# comment\nmodel: a\n\nlora:\n  rank: 8\n  targets:\n  - q\n  - v\ndata: {train: x}\n"
    _, lines, _ = strict_yaml.parse_yaml(text)
    assert lines == {
        ("model",): 2, ("lora",): 4, ("lora", "rank"): 5, ("lora", "targets"): 6,
        ("lora", "targets", 0): 7, ("lora", "targets", 1): 8, ("data",): 9, ("data", "train"): 9,
    }  # fmt: skip


def test_duplicate_key_is_reported_with_both_lines_and_the_first_value_counts() -> None:
    value, _, problems = strict_yaml.parse_yaml("a: 1\nb:\n  c: 1\n  c: 2\na: 2\na: 3\n")
    assert value == {"a": 1, "b": {"c": 1}}
    assert [(problem.key, str(problem.as_message())) for problem in problems] == [
        ("b.c", "line 4: duplicate key `b.c` (first on line 3)"),
        ("a", "line 5: duplicate key `a` (first on line 1)"),
        ("a", "line 6: duplicate key `a` (first on line 1)"),
    ]


def test_equal_keys_with_other_quotes_are_duplicates() -> None:
    _, _, problems = strict_yaml.parse_yaml("a: 1\n'a': 2\n")
    assert [problem.line for problem in problems] == [2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: !!python/object/apply:os.system [ls]", "line 2: the YAML tag"),
        ("a: !!str x", "line 1: the YAML tag"),
        ("a: !own x", "line 1: the YAML tag '!own'"),
        ("a: 1\nb: &x 1\nc: *x", "line 2: anchors and aliases"),
        ("a: [&x 1]", "line 1: anchors and aliases"),
        ("a: 1\n---\nb: 1", "line 2: a second document"),
        ("a: 1\nb: [1", "line 2: not valid YAML"),
        ("a: b: c", "line 1: not valid YAML: mapping values are not allowed here"),
        ("a: 1\n\tb: 2", "line 2: not valid YAML"),
        ("a: 1\nb: \x07", "line 2: not valid YAML: the character U+0007"),
        ("a: *gone", "line 1: anchors and aliases"),
    ],
)
def test_yaml_beyond_plain_values_is_refused_with_its_line(text: str, words: str) -> None:
    assert words in refusal(text)


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? "])
def test_deep_nesting_is_refused_before_parsing(opening: str) -> None:
    text = "key:\n  " + opening * 5000
    assert refusal(text) == f"line 2: nested deeper than {strict_yaml.MAX_DEPTH} levels"


def test_one_level_too_many_is_refused() -> None:
    assert "nested deeper" in refusal("a: " + "[" * strict_yaml.MAX_DEPTH)


def test_sixteen_levels_are_read() -> None:
    inside = strict_yaml.MAX_DEPTH - 1
    value = read("a: " + "[" * inside + "1" + "]" * inside)["a"]
    for _ in range(inside):
        (value,) = value
    assert value == 1


def test_very_long_text_is_refused_at_once() -> None:
    assert "longer than 100,000 characters" in refusal("a: 1\n" * 20_001)
    assert refusal("x: [" + "1, " * 1_000_000)


def test_longest_text_is_read_in_seconds() -> None:
    started = time.process_time()
    read("- a\n" * (strict_yaml.MAX_CHARACTERS // 4))
    assert time.process_time() - started < 5


def test_number_of_thousands_of_digits_is_read_or_stays_text() -> None:
    assert read("a: " + "9" * 4000)["a"] == 10**4000 - 1
    assert read("a: " + "9" * 5000)["a"] == "9" * 5000


@settings(deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    value, _, problems = strict_yaml.parse_yaml(text)
    assert value is not None or problems or read(text) is None


_TOKENS = (
    "a", ": ", "\n", "  ", "- ", "[", "]", "{", "}", ",", "'", '"', "#", "&a ", "*a", "!t ", "|",
    ">", "?", "%", "---", "...", "1e-4", "~", "\t", "<<", "中",
)  # fmt: skip
_YAML_LIKE = st.lists(st.sampled_from(_TOKENS), max_size=40).map("".join)


@settings(deadline=None)
@given(_YAML_LIKE)
def test_any_yaml_tokens_are_read_or_refused(text: str) -> None:
    value, _, problems = strict_yaml.parse_yaml(text)
    assert all(problem.line >= 0 for problem in problems)
    assert value is not None or problems or read(text) is None


# PyYAML folds U+0085 into a blank when it is in a key; no recipe may hold it.
_TEXT = st.text(st.characters(exclude_characters="\x85", exclude_categories=["Cs"]), max_size=30)
_LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _TEXT
_TREES = st.recursive(
    _LEAVES,
    lambda child: st.lists(child, max_size=3) | st.dictionaries(_TEXT, child, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(_TREES)
def test_dumped_value_is_read_back(value: Any) -> None:
    assert read(strict_yaml.dump_yaml({"key": value})) == {"key": value}


@settings(deadline=None)
@given(_LEAVES)
def test_dumped_value_is_the_same_for_other_readers(value: Any) -> None:
    assert yaml.safe_load(strict_yaml.dump_yaml({"key": value})) == {"key": value}


@pytest.mark.parametrize(
    "text", ["1e-4", "08", "no", "on", "0x10", "12:30", "~", "", "null", "=", "1_0"]
)
def test_text_that_looks_like_another_type_is_quoted(text: str) -> None:
    assert yaml.safe_load(strict_yaml.dump_yaml({"key": text})) == {"key": text}
    assert read(strict_yaml.dump_yaml({"key": text})) == {"key": text}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("8", 8), ("true", True), ("no", "no"), ("[a, b]", ["a", "b"]), ("", ""),
        ("'8'", "8"), ('"a b"', "a b"), ("a: b", "a: b"), ("{a: 1}", "{a: 1}"), ("[a", "[a"),
        ("*.json", "*.json"), ("runs #2", "runs #2"), ("C:/x", "C:/x"), ("%a", "%a"), ("@x", "@x"),
    ],
)  # fmt: skip
def test_override_is_a_scalar_a_list_or_the_text_itself(text: str, value: Any) -> None:
    parsed = strict_yaml.parse_scalar(text)
    assert (parsed, type(parsed)) == (value, type(value))


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_override_has_a_value(text: str) -> None:
    assert not isinstance(strict_yaml.parse_scalar(text), dict)
