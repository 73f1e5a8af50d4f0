"""Several processes for one run: `python -m jetson_ft.runs.launcher RUN`, in the worker's place.

torch's elastic launcher starts this machine's processes and meets the other machines'. None is
started again: a run that lost one ends, and goes on from its last checkpoint when resumed.
The exit codes are the worker's.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import psutil

from jetson_ft.device.probe import usable_cores
from jetson_ft.errors import UserError
from jetson_ft.runs import ending, processes
from jetson_ft.runs.processes import Processes
from jetson_ft.runs.rundir import EventLog, Run

_MEETING_SECONDS = 900  # for the other machines to come


def main(run: Run) -> int:
    """Until all of this machine's processes have ended."""
    wanted = processes.of(run)
    threading.Thread(target=_leave_if_stopped, args=(run,), daemon=True).start()
    log = EventLog(run, run.state().attempt)
    if wanted.nnodes > 1:
        log.emit("phase", name="meeting", detail=f"{wanted.nnodes} machines, {wanted.rendezvous}")
    try:
        _launch(run, wanted)
    except Exception as error:
        traceback.print_exc()
        word = ending.last_word(run)
        # The launcher ends all when one is lost, which the first process takes for a stop.
        if word not in (None, ending.EXIT_STOPPED):
            return word
        said = explain(error, wanted)
        log.emit("error", what=said.what, where=said.where, fix=said.fix)
        return ending.EXIT_REFUSED
    return ending.last_word(run) or 0


def _launch(run: Run, wanted: Processes) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _prepare_environment(wanted)
    alone = {"rdzv_backend": "c10d", "rdzv_endpoint": "127.0.0.1:0"}
    meeting = {"rdzv_backend": "static", "rdzv_endpoint": wanted.rendezvous}
    config = LaunchConfig(
        min_nodes=wanted.nnodes,
        max_nodes=wanted.nnodes,
        nproc_per_node=wanted.nproc_per_node,
        run_id="jetson-ft" if wanted.nnodes > 1 else run.name,
        rdzv_configs={"rank": wanted.node_rank, "timeout": _MEETING_SECONDS},
        local_addr=processes.own_address(wanted.host),
        max_restarts=0,
        **(meeting if wanted.nnodes > 1 else alone),
    )
    elastic_launch(config, sys.executable)("-m", "jetson_ft.runs.worker", str(run.path))


def _prepare_environment(wanted: Processes) -> None:
    """For the processes: their share of the cores, and the network that leads to the others.

    Left alone, gloo takes the address that the machine's own name stands for, which on Debian
    and Ubuntu is one that no other machine can reach.
    """
    name = _interface(processes.own_address(wanted.host))
    if name:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
    cores = max(1, usable_cores() // wanted.nproc_per_node)
    os.environ.setdefault("OMP_NUM_THREADS", str(cores))


def _interface(address: str) -> str | None:
    for name, found in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address for one in found):
            return name
    return None


def _leave_if_stopped(run: Run) -> None:
    """Ends the wait for other machines when asked to; later the worker sees to it itself."""
    while not psutil.Process().children():
        if run.stop_requested():
            os._exit(ending.EXIT_STOPPED)
        threading.Event().wait(0.25)


def explain(error: Exception, wanted: Processes) -> UserError:
    """What the launcher says, for a person."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from jetson_ft.training.group import lost

    if isinstance(error, UserError):
        return error
    if isinstance(error, ChildFailedError):
        rank, failure = error.get_first_failure()
        here = f"machine {wanted.node_rank} ({socket.gethostname()})"
        return lost([f"{rank} on {here}"], _end_of(failure))
    return UserError(
        f"The {wanted.nnodes} machines did not come together: {error}",
        wanted.rendezvous or "",
        "Start `jetson-ft train` on every machine within a quarter of an hour, each with its own "
        "--node-rank; the address must be machine 0's and the port open.",
    )


def _end_of(failure: Any) -> str:
    code = failure.exitcode
    return f"ended by signal {-code}" if code < 0 else f"ended with code {code}; see log.txt"


if __name__ == "__main__":
    sys.exit(main(Run(Path(sys.argv[1]))))
