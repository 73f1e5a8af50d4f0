"""The whole command: real processes, both files, and a failing arm among the others."""

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

from jetson_ft import cli
from jetson_ft.bench import run
from jetson_ft.bench.lesson import Lesson, Settings
from jetson_ft.console import bench_bar

ARMS = ["ours", "llamafactory"]


@pytest.mark.slow(minutes=1)
def test_bench_from_command_to_files(tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    failing = tmp_path / "python"
    failing.write_text('#!/bin/sh\ncase "$2" in *find_spec*) exit 0;; esac\nexit 7\n')
    failing.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-m", "jetson_ft.cli", "bench", "--model", str(tiny_llama),
         "--data", str(rows_file), "--rows", "16", "--rounds", "1", "--threads", "1",
         "--arms", ",".join(ARMS), "--llamafactory", str(failing), "--output", "out"],
        cwd=tmp_path, env={**os.environ, "COLUMNS": "200"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out" / "bench.json").read_text(encoding="utf-8"))
    assert set(report) == {
        "schema", "created", "versions", "device", "settings", "precision", "lesson", "arms",
        "skipped", "rounds", "rounds_done", "summary",
    }  # fmt: skip
    assert report["schema"] == 1
    assert report["lesson"]["steps"] == 2
    good, bad = report["rounds"]
    assert set(good) == {
        "round", "arm", "tokens", "seconds", "tokens_per_second", "peak_memory_bytes",
        "losses", "plan", "flops_per_token", "matmul_flops", "roof_share", "computed_tokens",
    }  # fmt: skip
    assert len(good["losses"]) == 2
    why = "RuntimeError: LLaMA-Factory ended with code 7; see log.txt"
    assert bad == {"round": 1, "arm": "llamafactory", "error": why}
    table = (tmp_path / "out" / "bench.md").read_text(encoding="utf-8")
    assert [line.split()[1] for line in table.splitlines() if line.startswith("| ")][2:] == ARMS
    assert f"- llamafactory: failed in 1 of 1 rounds: {why}" in table
    assert table in done.stdout


@pytest.fixture
def played(lesson: Lesson, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the arms whose processes were started; each measures its turn's number."""
    started: list[str] = []

    def child(name: str, *_: Any) -> dict[str, Any]:
        started.append(name)
        if len(started) == 4:
            raise KeyboardInterrupt
        return {
            "tokens_per_second": float(len(started)), "peak_memory_bytes": None,
            "losses": [1.0], "roof_share": 0.5,
        }  # fmt: skip

    monkeypatch.setattr(run, "_prepared", lambda settings: replace(lesson, settings=settings))
    monkeypatch.setattr(run, "_child", child)
    return started


def test_rounds_are_interleaved_and_what_was_measured_outlives_ctrl_c(
    played: list[str], settings: Settings, tmp_path: Path
) -> None:
    turns: list[run.Turn] = []
    given = replace(settings, arms=("trainer", "ours"), rounds=3)
    with pytest.raises(KeyboardInterrupt):
        run.bench(given, tmp_path / "out", turns.append)
    assert played == ["trainer", "ours", "trainer", "ours"]
    report = json.loads((tmp_path / "out" / "bench.json").read_text(encoding="utf-8"))
    assert [(one["round"], one["arm"]) for one in report["rounds"]] == [
        (1, "trainer"), (1, "ours"), (2, "trainer"),
    ]  # fmt: skip
    assert report["rounds_done"] == 1
    assert report["summary"][1]["ratios"]["trainer"] == 2.0
    ended = [turn.measured is not None for turn in turns]
    assert ended == [False, True, False, True, False, True, False]
    assert turns[0].seconds_left is None
    assert turns[2].seconds_left is not None


def test_the_bar_tells_each_arm_that_ended(capsys: pytest.CaptureFixture[str]) -> None:
    good = {"tokens_per_second": 1234.5, "peak_memory_bytes": 3 * 2**29}
    with bench_bar() as listener:
        listener(run.Turn(1, 2, 1, "ours", None))
        listener(run.Turn(1, 2, 1, "ours", None, good))
        listener(run.Turn(2, 2, 1, "trl", 90.0))
        listener(run.Turn(2, 2, 1, "trl", 90.0, {"error": "ValueError: [red]\x1b"}))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "round 1 ours 1,234 tokens/s, 1.50 GiB" in lines
    assert "round 1 trl failed: ValueError: [red]\\x1b" in lines


def test_the_process_beside_the_arms_stays_small() -> None:
    """Its memory would be missing to them."""
    code = (
        "import sys, jetson_ft.bench.run; "
        "print(*{'torch', 'transformers', 'peft', 'datasets', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_nothing_measured_is_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_failed(settings: Settings, output: Path, listener: Any) -> dict[str, Any]:
        found = {
            "settings": vars(settings) | {"data": "d"},
            "device": {"board": None, "name": "a CPU", "kind": "cpu"},
            "lesson": {"rows": 16, "steps": 2, "timed_tokens": 1234},
            "versions": {}, "precision": "fp32", "arms": {"ours": "…", "trl": "…"},
            "skipped": {"trl": "trl is not installed"},
            "rounds": [{"round": 1, "arm": "ours", "error": "crashed (signal 9)"}],
        }  # fmt: skip
        output.mkdir()
        run.write(output, found)
        return found

    monkeypatch.setattr(run, "bench", all_failed)
    done = CliRunner().invoke(cli.app, ["bench", "--output", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "- ours: failed in 1 of 1 rounds: crashed (signal 9)" in done.stdout
    assert "- trl: trl is not installed" in done.stdout
