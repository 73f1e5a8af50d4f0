"""What a person does with runs that are there: name them, note something, delete, take away."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

from jetson_ft.errors import UserError
from jetson_ft.paths import disk_errors, printable, staged, write_json
from jetson_ft.runs import jobs, live
from jetson_ft.runs.rundir import LIVE, SCHEMA, Run

_TITLE_LENGTH, _NOTES_LENGTH = 100, 20_000


def describe(run: Run, title: str | None = None, notes: str | None = None) -> None:
    """Gives it a title or notes; what is None stays. The folder keeps its name.

    Raises:
        UserError: a text is too long, or the folder can't be written.
    """
    told = live.about(run)
    for key, text, limit in (("title", title, _TITLE_LENGTH), ("notes", notes, _NOTES_LENGTH)):
        if text is None:
            continue
        if len(text) > limit:
            raise UserError(f"The {key} has {len(text):,} characters.", fix=f"At most {limit:,}.")
        told[key] = printable(text.strip())
    write_json(run.path / live.ABOUT, {"schema": SCHEMA, **told})


def delete(run: Run) -> None:
    """Removes an ended run with all that is in it.

    Raises:
        UserError: it is running, or its folder can't be removed.
    """
    if jobs.settle(run) in LIVE:
        raise UserError(
            f"{run.name} is running.", str(run.path), "Stop it first (`jetson-ft runs stop`)."
        )
    leaving = run.path.with_name(f".deleted-{run.name}")
    with disk_errors(run.path):
        shutil.rmtree(leaving, ignore_errors=True)
        run.path.rename(leaving)  # gone at once, for everybody
        shutil.rmtree(leaving)


def zip_adapter(run: Run, target: Path) -> Path:
    """The adapter's folder as one file to take away.

    Raises:
        UserError: there is no adapter yet, or the file can't be written.
    """
    if not run.adapter.is_dir():
        raise UserError(f"{run.name} has no adapter yet.", str(run.path), "Let it finish.")
    with staged(target) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(run.adapter.iterdir()):
            archive.write(path, f"{run.name}/{path.name}")
    return target
