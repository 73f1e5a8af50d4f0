"""The shared-prefix benchmark, on the tiny Llama."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "shared_prefix.py"


def test_loss_that_is_not_finite_makes_the_difference_unknown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rounds = [
        {
            "variant": variant, "round": 1, "tokens_per_second": 1.0, "peak_memory_bytes": None,
            "tokens": 8, "computed_tokens": 8, "losses": losses, "share_of_peak": 0.1,
            "plan": {"micro_batch_tokens": 8},
        }
        for variant, losses in (("ours-without-sharing", [1.0, 1.0]), ("ours", [1.0, None]))
    ]  # fmt: skip
    workload = {"timed_tokens": 8, "steps": 2, "rows": 16}
    runpy.run_path(str(SCRIPT))["show"](
        {"rounds": rounds, "workload": workload, "precision": "fp32"}
    )
    assert capsys.readouterr().out.endswith("losses differ by an unknown amount\n")


def test_failed_variant_of_a_script_ends_with_its_error() -> None:
    rounds = [{"variant": "ours", "round": 1, "error": "out of memory"}]
    for name, argument in (("shared_prefix", {"rounds": rounds}), ("phi_curve", rounds)):
        with pytest.raises(SystemExit, match="ours: out of memory"):
            runpy.run_path(str(SCRIPT.with_name(f"{name}.py")))["show"](argument)


@pytest.mark.slow(minutes=1)
def test_shared_prefix_is_computed_once(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(tiny_llama), "--rows", "16", "--rounds", "1", "--facts", "1",
               "--threads", "1", "--max-length", "400"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    assert [row[0] for row in rows[2:]] == ["ours-without-sharing", "ours"]
    assert rows[2][3] == "100%"
    assert float(rows[3][3].rstrip("%")) < 100
    assert float(lines[-1].split()[-2]) < 1e-3
