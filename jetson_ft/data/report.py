"""The report of reading a source: what was read, what is left out and why, what is not read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jetson_ft.data import formats, layouts
from jetson_ft.errors import Message, UserError, _, joined
from jetson_ft.files import printable

MAX_NAME = 40  # characters shown of a column's name
_MAX_PLACES = 20  # kept of the rows left out for one reason
_MAX_REASONS, _MAX_UNREAD = 50, 100  # kept in the report; the others are counted together

# What to do about rows that can't be used, by the reason's template.
FIXES = {
    layouts.PREFERENCE: _(
        "To train on the wanted answers, name their column: `--set data.columns.answer=chosen` (or "
        "`--set data.columns.messages=chosen` where it has the whole conversation)."
    ),
    layouts.CHAT_MARKUP: _(
        "Give the conversations as `messages`, a list of {{role, content}}: the chat template "
        "writes the control tokens, which are ordinary text where a text has them."
    ),
    formats.SEVERAL_ANSWERS: _("Write a row for each answer that is to be trained on."),
}


@dataclass
class ReadReport:
    """What was read from a source, and what is usable.

    `dropped` has the rows left out by their reason in English: `count`, the first places (`where`,
    English), and both as `errors.Message.as_json` gives them (`message`, `places`). `unread` has
    the rows by the name of a column, of a field of messages (`messages[].name`), or of a list in
    the file (`test[]`) that has content but no use.
    """

    files: list[dict[str, Any]]
    container: str
    layout: str
    encoding: str
    sha256: str
    cache_key: str = ""  # of the content, the settings and this module's version
    rows_read: int = 0
    rows_kept: int = 0
    dropped: dict[str, dict[str, Any]] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)
    duplicates: int = 0
    empty_answers: int = 0
    characters: dict[str, int] = field(default_factory=lambda: {"question": 0, "answer": 0})

    def drop(self, reason: Message, place: Message) -> None:
        """Count a row that is left out."""
        if len(self.dropped) >= _MAX_REASONS and str(reason) not in self.dropped:
            reason = Message(_("other reasons"))
        empty = {"count": 0, "where": [], "message": reason.as_json(), "places": []}
        entry = self.dropped.setdefault(str(reason), empty)
        entry["count"] += 1
        self.empty_answers += reason.template == layouts.NO_ANSWER
        if len(entry["where"]) < _MAX_PLACES:
            entry["where"].append(str(place))
            entry["places"].append(place.as_json())

    def add_unread(self, name: str, count: int = 1) -> None:
        """Count rows with a column that is not read."""
        name = printable(name)[:MAX_NAME] or '""'
        if len(self.unread) >= _MAX_UNREAD and name not in self.unread:
            name = "…"
        self.unread[name] = self.unread.get(name, 0) + count


def check_dropped(report: ReadReport, on_invalid: str, name: str) -> None:
    """Raise a UserError if rows are unusable and may not be skipped, or if all are unusable."""
    if report.rows_kept and (on_invalid == "skip" or not report.dropped):
        return
    reasons, fixes = [], []
    for entry in report.dropped.values():
        reason, count = Message.from_json(entry["message"]), entry["count"]
        if reason.template in FIXES:
            fixes.append(Message(FIXES[reason.template]))
        places = [Message.from_json(place) for place in entry["places"]]
        if count > len(places):
            places.append(Message("…"))
        values = {"reason": reason, "count": count, "places": joined(places, ", ")}
        reasons.append(Message(_("{reason}: {count} ({places})"), values))
    if report.rows_kept:
        fixes.append(
            Message(_("Fix the rows, or leave them out with `--set data.on_invalid=skip`."))
        )
    elif not fixes:
        fixes.append(Message(_("Fix the rows.")))
    raise UserError(
        _("{unusable} of {rows} rows can't be used:\n  - {reasons}"),
        name,
        joined(fixes, " "),
        unusable=report.rows_read - report.rows_kept,
        rows=report.rows_read,
        reasons=joined(reasons, "\n  - "),
    )
