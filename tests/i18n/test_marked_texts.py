"""Errors are marked for translation in the source, and a recipe's mistakes are Chinese in fact."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import jetson_ft
from jetson_ft import i18n, recipe
from jetson_ft.errors import RecipeError

PACKAGE = Path(jetson_ft.__file__).parent
ENGLISH_ONLY = ("cli/", "bench/", "api.py")  # the terminal and the Python API
# Positions of the texts among a call's arguments. `fix` may be given by its keyword too.
TEXTS = {
    "UserError": (0, 2), "OutOfMemory": (0, 2), "RowError": (0,), "Message": (0,), "Problem": (2,),
    "ok": (1, 2), "warning": (1, 2), "failure": (1, 2),
}  # fmt: skip
FIX = 2

Scope = dict[str, list[ast.expr]]


def assignments(node: ast.AST) -> Scope:
    """Return the values assigned to each name in a module or a function, its own functions too."""
    names: Scope = {}
    for inner in ast.walk(node):
        if isinstance(inner, ast.Assign):
            for target in inner.targets:
                pairs = [(target, inner.value)]
                if isinstance(target, ast.Tuple) and isinstance(inner.value, ast.Tuple):
                    pairs = list(zip(target.elts, inner.value.elts, strict=True))
                for name, value in pairs:
                    if isinstance(name, ast.Name):
                        names.setdefault(name.id, []).append(value)
    return names


def literals(node: ast.expr | None, scope: Scope) -> Iterator[str]:
    """Yield the unmarked texts that an argument may have; values of an f-string become `{}`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        parts = []
        for part in node.values:
            value = part.value if isinstance(part, ast.FormattedValue) else part
            parts.append(next(literals(value, scope), "{}"))
        yield "".join(parts)
    elif isinstance(node, ast.IfExp):
        yield from literals(node.body, scope)
        yield from literals(node.orelse, scope)
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from literals(value, scope)
    elif isinstance(node, ast.BinOp):
        yield from literals(node.left, scope)
        yield from literals(node.right, scope)
    elif isinstance(node, ast.Name):
        inner = {name: values for name, values in scope.items() if name != node.id}
        for value in scope.get(node.id, []):
            yield from literals(value, inner)


def needs_mark(text: str, is_fix: bool) -> bool:
    """Return whether a text has words of a language.

    A `fix` that begins with a small letter is a command, which is the same in all languages:
    sentences begin with a capital or a `code`.
    """
    has_letters = any(map(str.isalpha, re.sub(r"\{[^}]*\}", "", text)))
    return has_letters and not (is_fix and text[:1].islower())


def unmarked(source: str) -> list[str]:
    """Return the texts in calls of `TEXTS` that are not marked, each with its line."""
    tree = ast.parse(source)
    module = assignments(
        ast.Module([node for node in tree.body if isinstance(node, ast.Assign)], [])
    )
    lines = []

    def visit(node: ast.AST, scope: Scope) -> None:
        if isinstance(node, ast.FunctionDef):
            scope = scope | assignments(node)
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            texts = {at: node.args[at] for at in TEXTS.get(name, ()) if at < len(node.args)}
            for keyword in node.keywords if name in TEXTS else ():
                if keyword.arg == "fix":
                    texts[FIX] = keyword.value
            for at, argument in texts.items():
                is_fix = at == FIX and name != "Problem"
                for text in literals(argument, scope):
                    if needs_mark(text, is_fix):
                        lines.append(f"{node.lineno}: {text}")
        for child in ast.iter_child_nodes(node):
            visit(child, scope)

    visit(tree, module)
    return lines


@pytest.mark.parametrize(
    "source",
    [
        'UserError("Not found.")',
        'UserError(f"{name} not found.")',
        'UserError(_("Not found."), "x", "Look again.")',
        'UserError(_("Not found."), fix=f"Look in {place}.")',
        'UserError("Not found." if name else _("Nothing."))',
        'def f():\n what, fix = _("a"), "Look again."\n raise UserError(what, "x", fix)',
        'raise errors.RowError("cut off")',
        'Problem("", 0, Message("not text"))',
        'failure("gpu.none", "no GPU")',
    ],
)
def test_an_unmarked_text_is_reported(source: str) -> None:
    assert len(unmarked(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        'UserError(_("Not found."), "/a/file", _("Look again."), name="a text")',
        'Message("{file} {place}", {"file": name})',
        'UserError(Message(_("Not found.")))',
        'warning("power.unknown", _("not known"), "sudo nvpmodel -q")',
        'COMMAND = "make setup"\nfailure("torch.cpu", _("no GPU"), f"{COMMAND} INDEX={index}")',
        'Problem("lora.rank", 3, message)',
    ],
)
def test_marked_texts_values_and_commands_pass(source: str) -> None:
    assert not unmarked(source)


def test_every_text_of_an_error_is_marked() -> None:
    faults, files = [], 0
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith(ENGLISH_ONLY):
            faults += [f"{name}:{line}" for line in unmarked(path.read_text(encoding="utf-8"))]
            files += 1
    assert not faults and files > 50


@pytest.mark.parametrize("key", recipe.fields())
def test_every_mistake_that_a_form_can_make_is_chinese(key: str) -> None:
    chinese, mistakes = i18n.translator("zh_CN"), 0
    for value in ("", "x y", "-1", "0", "1e99", ".nan", "[]", "a\x01"):
        try:
            recipe.parse_recipe("", "", [f"{key}={value}"])
        except RecipeError as error:
            mistakes += 1
            (problem,) = error.problems
            text = problem.message.format(chinese)
            assert text.startswith(f"`{key}`：") and re.search("[\u4e00-\u9fff]", text)
            assert not re.search("must|not ", text.replace(value, ""))
    assert mistakes
