"""The verdicts in docs/models.md: which architectures are packed, and why the others aren't."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jetson_ft.kernels.attention_trial import packing_obstacle

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- verdicts: made by scripts/document_packing.py -->\n", "<!-- end of verdicts -->"
PACKED = "packed"
_LONGEST_ROW = 300


def packing_verdict(model: Any) -> str:
    """Return `PACKED`, or why rows go one by one."""
    return str(packing_obstacle(model, _LONGEST_ROW) or PACKED)


def write_verdicts(version: str, verdicts: dict[str, str]) -> str:
    """Return the part of docs/models.md for the verdicts of transformers' version."""
    lines = [f"With transformers {version}:\n\n"]
    for verdict in sorted(set(verdicts.values()), key=lambda each: (each != PACKED, each)):
        kinds = sorted(kind for kind, own in verdicts.items() if own == verdict)
        lines.append(f"- {verdict}: {', '.join(f'`{kind}`' for kind in kinds)}\n")
    return "".join(lines)


def documented_verdicts() -> tuple[str, dict[str, str]]:
    """Return transformers' version and the verdicts by model type, as the page has them."""
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    head, *lines = rest.partition(END)[0].split("\n- ")
    verdicts = {}
    for line in lines:
        verdict, _, kinds = line.strip().rpartition(": ")
        verdicts |= {kind.strip("`"): verdict for kind in kinds.split(", ")}
    return head.strip().removeprefix("With transformers ").rstrip(":"), verdicts
