"""The worker process: how it ends, and what it says to a person about it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from typing import Any

import pytest

from jetson_ft.errors import UserError
from jetson_ft.runs import ending, rundir, worker
from jetson_ft.runs.rundir import EventLog, Run, lock


def work(run: Run) -> int:
    """A worker without a supervisor; its exit code."""
    command = [sys.executable, "-m", "jetson_ft.runs.worker", str(run.path)]
    return subprocess.run(command, capture_output=True, timeout=30).returncode


def last_words(run: Run) -> list[tuple[Any, ...]]:
    return [(e["kind"], e.get("what", e.get("code"))) for e in run.events()]


@pytest.mark.parametrize(
    ("label", "code", "words"),
    [
        ("plain", 0, [("end", 0)]),
        ("refused", 2, [("error", "No such file."), ("end", 2)]),
        ("faulty", 1, [("error", "A fault in this program: RuntimeError: boom"), ("end", 1)]),
    ],
)
def test_exit_code_and_last_words(queued: Any, label: str, code: int, words: list[Any]) -> None:
    run = queued(label)
    assert work(run) == code
    assert last_words(run) == words


def test_asked_to_stop_it_ends_stopped(queued: Any) -> None:
    run = queued("endless")
    run.request_stop()
    assert work(run) == ending.EXIT_STOPPED


def test_a_second_worker_gives_way(queued: Any) -> None:
    run = queued("plain")
    held = lock(run.path / "worker.lock")
    assert work(run) == ending.EXIT_FAILED
    assert held and not (run.path / "worked-1").exists()


def test_terminated_it_asks_itself_to_stop(shop: Any) -> None:
    import signal

    run = shop.launch("endless")
    os.kill(shop.worker(run), signal.SIGTERM)
    assert shop.wait(run, *rundir.ENDED) == "stopped"


def test_interrupted_it_goes_on(shop: Any) -> None:
    """Ctrl-C in the launcher's terminal is the launcher's to translate."""
    import signal

    run = shop.launch("endless")
    process = shop.worker(run)
    os.kill(process, signal.SIGINT)
    with pytest.raises(AssertionError):
        shop.wait(run, *rundir.ENDED, seconds=0.5)


def test_a_failed_run_says_why_in_its_state(shop: Any) -> None:
    run = shop.launch("refused")
    assert shop.wait(run, *rundir.ENDED) == "failed"
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
def test_every_form_of_too_little_memory_is_told_alike(error: Exception) -> None:
    plain = worker.explain(error)
    assert plain.what == "Out of memory."
    for setting in ("data.max_length", "lora.rank", "nf4"):
        assert setting in plain.fix


def test_torchs_own_error_is_one_of_them() -> None:
    import torch

    assert worker.is_out_of_memory(torch.OutOfMemoryError("x"))
    assert not worker.is_out_of_memory(RuntimeError("shapes differ"))


def test_a_plain_error_stays_itself() -> None:
    error = UserError("No such file.", "x", "y")
    assert worker.explain(error) is error


def test_a_full_disk_takes_no_last_word_and_changes_no_code(
    queued: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = EventLog(queued("x"), 1)

    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    worker._tell(log, "end", code=0)
