"""The processes that train together: brought together by torch's launcher, or one alone.

Trainer and accelerate see one process each: they would wrap the model, and hang where processes
have different numbers of micro-batches. What a step needs of the others is little, and stands
here: a few numbers, and one sum over the adapter's gradients.

Messages travel over gloo. Gradients travel over NCCL where every process has it and a GPU, else
over gloo too (PyTorch for Jetson often comes without NCCL).
"""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

from jetson_ft.errors import UserError

# Seconds to wait for the others in training, where all of them are at the same step.
PATIENCE = 120.0
# The same before training, while one still fetches what another has.
_PATIENCE_LOADING = 1800.0
# For those who haven't noticed yet. The launcher ends a machine's processes after half a minute.
_ROLL_CALL_SECONDS = 20.0
_HERE = "jetson-ft-here-"  # and a process's number: it has noticed that one is gone

# What the launcher tells each process, and accelerate must not hear.
_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


class Group:
    """One process's view of all of them; made without arguments, of a process alone.

    Everything below but `leave` must be called by all processes, in the same order. Raises
    `UserError` naming the process that stopped answering.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1):
        self.rank, self.size = rank, size
        self.local_rank, self.local_size = local_rank, local_size
        self.hosts = [this_machine()]  # of each process
        self.backend = ""  # of the gradients
        self._loading: Any = None
        self._store: Any = None
        self._gradients: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes checkpoints, adapter and report."""
        return self.rank == 0

    @property
    def leads(self) -> bool:
        """Whether this process writes its machine's run directory."""
        return self.local_rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the processes, in fp64."""
        return self._sum(values, None)

    def most(self, count: int) -> int:
        """The largest of all processes' counts."""
        return int(max(self.sum([count * (rank == self.rank) for rank in range(self.size)])))

    def any(self, yes: bool) -> bool:
        """Whether one says yes; with the patience that loading needs."""
        return bool(self._sum([float(yes)], self._loading)[0])

    def wait(self) -> None:
        """Until all are here; with the same patience."""
        self.any(False)

    def _sum(self, values: Sequence[float], group: Any) -> list[float]:
        if self.size == 1:
            return list(values)
        import torch

        total = torch.tensor(values, dtype=torch.float64)
        with self._missing_told():
            torch.distributed.all_reduce(total, group=group)
        return [float(value) for value in total]

    def add_gradients(self, parameters: Sequence[Any]) -> None:
        """Makes each gradient the sum of all processes', in fp32; a missing one counts as zero."""
        if self.size == 1:
            return
        import torch

        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = self._flat(found)
        with self._missing_told():
            torch.distributed.all_reduce(flat, group=self._gradients)
        for parameter, part in _parts(flat, parameters):
            parameter.grad = part.to(parameter)

    def align(self, parameters: Sequence[Any]) -> None:
        """Gives the parameters the first process's values."""
        if self.size == 1:
            return
        import torch

        flat = self._flat(parameters)
        with self._missing_told():
            torch.distributed.broadcast(flat, 0, group=self._gradients)
        for parameter, part in _parts(flat, parameters):
            parameter.data.copy_(part)

    def _flat(self, tensors: Sequence[Any]) -> Any:
        import torch

        device = "cuda" if self.backend == "nccl" else "cpu"
        return torch.cat([tensor.detach().float().reshape(-1) for tensor in tensors]).to(device)

    def can_split(self, device: str) -> bool:
        """Whether a model could be split among the processes: gloo gathers in RAM alone."""
        return self.size > 1 and (device == "cpu" or self.backend == "nccl")

    def agree(self, facts: dict[str, Any]) -> None:
        """Refuses to train together where a fact differs.

        Raises:
            UserError: in every process alike.
        """
        everybodys = self.gather(facts)
        for rank, theirs in enumerate(everybodys):
            for key, value in everybodys[0].items():
                if theirs[key] != value:
                    raise UserError(
                        f"The machines must learn the same thing; {key} differs: "
                        f"{value!r} on {self.hosts[0]}, {theirs[key]!r} on {self.hosts[rank]}.",
                        key,
                        "Start every machine with the same recipe, model, rows and versions.",
                    )

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by its number; with the patience that loading needs."""
        if self.size == 1:
            return [value]
        import torch

        found: list[Any] = [None] * self.size
        with self._missing_told():
            torch.distributed.all_gather_object(found, value, group=self._loading)
        return found

    @contextmanager
    def copy_of_firsts(self, folder: Path | None) -> Iterator[Path | None]:
        """The first process's folder (of files); elsewhere a copy that is gone afterwards."""
        if self.size == 1:
            yield folder
            return
        import torch

        files = [_read_all(folder) if self.is_first and folder else None]
        with self._missing_told():
            torch.distributed.broadcast_object_list(files, 0, group=self._loading)
        with tempfile.TemporaryDirectory() if not self.is_first else nullcontext() as copy:
            if copy and files[0] is not None:
                folder = Path(copy)
                for name, content in files[0].items():
                    (folder / name).write_bytes(content)
            yield folder

    def leave(self) -> Group:
        """Ends the group; what goes on goes on alone."""
        if self.size > 1:
            import torch

            torch.distributed.destroy_process_group()
        return Group()

    @contextmanager
    def passes(self) -> Iterator[None]:
        """Around passes through a split model, where the others are needed too."""
        try:
            yield
        except RuntimeError as error:
            if self.size > 1 and ("gloo" in str(error) or "NCCL" in str(error)):
                raise self._missing(error) from error
            raise

    @contextmanager
    def _missing_told(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self._missing(error) from error

    def _missing(self, error: RuntimeError) -> UserError:
        """Calls the roll: who also noticed says so in the launcher's store, who is gone doesn't."""
        answers: list[list[int]] = []
        waiting = min(_ROLL_CALL_SECONDS, _patience())
        deadline = time.monotonic() + waiting
        # Beside us, as a store on a machine that is cut off keeps its callers without end.
        calling = threading.Thread(target=lambda: answers.append(self._silent(deadline)))
        calling.daemon = True
        calling.start()
        calling.join(waiting + 1)
        silent = answers[0] if answers else [0]
        return lost([f"{rank} on {self.hosts[rank]}" for rank in silent], str(error))

    def _silent(self, deadline: float) -> list[int]:
        try:
            self._store.set(f"{_HERE}{self.rank}", "")
            return [rank for rank in range(self.size) if not self._answers(rank, deadline)]
        except RuntimeError:  # the store is on machine 0
            return [0]

    def _answers(self, rank: int, deadline: float) -> bool:
        left = timedelta(seconds=max(0.1, deadline - time.monotonic()))
        try:
            self._store.wait([f"{_HERE}{rank}"], left)
        except RuntimeError:
            return False
        return True


def lost(whom: list[str], said: str) -> UserError:
    """The message for processes (`RANK on HOST`) that ended or fell silent."""
    what = f"Process {' and '.join(whom)} stopped answering" if whom else "A connection broke"
    return UserError(
        f"{what}; training has ended, the last checkpoint is kept.",
        said.splitlines()[0] if said else "",
        "Resume from the last checkpoint with `jetson-ft train --resume RUN` on every machine, or "
        "by one process alone with `--nnodes 1 --nproc-per-node 1` added.",
    )


def leads_its_machine() -> bool:
    """Whether this process is its machine's first, by the launcher's word, before `join`."""
    return os.environ.get("LOCAL_RANK", "0") == "0" or not is_launched()


def this_machine() -> str:
    """By its number among the machines, and its name: boards often have the same."""
    return f"machine {os.environ.get('GROUP_RANK', '0')} ({socket.gethostname()})"


def is_launched() -> bool:
    """Whether torch's launcher has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def join() -> Group:
    """Meets the processes that the launcher started; alone where it started none.

    Each process sees one GPU from now on: the one of its place on the machine.
    """
    if not is_launched():
        return Group()
    group = Group(*[int(os.environ.pop(name)) for name in _PLACE])
    if group.local_size > 1:
        _take_own_gpu(group)
    if group.size > 1:
        _connect(group)
    return group


def _take_own_gpu(group: Group) -> None:
    """Before CUDA is used for the first time."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",") if seen is not None else [str(n) for n in range(group.local_size)]
    own = names[group.local_rank : group.local_rank + 1]
    os.environ["CUDA_VISIBLE_DEVICES"] = "".join(own)


def _connect(group: Group) -> None:
    import torch
    from torch import distributed

    waiting, long = timedelta(seconds=_patience()), timedelta(seconds=_PATIENCE_LOADING)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        distributed.init_process_group(
            "gloo", rank=group.rank, world_size=group.size, timeout=waiting
        )
        group._store = distributed.TCPStore(address, port, is_master=False, timeout=waiting)
    except RuntimeError as error:
        raise UserError(
            f"The {group.size} processes could not connect: {str(error).splitlines()[0]}",
            f"{address}:{port}",
            "Let no firewall stand between the machines: gloo chooses its ports itself.",
        ) from error
    group.hosts = ["its machine"] * group.size  # until they have told
    with group._missing_told():
        group._loading = distributed.new_group(backend="gloo", timeout=long)
        has_nccl = torch.cuda.is_available() and distributed.is_nccl_available()
        told = group.gather((this_machine(), has_nccl))
        group.hosts = [host for host, _ in told]
        group.backend = "nccl" if all(has for _, has in told) else "gloo"
        group._gradients = distributed.new_group(backend=group.backend, timeout=waiting)


def _patience() -> float:
    return float(os.environ.get("JETSON_FT_PATIENCE", PATIENCE))


def _parts(flat: Any, parameters: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    pieces = flat.split([parameter.numel() for parameter in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        yield parameter, piece.view_as(parameter)


def _read_all(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
