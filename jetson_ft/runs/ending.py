"""How a worker ended: its exit codes, and what they mean for the run's state."""

from __future__ import annotations

from typing import Any

from jetson_ft.runs.rundir import Run

EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED, EXIT_AGAIN = 1, 2, 3, 4
RESUMABLE = "resumable"  # how the reason of a run ends that was cut short


def of_code(run: Run, code: int) -> tuple[str, str]:
    """(state, reason) for a worker's exit code; below zero it is a signal's number."""
    if code == 0:
        return "finished", ""
    if code == EXIT_STOPPED:
        return "stopped", "stopped on request; resumable"
    if code < 0:
        return "failed", of_signal(-code)
    errors = _this_attempts(run, "error")
    return "failed", errors[-1]["what"] if errors else f"ended with code {code}; see log.txt"


def of_signal(number: int) -> str:
    """What a process died of."""
    hint = "; most likely the kernel ended it for want of memory" if number == 9 else ""
    return f"crashed (signal {number}){hint}"


def last_word(run: Run) -> int | None:
    """The exit code that this attempt's worker announced, if it came to that."""
    said = _this_attempts(run, "end")
    return int(said[-1]["code"]) if said else None


def unwatched(run: Run) -> tuple[str, str]:
    """(state, reason) where the supervisor is gone: by the worker's last word, if it had one."""
    said = last_word(run)
    if said is not None:
        return of_code(run, said)
    return "failed", "ended without a word (power cut, or killed); resumable"


def _this_attempts(run: Run, kind: str) -> list[dict[str, Any]]:
    attempt = run.state().attempt
    return [e for e in run.events() if e["kind"] == kind and e["attempt"] == attempt]
