"""Several processes for one run: `python -m jetson_ft.runs.launcher RUN`, in the worker's place.

torch's elastic launcher starts this machine's processes and connects to the other machines'. A run
that loses a process ends; it can be resumed. The exit codes are the worker's. The launcher holds
`worker.lock` for its workers, which end with it.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from jetson_ft import logs
from jetson_ft.child_process import python_module
from jetson_ft.errors import Message, UserError, _
from jetson_ft.events import Failed, PhaseStarted
from jetson_ft.hardware.detect import usable_cores
from jetson_ft.runs import exit_status, oom
from jetson_ft.runs.event_log import EventLog
from jetson_ft.runs.processes import (
    LAUNCHER_PROCESS,
    DistributedConfig,
    own_address,
    read_distributed_config,
    stop_on_sigterm,
)
from jetson_ft.runs.store import Run, RunRemoved

_RENDEZVOUS_SECONDS = 900  # to wait for the other machines


def main(run: Run) -> int:
    """Run this machine's processes until all have ended; return the exit code."""
    config = read_distributed_config(run)
    stop_on_sigterm(run)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    kill_watch = oom.KillWatch()
    threading.Thread(target=_watch, args=(run, kill_watch), daemon=True).start()
    log = EventLog(run, run.state_or_derived().attempt)
    if config.nnodes > 1:
        detail = f"{config.nnodes} machines, {config.rendezvous}"
        log.emit(PhaseStarted(name="rendezvous", detail=detail))
    try:
        # In the main thread torch would replace the signal handlers, and end the workers itself.
        with ThreadPoolExecutor(1) as executor:
            executor.submit(_launch, run, config).result()
    except Exception as error:
        traceback.print_exc()
        if _is_killed(error) and kill_watch.saw_kill():
            log.emit(Failed(**oom.explain_oom(run, is_killed=True).as_json()))
            return exit_status.EXIT_FAILED
        code = exit_status.recorded_exit_code(run)
        # When a process is lost, torch ends the others; rank 0 records that as a stop.
        if code not in (None, exit_status.EXIT_STOPPED):
            return code
        log.emit(Failed(**explain_error(error, config).as_json()))
        return exit_status.EXIT_REFUSED
    return exit_status.recorded_exit_code(run) or 0


def _launch(run: Run, config: DistributedConfig) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    address, backend, name = "127.0.0.1:0", "c10d", run.name
    if config.nnodes > 1 and config.rendezvous:  # a resumed run on fewer machines keeps its address
        address, backend, name = config.rendezvous, "static", "jetson-ft"
    own = own_address(address.rpartition(":")[0].strip("[]"))
    _set_environment(config, own)
    os.environ[LAUNCHER_PROCESS] = str(os.getpid())
    launch_config = LaunchConfig(
        min_nodes=config.nnodes,
        max_nodes=config.nnodes,
        nproc_per_node=config.nproc_per_node,
        run_id=name,
        rdzv_backend=backend,
        rdzv_endpoint=address,
        rdzv_configs={"rank": config.node_rank, "timeout": _RENDEZVOUS_SECONDS},
        local_addr=own,
        max_restarts=0,
    )
    program, *arguments = python_module("jetson_ft.runs.worker", str(run.path))
    elastic_launch(launch_config, program)(*arguments)


def _set_environment(config: DistributedConfig, own: str) -> None:
    """Set the processes' share of the cores, and the network interface with the own address.

    By default gloo takes the address that the machine's own name resolves to, which on Debian
    and Ubuntu is one that no other machine can reach.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == own for entry in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
            break
    cores = max(1, usable_cores() // config.nproc_per_node)
    os.environ.setdefault("OMP_NUM_THREADS", str(cores))


def _watch(run: Run, kill_watch: oom.KillWatch) -> None:
    """Watch the memory; end the wait for other machines on request, which a worker obeys itself."""
    is_waiting = True  # for other machines, before the workers are started
    while True:
        is_waiting = is_waiting and not psutil.Process().children()
        try:
            if is_waiting and run.stop_requested():
                os._exit(exit_status.EXIT_STOPPED)
        except RunRemoved:
            os._exit(exit_status.EXIT_FAILED)
        kill_watch.update()
        time.sleep(0.25)


def _is_killed(error: Exception) -> bool:
    """Return whether torch's launcher reports a worker that ended by SIGKILL."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if not isinstance(error, ChildFailedError):
        return False
    return any(failure.exitcode == -signal.SIGKILL for failure in error.failures.values())


def explain_error(error: Exception, config: DistributedConfig) -> UserError:
    """Return the error of torch's launcher as an error for people."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from jetson_ft.training.distributed import lost_ranks_error

    if isinstance(error, UserError):
        return error
    if isinstance(error, ChildFailedError):
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        here = f"machine {config.node_rank} ({socket.gethostname()})"
        cause = Message(_("ended with code {code}; see log.txt"), {"code": code})
        if code < 0:
            cause = Message(_("ended by signal {signal}"), {"signal": -code})
        return lost_ranks_error([(rank, here)], cause)
    return UserError(
        _("The {count} machines could not connect to each other: {error}"),
        config.rendezvous or "",
        _(
            "Start `jetson-ft train` on every machine within a quarter of an hour, each with its "
            "own --node-rank; the address must be machine 0's and the port open."
        ),
        count=config.nnodes,
        error=str(error),
    )


if __name__ == "__main__":
    logs.ignore_write_errors()
    sys.exit(main(Run(Path(sys.argv[1]))))
