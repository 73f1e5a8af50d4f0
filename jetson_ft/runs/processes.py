"""How many processes train a run, and on how many machines: `processes.json`.

No part of the recipe: which rows form a step, and so the result, doesn't depend on it.
"""

from __future__ import annotations

import re
import socket
from dataclasses import asdict, dataclass, replace
from typing import Any

from jetson_ft.errors import UserError
from jetson_ft.paths import read_json, write_json
from jetson_ft.runs.rundir import SCHEMA, Run

_FILE = "processes.json"
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:]+\]|[^:\s]+):(\d{1,5})")


@dataclass(frozen=True)
class Processes:
    """In the words of torch's launcher."""

    nproc_per_node: int = 1
    nnodes: int = 1
    node_rank: int = 0  # of this machine; 0 owns checkpoints, adapter and report
    rendezvous: str | None = None  # HOST:PORT of machine 0

    def __post_init__(self) -> None:
        if self.nproc_per_node < 1 or self.nnodes < 1:
            raise UserError(
                "At least one process on one machine is needed.", "--nproc-per-node, --nnodes"
            )
        if not 0 <= self.node_rank < self.nnodes:
            raise UserError(
                f"There is no machine {self.node_rank} among {self.nnodes}.",
                "--node-rank",
                f"They are numbered from 0 to {self.nnodes - 1}.",
            )
        if self.nnodes > 1 and not _ADDRESS.fullmatch(self.rendezvous or ""):
            raise UserError(
                "Several machines need a place to meet.",
                f"--rendezvous {self.rendezvous or ''}".strip(),
                "Give machine 0's address and a free port, the same on all: 192.168.1.10:29500.",
            )

    @property
    def several(self) -> bool:
        """Whether a launcher is needed."""
        return self.nproc_per_node * self.nnodes > 1

    @property
    def host(self) -> str:
        """Of the rendezvous."""
        return (self.rendezvous or "127.0.0.1:0").rpartition(":")[0].strip("[]")

    def changed(self, **given: Any) -> Processes:
        """With what is given (not None) in place of the old."""
        return replace(self, **{key: value for key, value in given.items() if value is not None})


def of(run: Run) -> Processes:
    """What the run was started, or last resumed, with."""
    path = run.path / _FILE
    if not path.exists():
        return Processes()
    known = Processes.__dataclass_fields__
    return Processes(**{key: value for key, value in read_json(path).items() if key in known})


def store(run: Run, processes: Processes) -> None:
    """For this attempt and those after it."""
    write_json(run.path / _FILE, {"schema": SCHEMA, **asdict(processes)})


def own_address(host: str) -> str:
    """This machine's address as `host` sees it; nothing is sent."""
    try:
        kind, _, _, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.connect(place)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise UserError(
            f"The rendezvous can't be reached: {error.strerror or error}.",
            host,
            "Give the address of machine 0 in a network that all machines are in.",
        ) from error
