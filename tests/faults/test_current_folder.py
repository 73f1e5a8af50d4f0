"""A current folder with Python files beside a model, named as modules: none of them runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import program
import pytest

import jetson_ft
from jetson_ft.bench import runner
from jetson_ft.bench.workload import Settings
from jetson_ft.child_process import python_module
from jetson_ft.errors import UserError
from jetson_ft.runs import manager
from jetson_ft.runs.processes import DistributedConfig

NAMES = ("json", "jinja2", "torch", "random", "socket", "transformers", "jetson_ft")


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    return tmp_path / "ran"


@pytest.fixture
def hostile(tmp_path: Path, ran: Path) -> Path:
    """Return a folder whose files, when imported, add their names to the file `ran`."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.py").write_text(f"print({name!r}, file=open({str(ran)!r}, 'a'))\n")
    return folder


@pytest.mark.promise(24)
def test_template_is_rendered_without_modules_of_the_current_folder(
    hostile: Path, ran: Path, rows_file: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    arguments = ["data", "inspect", str(rows_file), "--model", str(tiny_llama)]
    output = tmp_path / "out"
    process = forked.context().Process(
        target=program.main_in_fork,
        args=([*arguments, "--chat-template", str(template)], str(output), str(hostile)),
    )
    process.start()
    process.join(60)
    assert not ran.exists(), ran.read_text()
    assert process.exitcode == 0, output.read_text()


@pytest.mark.promise(24)
@pytest.mark.parametrize("processes", [1, 2])
def test_run_imports_no_module_of_the_current_folder(
    hostile: Path, ran: Path, light_runs: Any, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    monkeypatch.chdir(hostile)
    config = DistributedConfig(nproc_per_node=processes)
    run = manager.launch(light_runs.recipe(), "plain", config)
    assert light_runs.wait(run, "finished", "failed", seconds=60.0) == "finished"
    assert not ran.exists(), ran.read_text()


@pytest.mark.promise(24)
def test_bench_imports_no_module_of_the_current_folder(
    hostile: Path, ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(hostile)
    refused = Settings("no-such-model", "x.jsonl", 16, 64, 4, 1, 1, ("ours",))
    with pytest.raises(UserError, match="Model not found") as caught:
        runner.bench(refused, tmp_path / "out", lambda _progress: None)
    assert str(caught.value.where) == "no-such-model"
    assert not ran.exists(), ran.read_text()


@pytest.mark.parametrize("safe", ["", "1"])
def test_module_runs_as_with_m(tmp_path: Path, safe: str) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "shown.py").write_text("import sys; print(__name__, sys.argv, sys.path)")
    (tmp_path / "shown.py").write_text("1 / 0")
    environment = {**os.environ, "PYTHONPATH": "site", "PYTHONSAFEPATH": safe}
    command = python_module("shown", "-x", "")
    printed = subprocess.check_output(command, cwd=tmp_path, env=environment, text=True)
    path = str(tmp_path / "site")
    assert printed.startswith(f"__main__ ['{path}/shown.py', '-x', ''] ['{path}', ")


@pytest.mark.promise(24)
def test_all_modules_are_started_by_the_one_command() -> None:
    package = Path(jetson_ft.__file__).parent
    starters = [
        path.name for path in package.rglob("*.py") if "executable" in path.read_text("utf-8")
    ]
    assert starters == ["child_process.py"], starters
    assert python_module("x")[0] == sys.executable
