"""docs/promises.md and the tests marked with its numbers name the same promises."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def promised() -> list[int]:
    """Return the numbers of the document's tables."""
    text = (ROOT / "docs/promises.md").read_text()
    return [int(number) for number in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)]


def marked() -> set[int]:
    """Return the numbers in the marks of all tests."""
    numbers = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            is_mark = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("mark.promise")
            if is_mark and isinstance(node.args[0], ast.Constant):
                numbers.add(node.args[0].value)
    return numbers


def test_every_promise_has_a_test_and_every_mark_a_promise() -> None:
    numbers = promised()
    assert len(numbers) == len(set(numbers)) > 60
    assert set(numbers) == marked()
