"""The YAML of recipes: plain mappings, lists and scalars, each with its line number.

PyYAML reads `1e-4` as a string, takes the last of two equal keys, builds objects from tags and
overflows on deep nesting. This reader takes scalars as YAML 1.2 does (decimal numbers only; `1_000`
is one) and refuses everything else, with its line. `parse_yaml` and other YAML readers return the
same value for what `dump_yaml` writes.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import yaml

from jetson_ft.errors import Message, Problem, _
from jetson_ft.files import printable

MAX_DEPTH = 16
MAX_CHARACTERS = 100_000  # a second of reading
_MAX_DIGITS = 4000  # Python's own limit is 4300

KeyPath = tuple[str | int, ...]


class _CoreLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's core scalars: `no` is text and `1e-4` a number."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - as PyYAML declares it


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which YAML 1.1 or 1.2 would read as another type."""


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


def parse_yaml(text: str) -> tuple[Any, dict[KeyPath, int], list[Problem]]:
    """Parse a document.

    Returns:
        The value (None if the text can't be read at all); the line, from 1, of every key and list
        item by its path; and the problems.
    """
    lines: dict[KeyPath, int] = {}
    problems: list[Problem] = []
    try:
        if refused := _beyond_plain(text):
            return None, lines, [refused]
        node = yaml.compose(text, Loader=_CoreLoader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        template = _("not valid YAML: the character U+{character:04X}")
        message = Message(template, {"character": error.character})
        return None, lines, [Problem("", line, message)]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        detail = getattr(error, "problem", None) or str(error).splitlines()[0]
        message = Message(_("not valid YAML: {detail}"), {"detail": detail})
        return None, lines, [Problem("", mark.line + 1 if mark else 0, message)]
    return {} if node is None else _convert(node, (), lines, problems), lines, problems


def dump_yaml(value: Any) -> str:
    """Return plain values as YAML, keys in their order."""
    return _dump(value)


def dump_flow(value: Any) -> str:
    """Return plain values as YAML on one line."""
    return _dump(value, default_flow_style=True, width=sys.maxsize).strip()


def _dump(value: Any, **options: Any) -> str:
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **options)
    if printable(text) == text:
        return text
    # With a character that can disguise the text all beyond ASCII is escaped: PyYAML has no choice
    # between.
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, **options))


def parse_scalar(text: str) -> Any:
    """Return the value of one `--set key=TEXT`: a YAML scalar or flow list, else the text."""
    value, _, problems = parse_yaml(text)
    if problems or isinstance(value, dict):
        return text
    # Unquoted text is kept unchanged: ` #` in a folder's name begins no comment.
    return text if isinstance(value, str) and not text.lstrip().startswith(("'", '"')) else value


def _beyond_plain(text: str) -> Problem | None:
    """Check the event stream, which needs no recursion, before anything is built."""
    if len(text) > MAX_CHARACTERS:
        limit = Message(_("longer than {limit:,} characters"), {"limit": MAX_CHARACTERS})
        return Problem("", 0, limit)
    depth = documents = 0
    for event in yaml.parse(text, Loader=_CoreLoader):
        documents += isinstance(event, yaml.DocumentStartEvent)
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        tag = getattr(event, "tag", None)
        if documents > 1:
            template = _("a second document; a recipe is one")
        elif isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            template = _("anchors and aliases (& and *) are not allowed in recipes")
        elif tag:
            template = _("the YAML tag {tag!r} is not allowed; plain values only")
        elif depth > MAX_DEPTH:
            template = _("nested deeper than {limit} levels")
        else:
            continue
        line = event.start_mark.line + 1 if event.start_mark else 0
        return Problem("", line, Message(template, {"tag": tag, "limit": MAX_DEPTH}))
    return None


def _convert(
    node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], problems: list[Problem]
) -> Any:
    """Return the node's value; add the lines of what is in it, and the duplicate keys."""
    if isinstance(node, yaml.ScalarNode):
        return _scalar_value(node.tag, node.value)
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, child in enumerate(node.value):
            here = (*path, index)
            lines[here] = child.start_mark.line + 1
            items.append(_convert(child, here, lines, problems))
        return items
    result: dict[str, Any] = {}
    for key_node, child in node.value:
        line = key_node.start_mark.line + 1
        key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
        here = (*path, key)
        if key in result:
            dotted = ".".join(map(str, here))
            template = _("duplicate key `{key}` (first on line {first})")
            message = Message(template, {"key": dotted, "first": lines[here]})
            problems.append(Problem(dotted, line, message))
        else:
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
