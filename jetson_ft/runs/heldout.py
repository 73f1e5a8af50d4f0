"""heldout.json: the held-out rows with the replies of base and adapter.

With it two runs can be compared row by row (docs/run-directory.md).
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from jetson_ft.files import write_json
from jetson_ft.runs import contents
from jetson_ft.runs.contents import SCHEMA
from jetson_ft.runs.store import Run

_FILE = "heldout.json"


class _Side(BaseModel):
    nats: float
    reply: str
    ended: bool


class _Row(BaseModel):
    sha256: str
    category: str
    characters: int
    tokens: int
    reference: str
    before: _Side
    after: _Side


class _Rows(BaseModel):
    rows: list[_Row]


def write_rows(run: Run, rows: list[dict[str, Any]]) -> None:
    """Write the rows that a comparison returned; remove the file if there are none."""
    path = run.path / _FILE
    if rows:
        write_json(path, {"schema": SCHEMA, "rows": rows})
    else:
        path.unlink(missing_ok=True)


def read_rows(run: Run) -> list[dict[str, Any]]:
    """Return the rows; none of a run of an older version, or whose comparison failed.

    Raises:
        DamagedRun: the file can't be used.
    """
    path = run.path / _FILE
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = contents.read_object(path, _Rows)["rows"]
    return rows
