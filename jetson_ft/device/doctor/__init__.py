"""Looks at everything that training needs of a machine, and says how to mend what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from jetson_ft.device.doctor import arithmetic, system
from jetson_ft.device.doctor.finding import Finding, Machine

__all__ = ["Finding", "Machine", "as_json", "examine", "works"]


def examine(machine: Machine) -> Iterator[Finding]:
    """One finding after the other, as they come: the quick ones first, then those with torch."""
    yield from system.examine(machine)
    yield from arithmetic.examine(machine)


def works(findings: Iterable[Finding]) -> bool:
    """Whether training would work."""
    return all(finding.status != "failure" for finding in findings)


def as_json(findings: list[Finding]) -> dict[str, Any]:
    """For programs and the page."""
    return {
        "schema": 1,
        "works": works(findings),
        "checks": [finding.as_json() for finding in findings],
    }
