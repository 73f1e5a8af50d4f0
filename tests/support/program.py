"""The command line as a real process."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from few_probes import answer_few_probes
from typer.testing import CliRunner

Done = subprocess.CompletedProcess[str]


def run(*arguments: str, cwd: Path, **environment: str) -> Done:
    """Run `jetson-ft` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "jetson_ft.cli", *arguments],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def invoke(*arguments: Any, exit_code: int = 0) -> str:
    """Run a command in this process; return what it printed."""
    from jetson_ft.cli.app import app

    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == exit_code, result.output
    return result.output


def main_here(*arguments: Any) -> Done:
    """Be the program in this process and in the current folder, without the wait for imports."""
    from jetson_ft import cli

    words = [str(argument) for argument in arguments]
    output, errors, code = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        patch.setattr(sys, "argv", ["jetson-ft", *words])
        patch.setenv("COLUMNS", "200")
        # The program turns bars off by a variable that `datasets` reads when it is imported, which
        # other tests of this process may have done.
        if bars := sys.modules.get("datasets.utils.tqdm"):
            patch.setattr(bars, "_hf_datasets_progress_bars_disabled", True)
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Done(words, code, output.getvalue(), errors.getvalue())


def assert_refused(done: Done, *words: str) -> None:
    """One message: what is wrong, where, and how to fix it."""
    assert done.returncode == 2, done.stdout + done.stderr
    first, *rest = done.stderr.strip().splitlines()
    assert first.startswith("error: "), done.stderr
    assert done.stderr.count("error: ") == 1
    assert any(line.startswith("  where: ") for line in rest)
    assert any(line.startswith("  fix: ") for line in rest)
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def main_in_fork(arguments: list[str], output: str, folder: str = ".") -> None:
    """Be the program in `folder`, in a process forked from one with the imports (`forked`)."""
    import torch

    from jetson_ft.cli import main

    torch.set_num_threads(1)
    answer_few_probes()
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["jetson-ft", *arguments]
    main()
