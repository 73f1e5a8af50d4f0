"""One line of the doctor's, and the machine it is about."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from jetson_ft.device import jetpack, probe
from jetson_ft.device.doctor.words import FINDINGS, TITLES

LANGUAGES = ("en", "zh")
Status = Literal["ok", "warning", "failure"]


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was found, and the command that mends it.

    The texts stand in `words`; `key` names them, `values` fill their braces.
    """

    status: Status
    key: str  # NAME.WHAT
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What was looked at."""
        return self.key.partition(".")[0]

    def title(self, language: str = "en") -> str:
        """The same for people."""
        return TITLES[self.name][LANGUAGES.index(language)]

    def found(self, language: str = "en") -> str:
        """A sentence."""
        return FINDINGS[self.key].found[LANGUAGES.index(language)].format(**self.values)

    def fix(self, language: str = "en") -> str:
        """A command, or what to do; empty where nothing needs to be done."""
        text = FINDINGS[self.key].fix
        chosen = text if isinstance(text, str) else text[LANGUAGES.index(language)]
        return chosen.format(**self.values)

    def as_json(self) -> dict[str, Any]:
        """For `doctor --json`."""
        texts = {"title": self.title, "found": self.found, "fix": self.fix}
        said = {name: {one: text(one) for one in LANGUAGES} for name, text in texts.items()}
        return {"name": self.name, "key": self.key, "status": self.status, **said}


def ok(key: str, **values: Any) -> Finding:
    """Nothing to do."""
    return Finding("ok", key, values)


def warning(key: str, **values: Any) -> Finding:
    """Training works, but something is slower, smaller or missing."""
    return Finding("warning", key, values)


def failure(key: str, **values: Any) -> Finding:
    """Training can't work."""
    return Finding("failure", key, values)


@dataclass(frozen=True)
class Machine:
    """Where to look, and as whom; the defaults are this machine and who runs this program."""

    root: Path = Path("/")
    path: str | None = None  # where programs are looked for
    runs: Path = Path("runs")
    user: int = field(default_factory=os.geteuid)
    groups: frozenset[int] = field(
        default_factory=lambda: frozenset((os.getegid(), *os.getgroups()))
    )

    @cached_property
    def board(self) -> str | None:
        """Its name, on a Jetson; a container may hide the name and show the release."""
        name = probe.board_name(self.root)
        return name or ("NVIDIA Jetson" if self.l4t else None)

    @cached_property
    def l4t(self) -> jetpack.L4T | None:
        """The system software of a Jetson."""
        return jetpack.l4t(self.root)
