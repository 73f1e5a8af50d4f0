"""From what the program says to what the page says in Chinese.

A message is compared with the templates of `errors_zh`, the one with the most text of its own
first; its values are what stands between. No regular expressions: a template's pieces are looked
for one after the other, so that the time grows with the message's length and no faster.
"""

from __future__ import annotations

import re
from functools import cache
from string import Formatter

from jetson_ft.webui.errors_zh import ITEMS, LINES, PARTS, PHASES, WHOLE

_Template = tuple[list[str], str]  # English pieces around the values, Chinese

_DEEPEST = 5  # a recipe's mistakes: list, line, key, reason, type
_BETWEEN_ITEMS = re.compile(", | and ")
_WITHIN = {**WHOLE, **PARTS}
# How a message is asked for -> the tables to look into, one after the other.
_TABLES = {"": (WHOLE,), "t": (_WITHIN,), "list": (ITEMS, _WITHIN), "lines": (LINES, _WITHIN)}


def chinese(text: str) -> str:
    """A message in Chinese; the text itself where there is none."""
    return _translated(text, "", 0)


def chinese_phase(name: str) -> str:
    """What a run is doing."""
    return PHASES.get(name, name)


class _Value(str):
    """A value in a message, which a template may ask for in Chinese."""

    depth = 1  # messages that it stands in

    def __format__(self, wanted: str) -> str:
        if wanted == "lines":
            return "\n".join(map(self._line, self.split("\n")))
        if wanted == "list":
            items = _BETWEEN_ITEMS.split(self)
            return "、".join(_translated(item, wanted, self.depth) for item in items)
        return _translated(self, wanted, self.depth) if wanted else str(self)

    def _line(self, text: str) -> str:
        """`  - …`"""
        before, dash, said = text.partition("- ")
        return f"{before}{dash}{_translated(said, 'lines', self.depth)}"


def _translated(text: str, wanted: str, depth: int) -> str:
    if depth < _DEEPEST:
        for pieces, template in _templates(wanted):
            values = _values(pieces, text)
            if values is not None:
                return template.format(*(_value(value, depth + 1) for value in values))
    return str(text)


def _value(text: str, depth: int) -> _Value:
    value = _Value(text)
    value.depth = depth
    return value


@cache
def _templates(wanted: str) -> list[_Template]:
    found = []
    for table in _TABLES[wanted]:
        made = [(_pieces(english), said) for english, said in table.items()]
        found += sorted(made, key=lambda one: -sum(map(len, one[0])))
    return found


def _pieces(template: str) -> list[str]:
    """What stands before, between and after the values."""
    pieces = [""]
    for literal, name, *_ in Formatter().parse(template):
        pieces[-1] += literal
        if name is not None:
            pieces.append("")
    return pieces


def _values(pieces: list[str], text: str) -> list[str] | None:
    """What stands in the places of a template; None where the text isn't made from it."""
    first, last = pieces[0], pieces[-1]
    if not (text.startswith(first) and text.endswith(last)):
        return None
    if len(pieces) == 1:
        return [] if text == first else None
    at, end = len(first), len(text) - len(last)
    if at > end:
        return None
    values = []
    for piece in pieces[1:-1]:
        found = text.find(piece, at, end)
        if found < 0:
            return None
        values.append(text[at:found])
        at = found + len(piece)
    return [*values, text[at:end]]
