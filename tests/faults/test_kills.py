"""Runs that are killed end as those that are not; `scripts/kill_runs.py` kills hundreds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "kill_runs.py"


@pytest.mark.slow(minutes=0.7)
@pytest.mark.promise(1)
@pytest.mark.promise(2)
@pytest.mark.promise(13)
def test_run_killed_five_times_ends_with_the_bytes_of_an_uninterrupted_one() -> None:
    command = [sys.executable, str(SCRIPT), "--kills", "5", "--per-run", "5", "--seed", "1"]
    options = ["--configuration", "dropout", "--phase", "training", "--phase", "checkpoint"]
    done = subprocess.run(
        [*command, *options, "--phase", "evaluation"], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "by outcome: finished, same bytes 5\n" in done.stdout
    hit = re.findall(r"^kill \d+: dropout, (\w+), (.+)$", done.stdout, re.MULTILINE)
    assert {"worker", "all"} <= {victim for victim, _phase in hit}
