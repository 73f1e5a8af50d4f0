"""`jetson-ft train`: exit codes, Ctrl-C, and training in the foreground."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from program import invoke, main_in_fork
from typer.testing import CliRunner
from workbench import LightRuns, Workbench, is_live, wait_for

from jetson_ft import recipe as recipes
from jetson_ft.cli.app import app
from jetson_ft.errors import UserError
from jetson_ft.hardware import doctor
from jetson_ft.runs import forecast, manager, store
from jetson_ft.runs.queue import running_run
from jetson_ft.runs.store import Run


def test_without_a_recipe_the_choice_and_how_to_change_it_are_printed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(manager.default_recipe, "__defaults__", (lambda: True, lambda: True))
    monkeypatch.setattr(forecast, "dry_run", Mock(side_effect=UserError("No.")))
    line, *_ = CliRunner().invoke(app, ["train", "--dry-run"]).output.splitlines()
    for words in ("phi-1_5-zh-quick", "a CUDA GPU and the hub in reach", "RECIPE=", "train NAME"):
        assert words in line


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (UserError("No.", "x", "Do."), "No."),
        (KeyError("y"), "A fault in this program: KeyError: 'y'"),
    ],
)
def test_dry_run_as_json_prints_its_error_as_json(
    error: Exception, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "dry_run", Mock(side_effect=error))
    done = CliRunner().invoke(app, ["train", "quickstart-zh", "--dry-run", "--json"])
    printed = json.loads(done.stdout)
    assert done.exception is error
    assert printed["schema"] == 1 and printed["error"]["what"] == what


@pytest.mark.parametrize(
    "command",
    [["train", "bad.yaml", "--dry-run"], ["train", "gone", "--dry-run"], ["plan", "gone"],
     ["plan", "quickstart-zh", "--device", "x"], ["data", "inspect", "gone.json"], ["doctor"],
     ["train", "quickstart-zh", "--dry-run", "--set", "lora.rank=0"]],
)  # fmt: skip
def test_error_of_a_command_with_json_is_the_only_output_and_is_json(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text("lora: {rank: 0}\n")
    monkeypatch.setattr(doctor, "examine", Mock(side_effect=UserError("No.")))
    done = CliRunner().invoke(app, [*command, "--json"])
    assert isinstance(done.exception, UserError)
    assert json.loads(done.stdout)["error"]["what"]


def test_chosen_recipe_is_printed_to_stderr_beside_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager.default_recipe, "__defaults__", (lambda: True, lambda: True))
    monkeypatch.setattr(forecast, "dry_run", Mock())
    monkeypatch.setattr(forecast.dry_run.return_value, "as_json", lambda: {"schema": 1})
    done = CliRunner().invoke(app, ["train", "--dry-run", "--json"])
    assert json.loads(done.stdout) == {"schema": 1}
    assert done.stderr.startswith("recipe: phi-1_5-zh-quick")


@pytest.mark.parametrize(
    ("options", "folder"),
    [([], "own"), (["--runs", "x"], "x"), (["--runs", "2026 #1"], "2026 #1"),
     (["--runs", "123"], "123"), (["--runs", "x", "--set", "output_dir=y"], "x"),
     (["--set", "output_dir=y"], "y")],
)  # fmt: skip
def test_new_run_is_in_the_folder_of_runs_or_else_in_output_dir(
    options: list[str], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("output_dir: own\n")
    launch = Mock(side_effect=UserError("No."))
    monkeypatch.setattr(manager, "launch", launch)
    CliRunner().invoke(app, ["train", "mine.yaml", *options])
    assert launch.call_args.args[0].output_dir == folder


@pytest.mark.promise(8)
def test_ctrl_c_stops_the_run_and_exits_with_130(light_runs: LightRuns, tmp_path: Path) -> None:
    recipe = tmp_path / "endless.yaml"
    recipe.write_text(light_runs.recipe().to_yaml())
    command = [sys.executable, "-m", "jetson_ft.cli", "train", str(recipe)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        run = wait_for(lambda: store.list_runs(light_runs.root))[0]
        light_runs.worker(run)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert output.startswith(f"run: {run.path}\n")
    assert "stopping: a checkpoint is being written" in output
    assert f"Continue with: jetson-ft train --resume {run.path}" in output
    assert run.state().state == "stopped"


def test_foreground_with_several_processes_is_refused_and_leaves_no_run(tmp_path: Path) -> None:
    options = ["--foreground", "--nproc-per-node", "2", "--set", f"output_dir={tmp_path / 'runs'}"]
    done = CliRunner().invoke(app, ["train", "quickstart-zh", *options])
    assert "--foreground trains with one process." in str(done.exception)
    assert not (tmp_path / "runs").exists()


class Foreground:
    """Starts `jetson-ft train --foreground` in forked processes."""

    def __init__(self, workbench: Workbench, folder: Path) -> None:
        self.context, self.root, self.output = workbench.context, folder / "runs", folder / "output"

    def start(self, *arguments: str) -> Any:
        process = self.context.Process(
            target=main_in_fork, args=(["train", "--foreground", *arguments], str(self.output))
        )
        process.start()
        return process

    def run(self) -> Run:
        return store.list_runs(self.root)[0]

    def has_trained(self) -> bool:
        return self.output.exists() and "step 1/" in self.output.read_text()


@pytest.mark.promise(8)
def test_foreground_run_stops_at_ctrl_c_and_resumes_to_its_end(
    workbench: Workbench, finished: Run, tmp_path: Path
) -> None:
    foreground = Foreground(workbench, tmp_path)
    recipe = str(finished.path / "recipe.yaml")
    more = ["--set", f"output_dir={foreground.root}", "--set", "train.epochs=3"]
    process = foreground.start(recipe, *more)
    wait_for(foreground.has_trained, 60.0)
    run = foreground.run()
    assert run.is_locked("worker") and run.is_locked("supervisor") and running_run() == run.path
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 130
    assert run.state().state == "stopped" and not is_live(run) and not running_run()
    assert list(run.checkpoints.glob("step-*/manifest.json"))
    lines = foreground.output.read_text().splitlines()
    assert lines[0] == f"run: {run.path}"
    assert lines[-1] == f"Continue with: jetson-ft train --resume {run.path}"

    process = foreground.start("--resume", str(run.path))
    process.join(60)
    assert process.exitcode == 0, foreground.output.read_text()
    assert run.state().state == "finished" and run.state().attempt == 2
    assert run.report()["train"]["steps"] == 3 * finished.report()["train"]["steps"]
    assert (run.adapter / "adapter_config.json").exists()
    assert "report.html" in invoke("runs", "show", run.path)


def test_foreground_run_that_fails_prints_the_error_and_exits_with_2(
    workbench: Workbench, finished: Run, tmp_path: Path
) -> None:
    foreground = Foreground(workbench, tmp_path)
    recipe = recipes.load_recipe(str(finished.path / "recipe.yaml"))
    recipe.train.max_memory_gb = 0.001
    (tmp_path / "bad.yaml").write_text(recipe.to_yaml())
    process = foreground.start(str(tmp_path / "bad.yaml"), "--set", f"output_dir={foreground.root}")
    process.join(60)
    assert process.exitcode == 2
    output = foreground.output.read_text()
    assert "error: " in output and "max_memory_gb" in output
    assert foreground.run().state().state == "failed"


@pytest.mark.parametrize("words", [[""], ["--fork", ""], ["--resume", ""]])
def test_empty_name_of_a_variable_that_is_not_set_trains_nothing(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["train", *words])
    assert isinstance(result.exception, UserError), result.exception
    assert not (tmp_path / "runs").exists()
