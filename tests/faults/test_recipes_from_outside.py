"""Recipes that others wrote, through the command line."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from program import Done, assert_refused, main_here

from jetson_ft.recipe import parse_recipe

pytestmark = pytest.mark.promise(27)

GOOD = "version: 1\ntrain:\n  epochs: 2\n  learning_rate: 1e-4\nlora: {rank: 8}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def validate(content: str | bytes, *options: str) -> Done:
    """Run `recipe validate` for a file."""
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    Path("recipe.yaml").write_bytes(raw)
    return main_here("recipe", "validate", "recipe.yaml", *options)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("model: !!python/object/apply:os.system ['touch reached']\n", 6, "not allowed"),
        ("model: !!python/name:os.system\n", 6, "not allowed"),
        ("model: !!str x\n", 6, "not allowed"),
        ("model: !include /etc/passwd\n", 6, "not allowed"),
        ("%TAG ! tag:x,2000:\n", 7, "not valid YAML"),
        ("model: &a x\n", 6, "anchors and aliases"),
        ("a: &a [x]\nb: &b [*a,*a,*a,*a]\nc: [*b,*b,*b,*b]\n", 6, "anchors and aliases"),
        ("<<: {model: x}\n", 6, "unknown key `<<`"),
        ("lora: {rank: 4}\n", 6, "duplicate key `lora` (first on line 5)"),
        ("modle: x\n", 6, "did you mean `model`?"),
        ("data:\n  trian: x\n", 7, "did you mean `data.train`?"),
        ("data: {train: [{source: a, shar: 1}]}\n", 6, "shar"),
        ("model: " + "[" * 5000 + "\n", 6, "nested deeper than 16 levels"),
        ("model: " + "{a: " * 5000 + "\n", 6, "nested deeper than 16 levels"),
        ("model: " + "- " * 5000 + "\n", 6, ""),
        ("---\nmodel: x\n", 6, "a second document"),
        ("model: [x\n", 7, "not valid YAML"),
        ("\tmodel: x\n", 6, "not valid YAML"),
        ("model: 'x\n", 0, "not valid YAML"),
        ("model: \x00\n", 6, "U+0000"),
        ("model: \x1b[2J\n", 6, "U+001B"),
        ("model: \ud800\n", 6, "not UTF-8"),
        ("seed: " + "9" * 9000 + "\n", 6, ""),
        ("? [a, b]\n: c\n", 6, ""),
    ],
)
def test_what_is_wrong_is_refused_with_its_line(
    folder: Path, text: str, line: int, words: str
) -> None:
    done = validate(GOOD + text)
    assert_refused(done, "recipe.yaml", words)
    lines = [int(number) for number in re.findall(r"line (\d+)", done.stderr)]
    assert line in lines or not line, done.stderr
    assert not (folder / "reached").exists()
    assert len(done.stderr) < 5000


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E-4", 1e-4), ("1.e-4", 1e-4), (".0001", 1e-4), ("+1e-4", 1e-4),
     ("0.0001", 1e-4), ("1e-04", 1e-4)],
)  # fmt: skip
@pytest.mark.parametrize("is_override", [False, True])
def test_number_is_a_number(folder: Path, text: str, value: float, is_override: bool) -> None:
    if is_override:
        done = validate("version: 1\n", "--set", f"train.learning_rate={text}")
    else:
        done = validate(f"train: {{learning_rate: {text}}}\n")
    assert done.returncode == 0, done.stderr
    shown = main_here(
        "recipe", "show", "recipe.yaml",
        *(["--set", f"train.learning_rate={text}"] if is_override else []),
    )  # fmt: skip
    assert parse_recipe(shown.stdout).train.learning_rate == value


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe" + GOOD.encode("utf-16-le"), GOOD.encode() + b"# \xb4\xf0\n", b"\x80\x04}.",
     b"PK\3\4", bytes(5000), b"[" * 99_999, b"{" * 99_999, b"- " * 49_999, b"x: " * 33_000,
     b"? " * 49_999, b"'" * 99_999, b"a:\n" * 33_333, b"&a " * 33_333, b"#" * 10_000_000,
     b"data: {train: [" + b"1," * 40_000 + b"]}",
     b"".join(b"k%d:\n" % number for number in range(13_000))],
    ids=["utf-16", "byte", "pickle", "zip", "nul", "lists", "mappings", "items", "keys", "complex",
         "quotes", "double", "anchors", "long", "wrong items", "unknown"],
)  # fmt: skip
def test_file_that_is_no_recipe_is_refused_at_once(folder: Path, content: bytes) -> None:
    started = time.process_time()
    done = validate(content)
    assert time.process_time() - started < 5
    assert_refused(done, "recipe.yaml")
    assert len(done.stderr) < 10_000


_WORDS = st.sampled_from(
    ["train", "lora", "data", "model", "rank", "a", "1e-4", "[", "]", "{", "}", ":", ": ", "- ",
     "\n", "\n  ", "&a", "*a", "!!str", "|", ">", "'", '"', "#", ",", "?", "---", "null", "\t",
     "\u2028", "\x85", "\\", "%", "@", "<<", "0x1", ".nan"]
)  # fmt: skip


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=st.lists(_WORDS, max_size=20).map("".join) | st.text(max_size=40))
def test_any_text_is_valid_or_refused_in_one_message(folder: Path, text: str) -> None:
    done = validate(text)
    if done.returncode:
        assert_refused(done, "recipe.yaml")
