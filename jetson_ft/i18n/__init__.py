"""Texts in other languages: one catalogue (`<language>.po`) per language; English is the source.

Texts are marked with `_` where they are written (`jetson_ft.errors`) and translated where they are
shown, by the page and by reports. To add a language, add one file here. `scripts/messages.py`
extracts the texts and updates the catalogues.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from jetson_ft.errors import Message, _

FOLDER = Path(__file__).parent
SOURCE = "en"


@lru_cache
def languages() -> dict[str, str]:
    """Return the languages there are, each with its own name: `{"en": "English", …}`.

    A catalogue's translation of "English" is its language's own name.
    """
    tags = [SOURCE, *sorted(path.stem for path in FOLDER.glob("*.po"))]
    return {tag: translator(tag)(_("English")) for tag in tags}


@lru_cache
def translator(language: str) -> Callable[[str], str]:
    """Return a function that gives a template in that language; what is missing stays English."""
    path = FOLDER / f"{language}.po"
    if not path.exists():
        return str
    from babel.messages.pofile import read_po

    with open(path, encoding="utf-8") as file:
        entries = [entry for entry in read_po(file) if entry.id and not entry.fuzzy]
    texts = {str(entry.id): str(entry.string) for entry in entries}
    return lambda text: texts.get(text) or text


def duration(seconds: float) -> Message:
    """Return a duration in its two largest units: `4 min 05 s`, `1 h 02 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return Message(_("{seconds} s"), {"seconds": rest})
    if minutes < 60:
        return Message(_("{minutes} min {seconds:02d} s"), {"minutes": minutes, "seconds": rest})
    return Message(
        _("{hours} h {minutes:02d} min"), {"hours": minutes // 60, "minutes": minutes % 60}
    )
