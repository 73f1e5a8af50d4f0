"""The processes that train together: started by torch's launcher, or one alone.

The ranks may have different numbers of micro-batches, with which DDP's and accelerate's hooks would
hang (docs/decisions/0011-a-loop-of-our-own.md). Numbers and objects travel over gloo, gradients
over NCCL where every process has it and a GPU (PyTorch for Jetson often comes without NCCL).
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
from functools import partial
from pathlib import Path
from typing import Any

from jetson_ft.errors import Message, UserError, _, joined

# Seconds to wait for other ranks in training, where all of them are at the same step.
_TIMEOUT_SECONDS = 120.0
# The same before training, while one may still fetch files that another has.
_LOADING_TIMEOUT_SECONDS = 1800.0
# For ranks that haven't detected the lost rank yet. torch's launcher ends a machine's processes
# after 30 s.
_LOST_RANK_SECONDS = 20.0
_ALIVE_KEY = "jetson-ft-alive-"  # + rank: set in torch's store by each rank that detected a loss

# The launcher's variables, removed from the environment so that accelerate and transformers don't
# set up process groups of their own.
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


class DistributedContext:
    """The process group of a run; without arguments, a single process.

    Every rank must call the methods that communicate in the same order. They raise `UserError`
    naming the rank that stopped answering.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1):
        self.rank, self.size = rank, size
        self.local_rank, self.local_size = local_rank, local_size
        self.hosts = [machine_label()]  # of each rank
        self.backend = ""  # that reduces the gradients: gloo, nccl
        self._loading_group: Any = None
        self._gradient_group: Any = None
        self._store: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this rank writes checkpoints, adapter and report."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """Whether this rank writes its machine's run directory."""
        return self.local_rank == 0

    def all_reduce_sum(self, values: Sequence[float], group: Any = None) -> list[float]:
        """Return the values summed over all ranks, in fp64."""
        if self.size == 1:
            return list(values)
        import torch

        total = torch.tensor(values, dtype=torch.float64)
        with self._lost_rank_errors():
            torch.distributed.all_reduce(total, group=group)
        return [float(value) for value in total]

    def all_reduce_max(self, count: int) -> int:
        """Return the largest of all ranks' counts."""
        return int(max(self.all_reduce_sum([count * (r == self.rank) for r in range(self.size)])))

    def any_rank(self, condition: bool) -> bool:
        """Return whether the condition holds on any rank; with the timeout of loading."""
        return bool(self.all_reduce_sum([float(condition)], self._loading_group)[0])

    def barrier(self) -> None:
        """Wait until all ranks are here; with the timeout of loading."""
        self.any_rank(False)

    def all_reduce_gradients(self, parameters: Sequence[Any]) -> None:
        """Sum each gradient over all ranks, in fp32; a missing one counts as zero."""
        if self.size == 1:
            return
        import torch

        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        for parameter, total in self._exchange(torch.distributed.all_reduce, parameters, grads):
            parameter.grad = total.to(parameter)

    def broadcast_parameters(self, parameters: Sequence[Any]) -> None:
        """Set the parameters to rank 0's values."""
        if self.size == 1:
            return
        import torch

        broadcast = partial(torch.distributed.broadcast, src=0)
        for parameter, value in self._exchange(broadcast, parameters, parameters):
            parameter.data.copy_(value)

    def _exchange(
        self, collective: Any, parameters: Sequence[Any], tensors: Sequence[Any]
    ) -> Iterator[tuple[Any, Any]]:
        """Yield each parameter with the collective's result for its tensor, in fp32."""
        import torch

        device = "cuda" if self.backend == "nccl" else "cpu"
        flat = torch.cat([tensor.detach().float().reshape(-1) for tensor in tensors]).to(device)
        with self._lost_rank_errors():
            collective(flat, group=self._gradient_group)
        parts = flat.split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            yield parameter, part.view_as(parameter)

    def can_shard(self, device: str) -> bool:
        """Return whether a model can be sharded among the ranks: gloo gathers in RAM alone."""
        return self.size > 1 and (device == "cpu" or self.backend == "nccl")

    def assert_same_on_all_ranks(self, values: dict[str, Any]) -> None:
        """Raise `UserError` on every rank where a value differs."""
        everywhere = self.gather(values)
        for rank, theirs in enumerate(everywhere):
            for key, value in everywhere[0].items():
                if theirs[key] != value:
                    raise UserError(
                        _("All machines must train the same run; {key} differs: {first!r} on "
                          "{first_host}, {other!r} on {other_host}."),
                        key,
                        _("Start every machine with the same recipe, model, rows and versions."),
                        key=key, first=value, first_host=self.hosts[0],
                        other=theirs[key], other_host=self.hosts[rank],
                    )  # fmt: skip

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in order; with the timeout of loading."""
        if self.size == 1:
            return [value]
        import torch

        values: list[Any] = [None] * self.size
        with self._lost_rank_errors():
            torch.distributed.all_gather_object(values, value, group=self._loading_group)
        return values

    @contextmanager
    def broadcast_directory(self, folder: Path | None) -> Iterator[Path | None]:
        """Give every rank rank 0's folder (of files); the copies are deleted afterwards."""
        if self.size == 1:
            yield folder
            return
        import torch

        files = None
        if self.is_main and folder:
            files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        box = [files]
        with self._lost_rank_errors():
            torch.distributed.broadcast_object_list(box, 0, group=self._loading_group)
        with tempfile.TemporaryDirectory() if not self.is_main else nullcontext() as copy:
            if copy and box[0] is not None:
                folder = Path(copy)
                for name, content in box[0].items():
                    (folder / name).write_bytes(content)
            yield folder

    def close(self) -> DistributedContext:
        """End the process group; return the context of this process alone."""
        if self.size > 1:
            import torch

            torch.distributed.destroy_process_group()
        return DistributedContext()

    @contextmanager
    def collective_errors(self) -> Iterator[None]:
        """Explain a lost rank during passes through a sharded model, which are collective too."""
        try:
            yield
        except RuntimeError as error:
            if self.size > 1 and ("gloo" in str(error) or "NCCL" in str(error)):
                raise self._lost_rank_error(error) from error
            raise

    @contextmanager
    def _lost_rank_errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self._lost_rank_error(error) from error

    def _lost_rank_error(self, error: RuntimeError) -> UserError:
        """Return which rank is lost: each rank that detected it sets a key in the launcher's store.

        torch's monitored_barrier names "rank 0" on all ranks but the first.
        """
        answers: list[list[int]] = []
        seconds = min(_LOST_RANK_SECONDS, _timeout())
        deadline = time.monotonic() + seconds
        # In a thread: a store on a machine that is cut off blocks its callers without end.
        thread = threading.Thread(
            target=lambda: answers.append(self._missing_ranks(deadline)), daemon=True
        )
        thread.start()
        thread.join(seconds + 1)
        silent = answers[0] if answers else [0]
        detail = str(error).partition("\n")[0]
        return lost_ranks_error([(rank, self.hosts[rank]) for rank in silent], detail)

    def _missing_ranks(self, deadline: float) -> list[int]:
        """Return the ranks that set no key until the deadline; rank 0 where the store is gone."""
        from torch.distributed import DistStoreError

        silent = []
        try:
            self._store.set(f"{_ALIVE_KEY}{self.rank}", "")
            for rank in range(self.size):
                left = timedelta(seconds=max(0.1, deadline - time.monotonic()))
                try:
                    self._store.wait([f"{_ALIVE_KEY}{rank}"], left)
                except DistStoreError:  # a timeout; a broken store raises DistNetworkError
                    silent.append(rank)
        except RuntimeError:  # rank 0's launcher hosts the store
            return [0]
        return silent


def lost_ranks_error(ranks: Sequence[tuple[int, str]], detail: str | Message) -> UserError:
    """Return the error for processes (rank, machine) that stopped answering; empty: not known.

    `detail` is torch's own message, or how the process ended.
    """
    names = [Message(_("{rank} on {host}"), {"rank": r, "host": host}) for r, host in ranks]
    return UserError(
        _("Process {processes} stopped answering; training has ended, the last checkpoint is kept.")
        if ranks
        else _("A connection broke; training has ended, the last checkpoint is kept."),
        detail,
        _("Resume from the last checkpoint with `jetson-ft train --resume RUN` on every machine, "
          "or by one process alone with `--nnodes 1 --nproc-per-node 1` added."),
        processes=joined(names, ", "),
    )  # fmt: skip


def is_local_main_process() -> bool:
    """Return whether this process is its machine's first, before `connect`."""
    return os.environ.get("LOCAL_RANK", "0") == "0" or not is_launched()


def machine_label() -> str:
    """Return this machine's number among the machines and its name: boards often share names."""
    return f"machine {os.environ.get('GROUP_RANK', '0')} ({socket.gethostname()})"


def is_launched() -> bool:
    """Return whether torch's launcher has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def connect() -> DistributedContext:
    """Join the processes that the launcher started; return the context of one alone without it.

    From now on each process sees one GPU: that of its rank on the machine.
    """
    if not is_launched():
        return DistributedContext()
    dist = DistributedContext(*[int(os.environ.pop(name)) for name in _RANK_VARIABLES])
    if dist.local_size > 1:  # before CUDA is used for the first time
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible is not None else map(str, range(dist.local_size))
        own = list(gpus)[dist.local_rank : dist.local_rank + 1]
        os.environ["CUDA_VISIBLE_DEVICES"] = "".join(own)
    if dist.size == 1:
        return dist
    import torch
    from torch import distributed

    short = timedelta(seconds=_timeout())
    long = timedelta(seconds=_LOADING_TIMEOUT_SECONDS)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        distributed.init_process_group("gloo", rank=dist.rank, world_size=dist.size, timeout=short)
        dist._store = distributed.TCPStore(address, port, is_master=False, timeout=short)
    except RuntimeError as error:
        raise UserError(
            _("The {count} processes could not connect: {reason}"),
            f"{address}:{port}",
            _("Allow all ports between the machines in their firewalls: gloo chooses its own."),
            count=dist.size, reason=str(error).splitlines()[0],
        ) from error  # fmt: skip
    dist.hosts = ["unknown machine"] * dist.size  # until they are gathered
    with dist._lost_rank_errors():
        dist._loading_group = distributed.new_group(backend="gloo", timeout=long)
        has_nccl = torch.cuda.is_available() and distributed.is_nccl_available()
        labels = dist.gather((machine_label(), has_nccl))
        dist.hosts = [host for host, _has in labels]
        dist.backend = "nccl" if all(has for _host, has in labels) else "gloo"
        dist._gradient_group = distributed.new_group(backend=dist.backend, timeout=short)
    return dist


def _timeout() -> float:
    return float(os.environ.get("JETSON_FT_DIST_TIMEOUT", _TIMEOUT_SECONDS))


def shard_layers(model: Any, dist: DistributedContext, device: str) -> None:
    """Leave this process its part of each decoder layer of a PEFT model, in place.

    torch's FSDP gathers a layer from all processes for as long as it is computed (Rajbhandari et
    al. 2020, ZeRO, stage 3): all ranks must make the same number of passes. The adapter stays
    whole in each process: its gradients are reduced, stored and exported as without sharding.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn import ModuleList

    count = model.config.num_hidden_layers
    stacks = (m for m in model.modules() if isinstance(m, ModuleList) and len(m) == count)
    layers = next(stacks, None)
    if layers is None:
        raise UserError(
            _("The layers of {model} can't be sharded among processes."),
            fix=_("Choose a model that fits into each machine's memory."),
            model=type(model.get_base_model()).__name__,
        )
    mesh = init_device_mesh(device, (dist.size,))
    for layer in layers:
        adapter = {parameter for parameter in layer.parameters() if parameter.requires_grad}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=adapter)
