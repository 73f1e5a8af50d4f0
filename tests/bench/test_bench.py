"""The whole command: real processes, both files, and a failing variant among the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jetson_ft.bench import runner
from jetson_ft.bench.workload import BenchWorkload, Settings
from jetson_ft.cli.app import app
from jetson_ft.cli.bench import bench_bar

NAMES = ["ours", "llamafactory"]


@pytest.mark.slow(minutes=1)
def test_bench_command_writes_both_files(tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    failing = tmp_path / "python"
    failing.write_text('#!/bin/sh\ncase "$2" in *find_spec*) exit 0;; esac\nexit 7\n')
    failing.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-m", "jetson_ft.cli", "bench", "--model", str(tiny_llama),
         "--data", str(rows_file), "--rows", "16", "--rounds", "1", "--threads", "1",
         "--variants", ",".join(NAMES), "--llamafactory", str(failing), "--output", "out"],
        cwd=tmp_path, env={**os.environ, "COLUMNS": "200"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out" / "bench.json").read_text(encoding="utf-8"))
    assert set(report) == {
        "schema", "created", "versions", "device", "settings", "precision", "workload", "variants",
        "skipped", "rounds", "rounds_done", "summary",
    }  # fmt: skip
    assert report["schema"] == 1
    assert report["workload"]["steps"] == 2
    good, bad = report["rounds"]
    assert set(good) == {
        "round", "variant", "tokens", "seconds", "tokens_per_second", "peak_memory_bytes",
        "losses", "plan", "flops_per_token", "matmul_flops", "share_of_peak", "computed_tokens",
    }  # fmt: skip
    assert len(good["losses"]) == 2
    why = "RuntimeError: LLaMA-Factory ended with code 7; see log.txt"
    assert bad == {"round": 1, "variant": "llamafactory", "error": why}
    table = (tmp_path / "out" / "bench.md").read_text(encoding="utf-8")
    assert [line.split()[1] for line in table.splitlines() if line.startswith("| ")][2:] == NAMES
    assert f"- llamafactory: failed in 1 of 1 rounds: {why}" in table
    assert table in done.stdout


@pytest.fixture
def started(workload: BenchWorkload, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the variants started so far; each measures the number of its turn."""
    names: list[str] = []

    def run_process(name: str, *_: Any) -> dict[str, Any]:
        names.append(name)
        if len(names) == 4:
            raise KeyboardInterrupt
        return {
            "tokens_per_second": float(len(names)), "peak_memory_bytes": None,
            "losses": [1.0], "share_of_peak": 0.5,
        }  # fmt: skip

    monkeypatch.setattr(
        runner, "_prepare_workload", lambda settings: replace(workload, settings=settings)
    )
    monkeypatch.setattr(runner, "_run_process", run_process)
    return names


def test_interrupted_bench_keeps_interleaved_rounds(
    started: list[str], settings: Settings, tmp_path: Path
) -> None:
    turns: list[runner.VariantProgress] = []
    changed = replace(settings, variants=("trainer", "ours"), rounds=3)
    with pytest.raises(KeyboardInterrupt):
        runner.bench(changed, tmp_path / "out", turns.append)
    assert started == ["trainer", "ours", "trainer", "ours"]
    report = json.loads((tmp_path / "out" / "bench.json").read_text(encoding="utf-8"))
    assert [(one["round"], one["variant"]) for one in report["rounds"]] == [
        (1, "trainer"), (1, "ours"), (2, "trainer"),
    ]  # fmt: skip
    assert report["rounds_done"] == 1
    assert report["summary"][1]["ratios"]["trainer"] == 2.0
    ended = [turn.measured is not None for turn in turns]
    assert ended == [False, True, False, True, False, True, False]
    assert turns[0].seconds_left is None
    assert turns[2].seconds_left is not None


def test_bar_with_ended_variants_shows_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    good = {"tokens_per_second": 1234.5, "peak_memory_bytes": 3 * 2**29}
    with bench_bar() as on_progress:
        on_progress(runner.VariantProgress(1, 2, 1, "ours", None))
        on_progress(runner.VariantProgress(1, 2, 1, "ours", None, good))
        on_progress(runner.VariantProgress(2, 2, 1, "trl", 90.0))
        on_progress(
            runner.VariantProgress(2, 2, 1, "trl", 90.0, {"error": "ValueError: [red]\x1b"})
        )
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "round 1 ours 1,234 tokens/s, 1.50 GiB" in lines
    assert "round 1 trl failed: ValueError: [red]\\x1b" in lines


def test_runner_import_loads_no_heavy_library() -> None:
    """The variants couldn't use the memory."""
    code = (
        "import sys, jetson_ft.bench.runner; "
        "print(*{'torch', 'transformers', 'peft', 'datasets', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_all_variants_failed_exits_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_failed(settings: Settings, output: Path, on_progress: Any) -> dict[str, Any]:
        report: Any = {
            "settings": vars(settings) | {"data": "d"},
            "device": {"board": None, "name": "a CPU", "kind": "cpu"},
            "workload": {"rows": 16, "steps": 2, "timed_tokens": 1234},
            "versions": {}, "rounds_done": 1, "precision": "fp32",
            "variants": {"ours": "…", "trl": "…"},
            "skipped": {"trl": "trl is not installed"},
            "rounds": [{"round": 1, "variant": "ours", "error": "crashed (signal 9)"}],
        }  # fmt: skip
        output.mkdir()
        runner.write(output, report)
        return report

    monkeypatch.setattr(runner, "bench", all_failed)
    done = CliRunner().invoke(app, ["bench", "--output", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "- ours: failed in 1 of 1 rounds: crashed (signal 9)" in done.stdout
    assert "- trl: trl is not installed" in done.stdout
