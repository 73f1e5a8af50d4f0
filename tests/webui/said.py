"""Every English text that reaches a person as an error, found in the source without running it.

Follows what `UserError` and its like are given: literals, f-strings (a value becomes `{}`), both
arms of a condition, sums, names back to what is assigned to them, tables, and functions of the
same module back to what they return. What comes from elsewhere is a value.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# Call -> its arguments that are shown by themselves, as (position, keyword); None: all of them.
_WHOLE: dict[str, tuple[int | None, str]] = {
    "UserError": (None, ""), "OutOfMemory": (None, ""), "_BadByte": (None, ""),
    "Problem": (2, "message"),
    "_Refused": (1, "message"), "write_state": (1, "reason"), "refusal": (0, ""),
    "lost": (1, "said"), "_unclear": (1, "what"), "_end": (2, "reason"), "__init__": (None, ""),
}  # fmt: skip
# Those that are shown inside of such a text.
_PARTS: dict[str, tuple[int | None, str]] = {
    "RowError": (0, ""), "Broken": (0, ""), "_BrokenJson": (0, ""), "_diverged": (0, ""),
    "agree": (0, ""), "lost": (0, "whom"),
}  # fmt: skip
# Functions whose results are shown; of a pair the second.
_RETURNED = {"of_code": True, "of_signal": True, "unwatched": True, "fault": False,
             "this_machine": False, "_too_large": True, "__str__": False}  # fmt: skip


@dataclass
class Said:
    """Templates, with the places that they come from."""

    whole: dict[str, str] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)
    phases: dict[str, str] = field(default_factory=dict)


def said(root: Path, left_out: set[str]) -> Said:
    """Of all modules under `root` but those left out (their paths, or those of their folders)."""
    found = Said()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name not in left_out and name.partition("/")[0] not in left_out:
            _Module(path.read_text(encoding="utf-8"), name, found).read()
    return found


class _Module:
    def __init__(self, source: str, name: str, found: Said) -> None:
        self.name, self.found = name, found
        self.tree = ast.parse(source)
        self.functions: dict[str, list[ast.FunctionDef]] = {}  # those of classes too
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef):
                self.functions.setdefault(node.name, []).append(node)
        self.constants = _assigned(self.tree.body)
        self._seen: set[tuple[int, bool]] = set()

    def read(self) -> None:
        for function in itertools.chain(*self.functions.values()):
            names = {**self.constants, **_assigned(ast.walk(function))}
            for node in ast.walk(function):
                if isinstance(node, ast.Call):
                    self._call(node, names)
            if function.name in _RETURNED:
                for result in _results(function):
                    whole = _RETURNED[function.name]
                    last = result.elts[-1] if isinstance(result, ast.Tuple) else result
                    self._take(last, names, whole)

    def _call(self, node: ast.Call, names: Names) -> None:
        called = _name(node.func)
        for table, whole in ((_WHOLE, True), (_PARTS, False)):
            if called in table:
                position, keyword = table[called]
                chosen = node.args if position is None else node.args[position : position + 1]
                named = [k.value for k in node.keywords if k.arg == keyword or position is None]
                for value in (*chosen, *named):
                    self._take(value, names, whole)
        if called == "phase" or (called == "emit" and _is(node.args[0], "phase")):
            told = [k.value for k in node.keywords if k.arg == "name"] or node.args[:1]
            if isinstance(told[0], ast.Constant):
                self.found.phases[str(told[0].value)] = self._place(node)
        if called == "emit" and _is(node.args[0], "warning"):
            self._take(node.keywords[0].value, names, True)

    def _take(self, value: ast.expr, names: Names, whole: bool) -> None:
        """Notes the texts that an expression may be, and the texts within them."""
        if (id(value), whole) in self._seen:
            return
        self._seen.add((id(value), whole))
        texts = self.found.whole if whole else self.found.parts
        for leaf, its in self._leaves(value, names):
            for text in self._texts(leaf, its):
                texts.setdefault(text, self._place(leaf))
            for inner, inside in self._inner(leaf, its):
                self._take(inner, inside, False)

    def _place(self, node: ast.AST) -> str:
        return f"jetson_ft/{self.name}:{node.lineno}"  # type: ignore[attr-defined]

    def _texts(self, leaf: ast.expr, names: Names) -> list[str]:
        """A leaf's text, its values as `{}`."""
        if isinstance(leaf, ast.Constant):
            return [_escaped(leaf.value)] if isinstance(leaf.value, str) else []
        if isinstance(leaf, ast.JoinedStr):
            return ["".join(_escaped(p.value) if isinstance(p, ast.Constant) else "{}"
                            for p in leaf.values)]  # fmt: skip
        if isinstance(leaf, ast.BinOp) and isinstance(leaf.op, ast.Add):
            pairs = itertools.product(self._addends(leaf.left), self._addends(leaf.right))
            return [first + second for first, second in pairs]
        if isinstance(leaf, ast.Call) and _name(leaf.func) == "format":
            formats = self._leaves(leaf.func.value, names)  # type: ignore[attr-defined]
            return [
                re.sub(r"{{.*?}}", "{}", t) for one, its in formats for t in self._texts(one, its)
            ]
        return []

    def _addends(self, side: ast.expr) -> list[str]:
        """The texts of a sum's side; of names the module's own, since others may be sums of it."""
        if isinstance(side, ast.Call):
            return ["{}"]
        leaves = self._leaves(side, self.constants)
        return [text for one, its in leaves for text in self._texts(one, its)] or ["{}"]

    def _leaves(
        self, value: ast.expr, names: Names, seen: frozenset[int] = frozenset()
    ) -> Iterator[tuple[ast.expr, Names]]:
        """What an expression may be in the end, with the names that are known there."""
        if id(value) in seen:  # `text = text[:60]`
            return
        others = self._others(value, names)
        if others is None:
            yield value, names
            return
        for one, its in others:
            yield from self._leaves(one, its, seen | {id(value)})

    def _others(self, value: ast.expr, names: Names) -> list[tuple[ast.expr, Names]] | None:
        """The expressions that an expression stands for; None: it stands for itself."""
        if isinstance(value, ast.IfExp):
            return [(value.body, names), (value.orelse, names)]
        if isinstance(value, ast.BoolOp):
            return [(one, names) for one in value.values]
        if isinstance(value, ast.Name):
            return [(one, names) for one in names.get(value.id, ())]
        if isinstance(value, ast.Subscript):
            return [(value.value, names)]
        if isinstance(value, ast.List):
            return [(one, names) for one in value.elts]
        if isinstance(value, ast.ListComp):
            return [(value.elt, names)]
        if isinstance(value, ast.Dict):
            by_key = any(isinstance(k, ast.Constant) and " " in str(k.value) for k in value.keys)
            return [(one, names) for one in (value.keys if by_key else value.values) if one]
        if isinstance(value, ast.Call) and _name(value.func) in ("get", "strip"):
            return [(value.func.value, names)]  # type: ignore[attr-defined]
        if isinstance(value, ast.Call) and _name(value.func) in self.functions:
            return [
                (result, {**self.constants, **_assigned(ast.walk(function))})
                for function in self.functions[_name(value.func)]
                for result in _results(function)
            ]
        return None

    def _inner(self, leaf: ast.expr, names: Names) -> Iterator[tuple[ast.expr, Names]]:
        """The expressions whose text stands inside a leaf's."""
        if isinstance(leaf, ast.JoinedStr):
            for part in leaf.values:
                if isinstance(part, ast.FormattedValue):
                    yield part.value, names
        elif isinstance(leaf, ast.BinOp):
            for side in (leaf.left, leaf.right):
                yield from self._inner(side, names)
                if self._addends(side) == ["{}"]:
                    yield side, names
        elif isinstance(leaf, ast.Call) and _name(leaf.func) == "join":
            for one in ast.walk(leaf.args[0]):
                if isinstance(one, ast.GeneratorExp | ast.ListComp):
                    yield one.elt, names


Names = dict[str, list[ast.expr]]


def _assigned(nodes: object) -> Names:
    """Name -> all that is assigned to it."""
    found: Names = {}
    for node in nodes:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign | ast.AugAssign | ast.NamedExpr):
            if isinstance(node.target, ast.Name) and node.value:
                found.setdefault(node.target.id, []).append(node.value)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    found.setdefault(target.id, []).append(node.value)
                elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    for one, value in zip(target.elts, node.value.elts, strict=True):
                        if isinstance(one, ast.Name):
                            found.setdefault(one.id, []).append(value)
    return found


def _results(function: ast.FunctionDef) -> list[ast.expr]:
    return [n.value for n in ast.walk(function) if isinstance(n, ast.Return) and n.value]


def _name(called: ast.expr) -> str:
    return getattr(called, "id", None) or getattr(called, "attr", "")


def _is(value: ast.expr, text: str) -> bool:
    return isinstance(value, ast.Constant) and value.value == text


def _escaped(text: object) -> str:
    return str(text).replace("{", "{{").replace("}", "}}")
