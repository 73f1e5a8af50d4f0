"""The Python API: `from jetson_ft import Recipe, finetune, load_chat`."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from workbench import LightRuns, wait_for

import jetson_ft
from jetson_ft import Recipe, finetune, load_chat
from jetson_ft.errors import UserError
from jetson_ft.inference.generate import Sampling
from jetson_ft.runs import store
from jetson_ft.runs.store import Run


def test_import_is_light_and_has_the_three_names() -> None:
    code = (
        "import sys, jetson_ft; "
        "print(*{'torch', 'pydantic', 'typer', 'rich', 'yaml'} & set(sys.modules));"
        "jetson_ft.Recipe, jetson_ft.finetune, jetson_ft.load_chat;"
        "print(*{'torch', 'gradio', 'typer', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        jetson_ft.nonsense  # type: ignore[attr-defined]  # noqa: B018


def test_supervised_run_is_returned_finished(light_runs: LightRuns) -> None:
    run = finetune(light_runs.recipe())
    assert run.state().state == "finished" and (run.path / "worked-1").exists()
    assert not run.is_locked("worker")


@pytest.mark.parametrize(
    ("label", "message"), [("refused", "No such file."), ("faulty", "RuntimeError: boom")]
)
def test_failed_run_raises_its_error(
    light_runs: LightRuns, tmp_path: Path, label: str, message: str
) -> None:
    recipe = tmp_path / f"{label}.yaml"
    recipe.write_text(light_runs.recipe().to_yaml())
    with pytest.raises(UserError, match=message):
        finetune(recipe)


def test_overrides_change_the_recipe_and_mistakes_are_refused(light_runs: LightRuns) -> None:
    run = finetune(light_runs.recipe(), overrides=["lora.rank=4"])
    assert run.recipe().lora.rank == 4
    with pytest.raises(UserError, match="unknown key"):
        finetune(light_runs.recipe(), overrides=["lora.rnak=4"])


def test_ctrl_c_stops_the_run_and_it_can_be_resumed_by_name(
    light_runs: LightRuns, tmp_path: Path
) -> None:
    recipe = tmp_path / "endless.yaml"
    recipe.write_text(light_runs.recipe().to_yaml())
    code = "import sys, jetson_ft; jetson_ft.finetune(sys.argv[1])"
    with subprocess.Popen([sys.executable, "-c", code, str(recipe)]) as process:
        run = wait_for(lambda: store.list_runs(light_runs.root))[0]
        light_runs.worker(run)
        process.send_signal(signal.SIGINT)
        process.wait(30)
    assert process.returncode == -signal.SIGINT and run.state().state == "stopped"

    def stop_second_attempt() -> None:
        wait_for((run.path / "worked-2").exists)
        run.request_stop()

    threading.Thread(target=stop_second_attempt).start()
    with pytest.raises(UserError, match=f"Run {run.name} was stopped."):
        finetune(resume=run.name, runs=light_runs.root)
    assert run.state().attempt == 2


@pytest.mark.parametrize("arguments", [{}, {"recipe": Recipe(), "resume": "x"}])
def test_recipe_and_resume_exclude_each_other(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="one of: a recipe, resume"):
        finetune(**arguments)


def test_foreground_run_trains_in_this_process_and_keeps_signal_handlers(
    finished: Run, tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGINT)
    recipe = finished.path / "recipe.yaml"
    run = finetune(recipe, overrides=[f"output_dir={tmp_path}"], foreground=True)
    assert signal.getsignal(signal.SIGINT) is before
    assert (run.adapter / "adapter_config.json").exists()
    mine, other = run.report(), finished.report()
    assert mine["train"]["steps"] == other["train"]["steps"]
    assert mine["eval"]["after"]["loss"] == pytest.approx(other["eval"]["after"]["loss"], rel=1e-3)


def test_load_chat_replies_with_the_runs_adapter(finished: Run) -> None:
    chat = load_chat(finished)
    assert chat.has_adapter
    assert "".join(chat.reply("你好", Sampling(max_new_tokens=3)))
    with pytest.raises(UserError):
        load_chat("nothing-here", runs=finished.path)
