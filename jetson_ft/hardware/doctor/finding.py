"""The result of a check, and the machine that is checked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from jetson_ft.errors import Message, _, messages_as_json
from jetson_ft.hardware import detect

Status = Literal["ok", "warning", "failure"]

_TITLES = {
    "board": _("Board"), "jetpack": "JetPack", "l4t": _("Known fault"), "power": _("Power mode"),
    "clocks": _("GPU clock"), "access": _("Device files"), "limit": _("Memory limit"),
    "memory": _("Memory"), "swap": _("Swap"), "disk": _("Disk"), "sensors": _("Sensors"),
    "jtop": "jtop", "hub": _("Hub"), "torch": "PyTorch", "gpu": "GPU",
    "bitsandbytes": "bitsandbytes",
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """The result of a check."""

    status: Status
    key: str  # CHECK.RESULT, for programs
    text: Message
    fix: Message  # a command, or what to do; empty where nothing is wrong

    @property
    def name(self) -> str:
        """Name of the check."""
        return self.key.partition(".")[0]

    @property
    def title(self) -> Message:
        """Name of the check for people."""
        return Message(_TITLES[self.name])

    def as_json(self) -> dict[str, Any]:
        """Return the finding as `doctor --json` prints it."""
        head = {"name": self.name, "key": self.key, "status": self.status}
        return {**head, **messages_as_json(title=self.title, text=self.text, fix=self.fix)}


def _finding(status: Status, key: str, text: str, fix: str = "", **values: Any) -> Finding:
    return Finding(status, key, Message(text, values), Message(fix, values))


ok = partial(_finding, "ok")
warning = partial(_finding, "warning")  # training works, but slower, or without something
failure = partial(_finding, "failure")  # training can't work


@dataclass(frozen=True)
class Machine:
    """The machine to check."""

    root: Path = Path("/")  # the folder that stands for `/`
    path: str | None = None  # where programs are searched for; by default PATH
    runs: Path = Path("runs")

    @cached_property
    def board(self) -> str | None:
        """Name of the Jetson; None: another machine."""
        return detect.board_name(self.root)
