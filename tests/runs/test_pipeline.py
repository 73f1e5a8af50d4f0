"""Whole runs on the tiny Phi, in processes that are killed, stopped and deceived."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from boards_in_folders import NANO, Folder

from jetson_ft.device.boards import find
from jetson_ft.errors import UserError
from jetson_ft.recipe import Recipe
from jetson_ft.runs import ending, pipeline, rundir
from jetson_ft.runs.rundir import EventLog, Run, Silence
from jetson_ft.training import checkpoint


def adapter_bytes(run: Run) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def losses(run: Run) -> list[float]:
    return [event["loss"] for event in run.events() if event["kind"] == "step"]


def errors(run: Run) -> list[str]:
    return [event["what"] for event in run.events() if event["kind"] == "error"]


def copy_of(run: Run, folder: Path) -> Run:
    """A run of the same past, to be spoilt."""
    return Run(Path(shutil.copytree(run.path, folder / run.name)))


def test_a_run_leaves_all_that_it_promises(finished: Run) -> None:
    names = {path.name for path in finished.path.iterdir()}
    assert names >= {
        "recipe.yaml", "state.json", "plan.json", "data.json", "events.jsonl", "log.txt",
        "checkpoints", "adapter", "report.json", "report.md", "report.html",
    }  # fmt: skip
    assert not [name for name in names if name.endswith(".tmp")]


def test_the_adapter_loads_with_plain_peft(finished: Run, tiny_phi: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_phi), finished.adapter
    )
    assert model.peft_config["default"].r == 2
    assert AutoTokenizer.from_pretrained(finished.adapter).chat_template


def test_the_same_run_twice_gives_the_same_bytes(workbench: Any, finished: Run) -> None:
    again = workbench.run("again")
    assert workbench.work(again) == 0
    assert adapter_bytes(again) == adapter_bytes(finished)


SLOW = pytest.mark.slow
KILLS = ["step-2", "eval-4", "step-7", "checkpoint-8", "best", "phase-comparison"]


@pytest.mark.parametrize(
    "kill_at", [pytest.param(at, marks=() if at == "step-7" else SLOW) for at in KILLS]
)
def test_killed_and_resumed_equals_uninterrupted(
    workbench: Any, finished: Run, kill_at: str
) -> None:
    run = workbench.run(kill_at)
    assert workbench.work(run, kill_at) == -signal.SIGKILL
    assert not (run.path / "report.json").exists()
    assert workbench.work(run) == 0
    assert adapter_bytes(run) == adapter_bytes(finished)
    assert losses(run) == losses(finished)


@pytest.mark.slow
def test_a_run_against_the_clock_resumes_alike_once_its_length_is_settled(workbench: Any) -> None:
    run = workbench.run("minutes", max_minutes=1e-2, epochs=30.0)
    assert workbench.work(run, "step-6") == -signal.SIGKILL
    twin = copy_of(run, workbench.root / "twins")
    (settled,) = [event for event in run.events() if event["kind"] == "length"]
    for one in (run, twin):
        assert workbench.work(one) == 0
        assert losses(one) == losses(run)
        assert checkpoint.step_of(checkpoint.folders(one.checkpoints)[-1]) == settled["total_steps"]
    assert adapter_bytes(run) == adapter_bytes(twin)


def test_a_longer_run_goes_on(workbench: Any, finished: Run, tmp_path: Path) -> None:
    from jetson_ft.paths import write_atomic

    run = copy_of(finished, tmp_path)
    recipe = run.recipe()
    recipe.train.epochs = 2.0
    write_atomic(run.path / "recipe.yaml", recipe.to_yaml())
    assert workbench.work(run) == 0
    made = [event["step"] for event in run.events() if event["kind"] == "step"]
    assert made == list(range(1, len(made) + 1)) and len(made) > len(losses(finished)) + 5
    report = json.loads((run.path / "report.json").read_text())
    assert report["train"]["steps"] == len(made)


def test_the_adapter_is_the_best_checkpoints(workbench: Any) -> None:
    from safetensors.torch import load_file

    run = workbench.run("best", learning_rate=0.5, eval_every=1, early_stopping=1)
    assert workbench.work(run) == 0
    report = json.loads((run.path / "report.json").read_text())["train"]
    assert report["stopped_early"] and report["best_step"] < report["steps"]
    best = load_file(run.checkpoints / f"step-{report['best_step']}" / "adapter_model.safetensors")
    exported = load_file(run.adapter / "adapter_model.safetensors")
    assert all((exported[name] == value).all() for name, value in best.items())


@pytest.mark.slow
def test_stopped_before_training_and_in_the_comparison(workbench: Any, finished: Run) -> None:
    run = workbench.run("stopped")
    run.request_stop()
    assert workbench.work(run) == ending.EXIT_STOPPED
    assert checkpoint.folders(run.checkpoints) == []
    run.clear_stop()
    assert workbench.work(run, "phase-comparison") == -signal.SIGKILL
    run.request_stop()
    assert workbench.work(run) == ending.EXIT_STOPPED
    run.clear_stop()
    assert workbench.work(run) == 0
    assert adapter_bytes(run) == adapter_bytes(finished)


@pytest.mark.parametrize("part", ["tokens", "replies"])
def test_a_stop_is_heeded_while_rows_are_measured_too(part: str, tmp_path: Path) -> None:
    run = rundir.create(Recipe(output=str(tmp_path)), "compared")
    pipe = pipeline.Pipeline(run, EventLog(run, 1), run.stop_requested)
    pipe._on_compared("before", part, 1, 4)
    told = [{"side": "before", "done": 1, "of": 4}] if part == "replies" else []
    assert [{key: event[key] for key in ("side", "done", "of")} for event in run.events()] == told
    run.request_stop()
    with pytest.raises(pipeline._Stopped):
        pipe._on_compared("before", part, 2, 4)


# --- the board beside it -------------------------------------------------------------------------


def test_a_boards_power_becomes_energy_in_the_report(workbench: Any, tmp_path: Path) -> None:
    """tegrastats is found on the PATH as on a board; it says 12.02 W, at first after a while."""
    said = f"sleep 1.5\necho '{NANO.line}'\nexec sleep 60"
    path = Folder(tmp_path / "board", NANO).program("tegrastats", said)
    run = workbench.run("metered")
    assert workbench.work(run, PATH=f"{path}{os.pathsep}{os.environ['PATH']}") == 0
    report = json.loads((run.path / "report.json").read_text())
    train, sensors = report["train"], report["sensors"]
    assert train["energy_joules"] == pytest.approx(12.02 * train["seconds"], rel=0.1, abs=0.7)
    spent = train["joules_per_token"] * train["tokens"]
    assert spent == pytest.approx(train["energy_joules"], abs=0.1)  # said to a tenth of a joule
    assert (sensors["source"], sensors["max_temperature"]) == ("tegrastats", 62.5)
    (*_, last) = [event for event in run.events() if event["kind"] == "sample"]
    assert (last["watts"], last["gpu_load"], last["step"]) == (12.02, 97.0, train["steps"])


# --- planned before it starts ---------------------------------------------------------------------


def test_the_plan_stands_before_training_with_its_predictions(
    workbench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = workbench.run("planned")

    def stop(*_: Any) -> None:
        raise pipeline._Stopped

    monkeypatch.setattr(pipeline.Pipeline, "_fit", stop)
    assert not pipeline.Pipeline(run, Silence(), lambda: False).finetune()
    plan = json.loads((run.path / "plan.json").read_text())
    assert plan["peak_memory_bytes"] == sum(plan["parts"].values()) > 0
    assert plan["seconds"] > 0 and plan["micro_batch_tokens"] > 0 and not plan["checkpointing"]


def test_what_cant_fit_is_refused_before_the_model_is_loaded(
    workbench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = find("orin-nano-4gb").device()
    monkeypatch.setattr(pipeline.probe, "probe", lambda: replace(board, memory_available=1000))
    monkeypatch.setattr(pipeline.probe, "measure_flops", lambda *_: 1e12)
    monkeypatch.setattr(pipeline.load, "load_model", None)
    with pytest.raises(UserError, match="needs about"):
        pipeline.Pipeline(workbench.run("large"), Silence(), lambda: False).finetune()


# --- what a resumed run must meet again --------------------------------------------------------


def refused(workbench: Any, run: Run) -> str:
    """The plain message a resumed run ends with."""
    assert workbench.work(run) == ending.EXIT_REFUSED
    return errors(run)[-1]


def test_changed_data_is_refused(workbench: Any, rows_file: Path, tmp_path: Path) -> None:
    mine = tmp_path / "rows.json"
    shutil.copy(rows_file, mine)
    run = workbench.run("data", rows=mine)
    assert workbench.work(run, "step-6") == -signal.SIGKILL
    rows = json.loads(mine.read_text())
    rows[3]["output"] += "！"
    mine.write_text(json.dumps(rows))
    assert "data has changed" in refused(workbench, run)
    shutil.copy(rows_file, mine)
    assert workbench.work(run) == 0, "with the old rows back it goes on"


@pytest.mark.parametrize(
    ("line", "edited", "difference"),
    [
        ("learning_rate: 0.01", "learning_rate: 0.02", "train.learning_rate: 0.01 -> 0.02"),
        ("rank: 2", "rank: 4", "lora.rank: 2 -> 4"),
    ],
)
def test_a_recipe_edited_in_the_folder_is_refused_before_the_model_loads(
    workbench: Any, finished: Run, tmp_path: Path, line: str, edited: str, difference: str
) -> None:
    run = copy_of(finished, tmp_path)
    text = (run.path / "recipe.yaml").read_text()
    assert text.count(line) == 1
    (run.path / "recipe.yaml").write_text(text.replace(line, edited))
    assert difference in refused(workbench, run)
    last = run.state().attempt
    assert "model" not in [e.get("name") for e in run.events() if e["attempt"] == last]


# --- damage ------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    workbench: Any, finished: Run
) -> None:
    run = workbench.run("damaged")
    assert workbench.work(run, "step-9") == -signal.SIGKILL
    newest = checkpoint.folders(run.checkpoints)[-1]
    assert checkpoint.step_of(newest) == 8
    flip(newest / "optimizer.safetensors")
    assert workbench.work(run) == 0
    (warning,) = [event["message"] for event in run.events() if event["kind"] == "warning"]
    assert str(newest / "optimizer.safetensors") in warning
    assert adapter_bytes(run) == adapter_bytes(finished)


@pytest.mark.slow
def test_a_damaged_best_one_is_said_and_the_last_step_taken(workbench: Any, tmp_path: Path) -> None:
    run = workbench.run("worse", learning_rate=0.5, eval_every=1, early_stopping=1)
    assert workbench.work(run, "phase-comparison") == -signal.SIGKILL
    last = checkpoint.folders(run.checkpoints)[-1]
    best = run.checkpoints / f"step-{checkpoint.read_progress(last).best_step}"
    flip(best / "adapter_model.safetensors")
    assert workbench.work(run) == 0
    (warning,) = [event["message"] for event in run.events() if event["kind"] == "warning"]
    assert str(best) in warning and "last step" in warning


def test_a_half_made_adapter_is_made_anew(workbench: Any, finished: Run, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path)
    (run.adapter / "adapter_model.safetensors").unlink()
    (run.path / ".adapter.tmp").mkdir()
    (run.path / ".adapter.tmp" / "stale").write_text("x")
    assert workbench.work(run) == 0
    assert adapter_bytes(run) == adapter_bytes(finished)
    assert not (run.adapter / "stale").exists() and not (run.path / ".adapter.tmp").exists()


def test_phases_tell_their_times(finished: Run) -> None:
    begun = [event["name"] for event in finished.events() if event["kind"] == "phase"]
    ended = [event["name"] for event in finished.events() if event["kind"] == "phase_end"]
    assert begun == ended == [
        "libraries", "device", "model files", "data", "plan", "model", "training", "comparison",
        "report",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_command_line_goes_on_after_a_kill(
    workbench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launcher, supervisor and worker as a person starts them; the worker killed half-way."""
    whole = workbench.run("whole", epochs=8.0)
    assert workbench.work(whole) == 0
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as many threads as the bench has: same bytes
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(whole.recipe().to_yaml().replace(str(workbench.root), str(tmp_path)))
    command = [sys.executable, "-m", "jetson_ft.cli", "train"]
    with subprocess.Popen([*command, str(recipe)], stderr=subprocess.PIPE, text=True) as launcher:
        run = wait_for(lambda: rundir.list_runs(tmp_path))[0]
        os.kill(wait_for_step(run, 6), signal.SIGKILL)
        said = launcher.stderr.read() if launcher.stderr else ""
    assert launcher.returncode == 2 and "crashed (signal 9)" in said
    done = subprocess.run(
        [*command, "--resume", str(run.path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert str(run.adapter) in done.stdout
    assert adapter_bytes(run) == adapter_bytes(whole)


def wait_for_step(run: Run, step: int) -> int:
    """The worker's process number, once it has made the step."""
    wait_for(lambda: len(losses(run)) >= step)
    for process in psutil.process_iter(["pid", "cmdline"]):
        command = process.info["cmdline"] or []
        if "jetson_ft.runs.worker" in command and str(run.path) in command:
            return int(process.info["pid"])
    raise AssertionError("no worker")


def wait_for(holds: Any) -> Any:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        found = holds()
        if found:
            return found
        time.sleep(0.005)
    raise AssertionError("it never came true")
