"""Checks of everything that training needs of a machine, each with the fix for what is missing.

`system` needs no torch; `compute` does. `finding` has the result of a check. The texts are in
English, marked for the catalogues of `i18n`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from jetson_ft.hardware.doctor import compute, system
from jetson_ft.hardware.doctor.finding import Finding, Machine

__all__ = ["Finding", "Machine", "as_json", "examine", "works"]


def examine(machine: Machine) -> Iterator[Finding]:
    """Yield the findings as they come: first the quick ones, then those that need torch."""
    yield from system.examine(machine)
    yield from compute.examine(machine)


def works(findings: Iterable[Finding]) -> bool:
    """Return whether training can work."""
    return all(finding.status != "failure" for finding in findings)


def as_json(findings: list[Finding]) -> dict[str, Any]:
    """Return what `doctor --json` prints."""
    checks = [finding.as_json() for finding in findings]
    return {"schema": 1, "works": works(findings), "checks": checks}
