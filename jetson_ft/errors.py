"""Texts for people, and the exceptions that carry them.

Everything that can go wrong through input, a machine or a network is raised as a `UserError`; the
user interfaces (command line, page) print it as it is. Any other exception is a fault of this
program.
Templates and values are kept apart, so that `jetson_ft.i18n` can put a text into another language.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

# Of a stored template: a width would let a short one fill the memory.
_FORMAT = re.compile(r"(0[1-9])?,?(\.\d{1,2})?[defgnsx%]?")
# Bounds of a message that is read from a file: a field can stand in a template many times.
_NESTED_MESSAGES, _MAX_TEMPLATE, _MAX_TEXT = 20, 5_000, 100_000  # the last two in characters


def _(text: str) -> str:
    """Mark a text for the catalogues of `jetson_ft.i18n`; return it unchanged."""
    return text


@dataclass(frozen=True)
class Message:
    """A text with values in it.

    Args:
        template: English, in the syntax of `str.format` with named fields only.
        values: the fields' values; a value may be a `Message` itself.
    """

    template: str
    values: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.format()

    def format(self, translate: Callable[[str], str] = str) -> str:
        """Return the text; its own and nested templates pass through `translate`."""
        values = {
            name: value.format(translate) if isinstance(value, Message) else value
            for name, value in self.values.items()
        }
        return translate(self.template).format(**values)

    def as_json(self) -> dict[str, Any]:
        """Return what `from_json` takes, for texts that other processes show."""
        return asdict(self)  # of nested messages too

    @classmethod
    def from_json(cls, data: Any, depth: int = _NESTED_MESSAGES) -> Message:
        """Return the message that `as_json` described.

        Raises:
            ValueError: `data` is something else, or its text can't be made.
        """
        template, values = (
            (data.get("template"), data.get("values")) if isinstance(data, dict) else (None, None)
        )
        if not isinstance(template, str) or not isinstance(values, dict) or not depth:
            raise ValueError("not a message")
        if len(template) > _MAX_TEMPLATE:
            raise ValueError("a message with too long a template")
        for _text, name, form, _conversion in string.Formatter().parse(template):
            # A name with a dot or a bracket would reach into the value.
            if name is not None and not (name.isidentifier() and _FORMAT.fullmatch(form or "")):
                raise ValueError("not a message's template")
        message = cls(
            template,
            {
                name: cls.from_json(value, depth - 1) if isinstance(value, dict) else value
                for name, value in values.items()
            },
        )
        try:
            length = len(message.format())
        except (KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError("a message whose values don't fit its template") from error
        if length > _MAX_TEXT:
            raise ValueError("a message with too long a text")
        return message


def messages_as_json(**messages: Message) -> dict[str, Any]:
    """Return the English text of each, and under `messages` what `Message.from_json` takes."""
    texts = {name: str(message) for name, message in messages.items()}
    return {**texts, "messages": {name: message.as_json() for name, message in messages.items()}}


def joined(messages: list[Message], separator: str = "") -> Message:
    """Return one message that shows several in a row."""
    fields = {f"part{number}": message for number, message in enumerate(messages)}
    return Message(separator.join(f"{{{name}}}" for name in fields), fields)


class UserError(Exception):
    """What is wrong, where, and how to fix it, in one message.

    Args:
        what: the fault, a full sentence; a template for `values`, or a `Message`.
        where: the file, key or address concerned, not a template; may be empty.
        fix: what the person can do about it; a template for `values`, or a `Message`; may be empty.
        values: fields of both templates.
    """

    def __init__(
        self, what: str | Message, where: str | Message = "", fix: str | Message = "", **values: Any
    ) -> None:
        self.what = what if isinstance(what, Message) else Message(what, values)
        self.where = where if isinstance(where, Message) else Message("{where}", {"where": where})
        self.fix = fix if isinstance(fix, Message) else Message(fix, values)
        super().__init__(self.what, self.where, self.fix)

    def __str__(self) -> str:
        return self.format()

    def format(self, translate: Callable[[str], str] = str) -> str:
        """Return the error as lines of text, in the language of `translate`."""
        lines = [self.what.format(translate)]
        if where := self.where.format(translate):
            lines.append(f"  {translate(_('where:')):6} {where}")
        if fix := self.fix.format(translate):
            lines.append(f"  {translate(_('fix:')):6} {fix}")
        return "\n".join(lines)

    def with_fix(self, *more: Message, where: Message | None = None) -> UserError:
        """Return the error with more ways to fix it behind its own, and perhaps another place."""
        fixes = [self.fix, *more] if str(self.fix) else list(more)
        return UserError(self.what, where or self.where, joined(fixes, " "))

    def as_json(self) -> dict[str, Any]:
        """Return the English texts, and under `messages` what `from_json` takes."""
        return messages_as_json(what=self.what, where=self.where, fix=self.fix)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> UserError:
        """Return the error of another process that `as_json` described.

        Raises:
            ValueError: `data` is something else.
        """
        texts, names = data["messages"], ("what", "where", "fix")
        if not isinstance(texts, dict) or sorted(texts) != sorted(names):
            raise ValueError("not an error's messages")
        return UserError(*(Message.from_json(texts[name]) for name in names))


@dataclass(frozen=True)
class Problem:
    """One mistake in a recipe.

    Args:
        key: the dotted key it belongs to; may be empty.
        line: in the file; 0: none.
        message: the text, with the key in it.
        reason: the text without the key, for a form that shows it at the key's field.
    """

    key: str
    line: int
    message: Message
    reason: Message | None = None

    def as_message(self) -> Message:
        """Return the text with the line in front, where there is one."""
        if not self.line:
            return self.message
        return Message(_("line {line}: {message}"), {"line": self.line, "message": self.message})


class RecipeError(UserError):
    """All mistakes of a recipe at once; `problems` lets a form show each at its field.

    Args:
        more: number of further mistakes, which are not among `problems`.
    """

    def __init__(self, problems: list[Problem], where: str, more: int = 0) -> None:
        self.problems = problems
        several = _("The recipe has {count} mistakes:\n  - {problems}")
        what = several if len(problems) > 1 else _("The recipe has a mistake:\n  - {problems}")
        fix = _("`jetson-ft recipe schema` lists every key; docs/recipe.md explains them.")
        messages = [problem.as_message() for problem in problems]
        if more:
            messages.append(Message(_("and {count} more"), {"count": more}))
        listed = joined(messages, "\n  - ")
        super().__init__(what, where, fix, count=len(problems) + more, problems=listed)
