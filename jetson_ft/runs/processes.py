"""The processes of a run or a chat: their number, environment, libraries and errors.

`processes.json` has the number of processes and machines, which doesn't affect the result and so is
no part of the recipe. This module imports no torch.
"""

from __future__ import annotations

import os
import re
import signal
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jetson_ft.errors import Message, UserError, _
from jetson_ft.files import cache_root, disk_full, is_disk_full, write_json
from jetson_ft.runs import contents
from jetson_ft.runs.contents import SCHEMA, DamagedRun
from jetson_ft.runs.store import Run
from jetson_ft.training.memory import is_out_of_memory

WORKER_ENVIRONMENT = {
    # OpenMP threads that spin without end make training several times slower as soon as anything
    # else runs on the machine; threads that never spin are slow to wake.
    "GOMP_SPINCOUNT": "20000",
    # In glibc's caches for small objects, the rests of aligned blocks keep large free blocks from
    # being merged (glibc's bug 14581). Without these caches training on a CPU takes less memory.
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0",
    # oneDNN and PyTorch's layer above it each keep kernels for the last 1,024 shapes; every
    # micro-batch has a length of its own (docs/decisions/0009).
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    "LRU_CACHE_CAPACITY": "32",
}
OUT_OF_MEMORY_FIX = _(
    "Close other programs, use quantize: nf4 or a smaller model; in training, lower "
    "data.max_length or lora.rank."
)
LAUNCHER_PROCESS = "JETSON_FT_LAUNCHER"  # its number, in the environment of its workers
_CONFIG_FILE = "processes.json"
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:]+\]|[^:\s]+):(\d{1,5})")


@dataclass(frozen=True)
class DistributedConfig:
    """The processes of a run; the fields are named as the options of `torchrun`."""

    nproc_per_node: int = 1
    nnodes: int = 1
    node_rank: int = 0  # of this machine; machine 0 has checkpoints, adapter and report
    rendezvous: str | None = None  # HOST:PORT of machine 0

    def __post_init__(self) -> None:
        if self.nproc_per_node < 1 or self.nnodes < 1:
            raise UserError(
                _("At least one process on one machine is needed."), "--nproc-per-node, --nnodes"
            )
        if not 0 <= self.node_rank < self.nnodes:
            raise UserError(
                _("There is no machine {rank} among {count}."),
                "--node-rank",
                _("They are numbered from 0 to {last}."),
                rank=self.node_rank,
                count=self.nnodes,
                last=self.nnodes - 1,
            )
        if self.nnodes > 1 and not _ADDRESS.fullmatch(self.rendezvous or ""):
            raise UserError(
                _("Several machines need a rendezvous address."),
                f"--rendezvous {self.rendezvous or ''}".strip(),
                _("Give machine 0's address and a free port, the same on all: 192.168.1.10:29500."),
            )

    @property
    def needs_launcher(self) -> bool:
        """Whether torch's elastic launcher runs in the worker's place."""
        return self.nproc_per_node * self.nnodes > 1

    def with_options(self, **values: Any) -> DistributedConfig:
        """Return a copy with those of the values that aren't None."""
        return replace(self, **{key: value for key, value in values.items() if value is not None})


def read_distributed_config(run: Run) -> DistributedConfig:
    """Return the content of `processes.json`; one process without that file.

    Raises:
        DamagedRun: the file can't be used.
    """
    path = run.path / _CONFIG_FILE
    if not os.path.lexists(path):
        return DistributedConfig()
    try:
        stored = contents.read_object(path, DistributedConfig)
    except DamagedRun:
        raise
    except UserError as error:  # values that don't fit each other
        raise DamagedRun(path, _("its values don't fit each other")) from error
    names = {field.name for field in fields(DistributedConfig)}
    return DistributedConfig(**{key: value for key, value in stored.items() if key in names})


def write_distributed_config(run: Run, config: DistributedConfig) -> None:
    write_json(run.path / _CONFIG_FILE, {"schema": SCHEMA, **asdict(config)})


def own_address(host: str) -> str:
    """Return this machine's address in the network that leads to `host`; nothing is sent."""
    try:
        family, *_rest, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise UserError(
            _("The rendezvous can't be reached: {error}."),
            host,
            _("Give the address of machine 0 in a network that all machines are in."),
            error=error.strerror or str(error),
        ) from error


def reachable_address(host: str, port: int, reached_as: str = "") -> str:
    """Return HOST:PORT of a server that listens on `host`; for 0.0.0.0, one of the network's.

    Args:
        reached_as: HOST or HOST:PORT, where it differs from `host`: in a container.
    """
    if not reached_as:
        if host in ("0.0.0.0", "::"):  # noqa: S104
            try:
                host = own_address("192.0.2.1")  # RFC 5737; nothing is sent
            except UserError:  # no network
                host = "127.0.0.1"
        reached_as = f"[{host}]" if ":" in host else host
    return reached_as if urlsplit(f"//{reached_as}").port else f"{reached_as}:{port}"


def stop_on_sigterm(run: Run) -> None:
    """Take a SIGTERM for the end of the machine or of a service: ask the run to stop.

    People stop a run by other means (`manager.stop`).
    """

    def handle(*_: Any) -> None:
        # Whatever the process does just now must go on. Without the request it is killed in the
        # end, which counts as a shutdown too.
        with suppress(UserError):
            run.request_stop(is_shutdown=True)

    signal.signal(signal.SIGTERM, handle)


def silence_libraries() -> None:
    """Turn off progress bars, which would fill log.txt."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


def explain_error(error: Exception, fix: Message) -> UserError:
    """Return the exception as an error for people; `fix` is for a fault of this program."""
    if isinstance(error, UserError):
        return error
    if is_out_of_memory(error):
        return UserError(_("Out of memory."), fix=OUT_OF_MEMORY_FIX)
    if is_disk_full(error):  # where a library writes
        return disk_full(Path(getattr(error, "filename", None) or cache_root()))
    text = f"{type(error).__name__}: {error}"
    return UserError(_("A fault in this program: {error}"), fix=fix, error=text)
