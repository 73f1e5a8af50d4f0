"""The picture of a benchmark."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "draw_bench.py"


@pytest.mark.parametrize("peak", [None, 2**31])
def test_unknown_memory_is_drawn_as_a_dash(peak: int | None) -> None:
    summary = [
        {"variant": "llamafactory", "tokens_per_second": 1.0, "peak_memory_bytes": None},
        {"variant": "ours", "tokens_per_second": 2.0, "peak_memory_bytes": peak},
    ]
    picture = runpy.run_path(str(SCRIPT))["picture"]({"summary": summary})
    assert picture.count(">–<") == (1 if peak else 2)
    assert (">2.00<" in picture) is bool(peak)
