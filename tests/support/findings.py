"""Machines for the doctor, and access to its findings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from boards_in_folders import FakeMachine

from jetson_ft.hardware.doctor.finding import Finding, Machine


def machine(board: FakeMachine, **changes: Any) -> Machine:
    path = board.tegrastats() if board.board.model else ""
    return replace(Machine(board.root, path, board.root / "runs"), **changes)


def statuses(findings: Iterable[Finding]) -> dict[str, str]:
    """Return the status by key."""
    return {finding.key: finding.status for finding in findings}


def find(findings: Iterable[Finding], name: str) -> Finding:
    """Return the only finding of a check."""
    (finding,) = [finding for finding in findings if finding.name == name]
    return finding
