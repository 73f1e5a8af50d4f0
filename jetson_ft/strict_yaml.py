"""YAML as recipes use it: plain mappings, lists and scalars, each with its line number.

PyYAML reads `1e-4` as a string, lets the last of two equal keys win, builds objects
from tags and overflows on deep nesting. This reader takes scalars as YAML 1.2 does (decimal
numbers only; `1_000` is one) and refuses the rest with the line it stands on. What `dump`
writes, `load` and other YAML readers take alike.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from jetson_ft.errors import Problem

MAX_DEPTH = 16
MAX_CHARACTERS = 100_000  # a second of reading
_MAX_DIGITS = 4000  # Python's own limit is 4300

KeyPath = tuple[str | int, ...]


class _CoreLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's core scalars: `no` is text and `1e-4` a number."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - as PyYAML declares it


class _Dumper(yaml.SafeDumper):
    """SafeDumper that puts text in quotes which YAML 1.1 or 1.2 would take for something else."""


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
):
    for _class in (_CoreLoader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})\Z"), list(_first)
        )


class _Refused(Exception):
    def __init__(self, line: int, message: str) -> None:
        self.problem = Problem("", line, message)


def load(text: str) -> tuple[Any, dict[KeyPath, int], list[Problem]]:
    """Parses a document.

    Returns:
        The value; the line (from 1) of every key and list item by its path; and the
        problems found. The value is None where the text could not be read at all.
    """
    lines: dict[KeyPath, int] = {}
    problems: list[Problem] = []
    try:
        _refuse_beyond_plain(text)
        node = yaml.compose(text, Loader=_CoreLoader)
        value = {} if node is None else _convert(node, (), lines, problems)
    except _Refused as refused:
        return None, lines, [refused.problem]
    except yaml.YAMLError as error:
        return None, lines, [_syntax_problem(text, error)]
    return value, lines, problems


def dump(value: Any) -> str:
    """Plain values as YAML, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def scalar(text: str) -> Any:
    """The value of one `--set key=TEXT`: a YAML scalar or flow list, else the text itself."""
    value, _, problems = load(text)
    if problems or isinstance(value, dict):
        return text
    # Unquoted text is taken to the letter: ` #` in a folder's name begins no comment.
    return text if isinstance(value, str) and not text.lstrip().startswith(("'", '"')) else value


def _refuse_beyond_plain(text: str) -> None:
    """Looks at the event stream, which needs no recursion, before anything is built."""
    if len(text) > MAX_CHARACTERS:
        raise _Refused(0, f"longer than {MAX_CHARACTERS:,} characters")
    depth = documents = 0
    for event in yaml.parse(text, Loader=_CoreLoader):
        line = event.start_mark.line + 1 if event.start_mark else 0
        documents += isinstance(event, yaml.DocumentStartEvent)
        if documents > 1:
            raise _Refused(line, "a second document; a recipe is one")
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _Refused(line, "anchors and aliases (& and *) are not used in recipes")
        if tag := getattr(event, "tag", None):
            raise _Refused(line, f"the YAML tag {tag!r} is not allowed; plain values only")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise _Refused(line, f"nested deeper than {MAX_DEPTH} levels")


def _convert(
    node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], problems: list[Problem]
) -> Any:
    if isinstance(node, yaml.MappingNode):
        return _convert_mapping(node, path, lines, problems)
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, child in enumerate(node.value):
            here = (*path, index)
            lines[here] = child.start_mark.line + 1
            items.append(_convert(child, here, lines, problems))
        return items
    return _scalar_value(node.tag, node.value)


def _convert_mapping(
    node: yaml.MappingNode, path: KeyPath, lines: dict[KeyPath, int], problems: list[Problem]
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, child in node.value:
        line = key_node.start_mark.line + 1
        key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
        here = (*path, key)
        if key in result:
            dotted = ".".join(map(str, here))
            message = f"duplicate key `{dotted}` (first on line {lines[here]})"
            problems.append(Problem(dotted, line, message))
            continue
        lines[here] = line
        result[key] = _convert(child, here, lines, problems)
    return result


def _scalar_value(tag: str, text: str) -> Any:
    kind = tag.rsplit(":", 1)[-1]
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text.replace("_", "")) if len(text) <= _MAX_DIGITS else text
    if kind == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _syntax_problem(text: str, error: yaml.YAMLError) -> Problem:
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return Problem("", line, f"not valid YAML: the character U+{error.character:04X}")
    mark = getattr(error, "problem_mark", None)
    detail = getattr(error, "problem", None) or str(error).splitlines()[0]
    return Problem("", mark.line + 1 if mark else 0, f"not valid YAML: {detail}")
