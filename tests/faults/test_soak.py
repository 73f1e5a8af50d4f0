"""Runs leave nothing behind but their folders; `scripts/soak.py` starts hundreds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "soak.py"


@pytest.mark.slow(minutes=0.5)
def test_three_runs_from_the_page_leave_no_process_and_no_file() -> None:
    command = [sys.executable, str(SCRIPT), "--runs", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 runs: {'finished': 3}" in done.stdout
    assert "left: 0 processes, " in done.stdout
    assert " 0 files of runs, 0 temporary files" in done.stdout
