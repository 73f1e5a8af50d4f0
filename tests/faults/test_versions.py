"""What earlier versions wrote is shown, resumed and chatted with: tests/versions/N, for ever.

`scripts/keep_version.py` makes the folder of the version in work.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from program import invoke, main_in_fork
from run_page import run_page
from typer.testing import CliRunner
from workbench import Workbench

from jetson_ft.cli.app import app
from jetson_ft.events import Step
from jetson_ft.runs.contents import SCHEMA
from jetson_ft.runs.store import Run
from jetson_ft.training import checkpoint
from jetson_ft.webui.fragments import Fragments

KEPT = Path(__file__).parents[1] / "versions"
VERSIONS = sorted(path.name for path in KEPT.iterdir())

pytestmark = pytest.mark.promise(67)


@pytest.fixture(params=VERSIONS)
def version(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Return a copy of a version's folder, which is the current one: its paths are relative."""
    folder = tmp_path / "version"
    shutil.copytree(KEPT / request.param, folder)
    monkeypatch.chdir(folder)
    return folder


def run_program(workbench: Workbench, folder: Path, *arguments: str) -> str:
    """Run the program in the folder to its end; return its output."""
    output = folder / "output"
    process = workbench.context.Process(
        target=main_in_fork, args=(list(arguments), str(output), str(folder))
    )
    process.start()
    process.join(60)
    text = output.read_text()
    assert process.exitcode == 0, text
    return text


def test_every_version_is_kept() -> None:
    assert {str(number) for number in range(1, SCHEMA + 1)} == set(VERSIONS)


def test_runs_are_listed_and_shown(version: Path) -> None:
    listed = invoke("runs", "list")
    for name in ("finished", "stopped"):
        assert any(line.split()[:2] == [name, name] for line in listed.splitlines()), listed
        assert f"/{name}: {name}" in invoke("runs", "show", name)


@pytest.mark.parametrize("language", ["en", "zh_CN"])
def test_runs_are_on_the_page(version: Path, language: str) -> None:
    fragments = Fragments(version / "runs")
    listed = fragments.run_list(language, "finished", ("stopped",))
    assert "damaged" not in listed and "损坏" not in listed
    for name in ("finished", "stopped"):
        assert f"标题 {name}" in listed
        page = run_page(fragments, language, name)
        assert f"标题 {name}" in page and 'class="plot"' in page
    assert "report.html" in run_page(fragments, language, "finished")


def test_stopped_run_is_resumed_to_its_end(workbench: Workbench, version: Path) -> None:
    run = Run(version / "runs" / "stopped")
    kept_step = max(
        checkpoint.step_of(path) for path in checkpoint.list_checkpoints(run.checkpoints)
    )
    output = run_program(workbench, version, "train", "--foreground", "--resume", "runs/stopped")
    assert run.state().state == "finished" and run.state().attempt == 2, output
    second = [
        event.step for event in run.events() if isinstance(event, Step) and event.attempt == 2
    ]
    assert second[0] == kept_step + 1  # from its checkpoint, not from the start
    other = Run(version / "runs" / "finished")
    assert run.report()["train"]["steps"] == other.report()["train"]["steps"] == second[-1]


def test_finished_run_is_made_longer(workbench: Workbench, version: Path) -> None:
    run = Run(version / "runs" / "finished")
    steps = run.report()["train"]["steps"]
    longer = "--resume", "runs/finished", "--set", "train.epochs=5"
    run_program(workbench, version, "train", "--foreground", *longer)
    assert run.state().state == "finished"
    assert run.report()["train"]["steps"] > steps


def test_adapter_is_chatted_with(version: Path) -> None:
    arguments = ["chat", "finished", "--max-new-tokens", "3"]
    result = CliRunner().invoke(app, arguments, input="/compare on\n1加1？\n/quit\n")
    assert result.exit_code == 0, result.output
    assert "error" not in result.output
    assert "tokens" in result.output
