"""The worker process: its exit codes, its last events, its error messages."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from typing import Any

import pytest

from jetson_ft.errors import Message, UserError
from jetson_ft.events import Exited, Failed
from jetson_ft.runs import exit_status, processes, store, worker
from jetson_ft.runs.event_log import EventLog
from jetson_ft.runs.store import Run


def work(run: Run) -> int:
    """Run a worker without a supervisor; return its exit code."""
    command = [sys.executable, "-m", "jetson_ft.runs.worker", str(run.path)]
    return subprocess.run(command, capture_output=True, timeout=30).returncode


def last_events(run: Run) -> list[tuple[Any, ...]]:
    return [
        (e.kind, e.what if isinstance(e, Failed) else e.code)
        for e in run.events()
        if isinstance(e, Failed | Exited)
    ]


@pytest.mark.parametrize(
    ("label", "code", "events"),
    [
        ("plain", 0, [("exit", 0)]),
        ("refused", 2, [("error", "No such file."), ("exit", 2)]),
        ("faulty", 1, [("error", "A fault in this program: RuntimeError: boom"), ("exit", 1)]),
    ],
)
def test_exit_code_is_returned_and_is_the_last_event(
    queued: Any, label: str, code: int, events: list[Any]
) -> None:
    run = queued(label)
    assert work(run) == code
    assert last_events(run) == events


def test_request_to_stop_ends_the_worker_stopped(queued: Any) -> None:
    run = queued("endless")
    run.request_stop()
    assert work(run) == exit_status.EXIT_STOPPED


def test_interrupted_worker_continues(light_runs: Any) -> None:
    """The command that launched the run handles Ctrl-C."""
    import signal

    run = light_runs.launch("endless")
    process = light_runs.worker(run)
    os.kill(process, signal.SIGINT)
    with pytest.raises(AssertionError):
        light_runs.wait(run, *store.ENDED_STATES, seconds=0.5)


def test_failed_run_has_the_error_as_its_reason(light_runs: Any) -> None:
    run = light_runs.launch("refused")
    assert light_runs.wait(run, *store.ENDED_STATES) == "failed"
    assert run.state().reason == "No such file."
    assert "Traceback" in (run.path / "log.txt").read_text()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("NVML_SUCCESS == r INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp"),
        RuntimeError("NvMapMemAllocInternalTagged: 1075072515 error 12"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
)
def test_every_out_of_memory_error_has_the_same_message(error: Exception) -> None:
    explained = processes.explain_error(error, Message(""))
    assert str(explained.what) == "Out of memory."
    for setting in ("data.max_length", "lora.rank", "nf4"):
        assert setting in str(explained.fix)


def test_torchs_out_of_memory_error_is_recognized() -> None:
    import torch

    assert processes.is_out_of_memory(torch.OutOfMemoryError("x"))
    assert not processes.is_out_of_memory(RuntimeError("shapes differ"))


def test_user_error_is_not_changed() -> None:
    error = UserError("No such file.", "x", "y")
    assert processes.explain_error(error, Message("")) is error


def test_full_disk_drops_the_last_event_without_an_error(
    queued: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = EventLog(queued("x"), 1)

    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    worker._emit_last(log.emit, Exited(code=0))
