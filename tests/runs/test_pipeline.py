"""Whole runs on the tiny Phi, in processes that are killed, stopped, and given changed files."""

from __future__ import annotations

import html
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
from boards_in_folders import NANO, FakeMachine
from safetensors.torch import load_file
from workbench import Workbench

from jetson_ft import files
from jetson_ft.errors import UserError
from jetson_ft.events import (
    Evaluated,
    Failed,
    Generated,
    PhaseEnded,
    PhaseStarted,
    Planned,
    Sensors,
    Step,
    TotalSteps,
    Warned,
    WeightsLoaded,
)
from jetson_ft.hardware.boards import find_board
from jetson_ft.models import catalog
from jetson_ft.recipe import Recipe
from jetson_ft.runs import exit_status, pipeline, store
from jetson_ft.runs.event_log import EventLog
from jetson_ft.runs.report import card
from jetson_ft.runs.store import Run
from jetson_ft.training import checkpoint
from jetson_ft.training.distributed import DistributedContext


def adapter_bytes(run: Run) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def losses(run: Run) -> list[float | None]:
    return [event.loss for event in run.events() if isinstance(event, Step)]


def errors(run: Run) -> list[str]:
    return [event.what for event in run.events() if isinstance(event, Failed)]


def copy_of(run: Run, folder: Path) -> Run:
    """Return a copy of the run, to be changed."""
    return Run(Path(shutil.copytree(run.path, folder / run.name)))


def test_finished_run_has_all_documented_files(finished: Run) -> None:
    names = {path.name for path in finished.path.iterdir()}
    assert names >= {
        "recipe.yaml", "state.json", "plan.json", "data.json", "events.jsonl", "log.txt",
        "checkpoints", "adapter", "report.json", "report.md", "report.html",
    }  # fmt: skip
    assert not [name for name in names if name.endswith(".tmp")]


def test_adapter_has_a_model_card(finished: Run) -> None:
    assert (finished.adapter / "README.md").read_text() == card.model_card(finished)


def test_share_of_adapted_parameters_is_an_event(finished: Run) -> None:
    (event,) = (event for event in finished.events() if isinstance(event, WeightsLoaded))
    trained = load_file(finished.adapter / "adapter_model.safetensors").values()
    assert event.adapter_parameters == sum(tensor.numel() for tensor in trained)
    assert event.adapted_share and 0.3 < event.adapted_share < 1
    assert event.quantized_share == 0


def test_adapter_loads_with_peft(finished: Run, tiny_phi: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_phi), finished.adapter
    )
    assert model.peft_config["default"].r == 2
    assert AutoTokenizer.from_pretrained(finished.adapter).chat_template


def test_same_run_twice_gives_the_same_bytes(workbench: Any, finished: Run) -> None:
    again = workbench.run("again")
    assert workbench.work(again) == 0
    assert adapter_bytes(again) == adapter_bytes(finished)


@pytest.mark.slow
def test_timed_run_resumes_and_ends_at_its_minutes(workbench: Any) -> None:
    run = workbench.run("minutes", max_minutes=0.05, epochs=500.0, eval_every=40)
    assert workbench.work(run, "step-6") == -signal.SIGKILL
    assert workbench.work(run) == 0
    assert len([event for event in run.events() if isinstance(event, TotalSteps)]) == 1
    steps = [event for event in run.events() if isinstance(event, Step)]
    last = checkpoint.list_checkpoints(run.checkpoints)[-1]
    state = checkpoint.read_state(last)
    assert steps[-1].step == steps[-1].total_steps == state.step == checkpoint.step_of(last)
    assert 2.4 < state.train_seconds < 3.6  # of 3; one more slow step is possible


def test_longer_run_continues(workbench: Any, finished: Run, tmp_path: Path) -> None:
    from jetson_ft.files import write_atomic

    run = copy_of(finished, tmp_path)
    recipe = run.recipe()
    recipe.train.epochs = 2.0
    write_atomic(run.path / "recipe.yaml", recipe.to_yaml())
    assert workbench.work(run) == 0
    made = [event.step for event in run.events() if isinstance(event, Step)]
    assert made == list(range(1, len(made) + 1)) and len(made) > len(losses(finished)) + 5
    report = json.loads((run.path / "report.json").read_text())
    assert report["train"]["steps"] == len(made)


def test_adapter_has_the_best_checkpoints_weights(workbench: Any) -> None:
    from safetensors.torch import load_file

    run = workbench.run("best", learning_rate=0.5, eval_every=1, early_stopping_patience=1)
    assert workbench.work(run) == 0
    report = json.loads((run.path / "report.json").read_text())["train"]
    assert report["stopped_early"] and report["best_step"] < report["steps"]
    best = load_file(run.checkpoints / f"step-{report['best_step']}" / "adapter_model.safetensors")
    exported = load_file(run.adapter / "adapter_model.safetensors")
    assert all((exported[name] == value).all() for name, value in best.items())


@pytest.mark.slow
def test_stop_before_training_and_in_the_comparison_is_obeyed(
    workbench: Any, finished: Run
) -> None:
    run = workbench.run("stopped")
    run.request_stop()
    assert workbench.work(run) == exit_status.EXIT_STOPPED
    assert checkpoint.list_checkpoints(run.checkpoints) == []
    run.clear_stop()
    assert workbench.work(run, "phase-comparison") == -signal.SIGKILL
    run.request_stop()
    assert workbench.work(run) == exit_status.EXIT_STOPPED
    run.clear_stop()
    assert workbench.work(run) == 0
    assert adapter_bytes(run) == adapter_bytes(finished)


@pytest.mark.parametrize("part", ["tokens", "replies", "probes"])
def test_stop_while_rows_are_measured_is_obeyed(part: str, tmp_path: Path) -> None:
    run = store.create_run(Recipe(output_dir=str(tmp_path)), "compared")
    pipe = pipeline.Pipeline(run, EventLog(run, 1).emit, run.stop_requested)
    pipe._on_compared("before", part, 1, 4)
    expected = [("before", part, 1, 4)] if part != "tokens" else []
    events = [event for event in run.events() if isinstance(event, Generated)]
    assert [(e.side, e.part, e.done, e.total) for e in events] == expected
    run.request_stop()
    with pytest.raises(pipeline._Stopped):
        pipe._on_compared("before", part, 2, 4)


class OneOfTwo(DistributedContext):
    """A rank of two, with the error that the other one reports."""

    def __init__(self, rank: int, other: UserError | None = None) -> None:
        super().__init__(rank, 2)
        self.other = other

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other]


def test_only_the_disk_with_the_checkpoints_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = store.create_run(Recipe(output_dir=str(tmp_path)), "pair")
    dims, full = catalog.KNOWN_DIMS["embedded"], files.disk_full(tmp_path)

    def require_space(dist: DistributedContext) -> None:
        emit = EventLog(run, 1).emit
        pipeline.Pipeline(run, emit, run.stop_requested, dist)._require_checkpoint_space(dims)

    with pytest.raises(files.DiskFull):
        require_space(OneOfTwo(1, full))
    require_space(OneOfTwo(0))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=0))
    require_space(OneOfTwo(1))
    with pytest.raises(files.DiskFull):
        require_space(OneOfTwo(0))


# --- a comparison that fails ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("CUDA out of memory. Tried to allocate 2.00 GiB", "Out of memory."),
     ("index out of range in self", "RuntimeError: index out of range in self")],
)  # fmt: skip
def test_report_without_the_comparison_is_written_if_that_fails(
    workbench: Any, finished: Run, fault: str, reason: str
) -> None:
    run = workbench.run("uncompared")
    assert workbench.work(run, FAULT_AT="generation", FAULT=fault) == 0
    report = run.report()
    assert report["eval"] is None and report["generation"] is None
    assert reason in report["comparison_error"]
    assert f"jetson-ft eval {run.name}" in report["comparison_error"]
    whole = finished.report()["train"]
    for key in ("steps", "tokens", "final_loss", "best_step"):
        assert report["train"][key] == whole[key]
    (warning,) = [event.message for event in run.events() if isinstance(event, Warned)]
    assert warning == report["comparison_error"]
    assert fault in (run.path / "log.txt").read_text()
    assert adapter_bytes(run) == adapter_bytes(finished)
    for name in ("report.md", "report.html"):
        assert reason in html.unescape((run.path / name).read_text())


# --- sensors -------------------------------------------------------------------------------------


def test_power_readings_give_energy_in_the_report(workbench: Any, tmp_path: Path) -> None:
    """A tegrastats on the PATH prints 12.02 W, the first time after 1.5 seconds."""
    script = f"sleep 1.5\necho '{NANO.line}'\nexec sleep 60"
    path = FakeMachine(tmp_path / "board", NANO).program("tegrastats", script)
    run = workbench.run("metered")
    environment = {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}
    # Long enough for another sample than the first, which may be read before the program has begun.
    assert workbench.work(run, **environment, ALL_PROBES="1") == 0
    report = json.loads((run.path / "report.json").read_text())
    train, sensors = report["train"], report["sensors"]
    assert train["energy_joules"] == pytest.approx(12.02 * train["seconds"], rel=0.1, abs=0.7)
    spent = train["joules_per_token"] * train["tokens"]
    assert spent == pytest.approx(train["energy_joules"], abs=0.1)  # rounded to a tenth of a joule
    assert (sensors["source"], sensors["max_temperature"]) == ("tegrastats", 62.5)
    (*_, last) = [event for event in run.events() if isinstance(event, Sensors)]
    assert (last.watts, last.gpu_load, last.step) == (12.02, 97.0, train["steps"])


# --- planned before it starts ---------------------------------------------------------------------


def test_plan_with_predictions_is_written_before_training(
    workbench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = workbench.run("planned")

    def stop(*_: Any) -> None:
        raise pipeline._Stopped

    monkeypatch.setattr("jetson_ft.training.loop.train", stop)
    assert not pipeline.Pipeline(run, lambda event: None, lambda: False).finetune()
    plan = json.loads((run.path / "plan.json").read_text())
    assert plan["peak_memory_bytes"] == sum(plan["parts"].values()) > 0
    assert plan["seconds"] > 0 and plan["micro_batch_tokens"] > 0 and not plan["checkpointing"]


def test_run_that_does_not_fit_is_refused_before_the_model_is_loaded(
    workbench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = find_board("orin-nano-4gb").device()
    monkeypatch.setattr(
        pipeline.detect, "detect_device", lambda: replace(board, memory_available=1000)
    )
    monkeypatch.setattr(pipeline.detect, "measure_flops", lambda *_: 1e12)
    # A process that has run many tests has more memory of its own than the run needs.
    monkeypatch.setattr(pipeline.memory, "with_own_memory", lambda device, _processes: device)
    monkeypatch.setattr(pipeline.loading, "load_model", None)
    with pytest.raises(UserError, match="needs about"):
        pipeline.Pipeline(workbench.run("large"), lambda event: None, lambda: False).finetune()


@pytest.fixture(scope="module")
def tiny_lfm2(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with convolutions beside attention."""
    import torch
    from tiny_architectures import tiny_config
    from transformers import AutoModelForCausalLM

    folder = Path(shutil.copytree(tiny_llama, tmp_path_factory.mktemp("models") / "lfm2"))
    config = tiny_config("lfm2")
    config.vocab_size = 259
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_model_whose_rows_cannot_be_packed_trains_row_by_row_after_a_warning(
    tiny_lfm2: Path, rows_file: Path, tmp_path: Path
) -> None:
    run = Workbench(tiny_lfm2, rows_file, tmp_path).run("row-by-row")
    assert Workbench(tiny_lfm2, rows_file, tmp_path).work(run, "step-2") == -signal.SIGKILL
    (warning,) = [event.message for event in run.events() if isinstance(event, Warned)]
    assert "one by one" in warning and "outside of attention" in warning
    (plan,) = [event for event in run.events() if isinstance(event, Planned)]
    assert not plan.packing and plan.micro_batch_tokens == 0
    assert losses(run)


# --- damage ------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.promise(4)
@pytest.mark.slow
def test_damaged_best_checkpoint_is_named_and_the_last_step_is_used(
    workbench: Any, tmp_path: Path
) -> None:
    run = workbench.run("worse", learning_rate=0.5, eval_every=1, early_stopping_patience=1)
    assert workbench.work(run, "phase-comparison") == -signal.SIGKILL
    last = checkpoint.list_checkpoints(run.checkpoints)[-1]
    best = run.checkpoints / f"step-{checkpoint.read_state(last).best_step}"
    flip(best / "adapter_model.safetensors")
    assert workbench.work(run) == 0
    (warning,) = [event.message for event in run.events() if isinstance(event, Warned)]
    assert str(best) in warning and "last step" in warning
    report = run.report()
    scores = {e.step: e.heldout_loss for e in run.events() if isinstance(e, Evaluated)}
    assert report["train"]["best_step"] == report["train"]["steps"]
    assert report["eval"]["after"]["loss"] == scores[report["train"]["steps"]]


def test_incomplete_adapter_is_written_again(workbench: Any, finished: Run, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path)
    (run.adapter / "adapter_model.safetensors").unlink()
    (run.path / ".adapter.tmp").mkdir()
    (run.path / ".adapter.tmp" / "stale").write_text("x")
    os.utime(run.path / ".adapter.tmp", (1, 1))
    assert workbench.work(run) == 0
    assert adapter_bytes(run) == adapter_bytes(finished)
    assert not (run.adapter / "stale").exists() and not (run.path / ".adapter.tmp").exists()


def test_each_phase_starts_and_ends(finished: Run) -> None:
    begun = [event.name for event in finished.events() if isinstance(event, PhaseStarted)]
    ended = [event.name for event in finished.events() if isinstance(event, PhaseEnded)]
    assert begun == ended == [
        "libraries", "device", "model files", "data", "plan", "model", "training", "comparison",
        "report",
    ]  # fmt: skip


@pytest.mark.slow
def test_command_line_resumes_after_a_kill(
    workbench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launcher, supervisor and worker as a person starts them; the worker is killed half-way."""
    whole = workbench.run("whole", epochs=8.0)
    assert workbench.work(whole) == 0
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as many threads as the bench has: same bytes
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(whole.recipe().to_yaml().replace(str(workbench.root), str(tmp_path)))
    command = [sys.executable, "-m", "jetson_ft.cli", "train"]
    with subprocess.Popen([*command, str(recipe)], stderr=subprocess.PIPE, text=True) as process:
        run = wait_for(lambda: store.list_runs(tmp_path))[0]
        os.kill(wait_for_step(run, 6), signal.SIGKILL)
        printed = process.stderr.read() if process.stderr else ""
    assert process.returncode == 2 and "crashed (signal 9)" in printed
    done = subprocess.run(
        [*command, "--resume", str(run.path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert str(run.adapter) in done.stdout
    assert adapter_bytes(run) == adapter_bytes(whole)


def wait_for_step(run: Run, step: int) -> int:
    """Return the worker's process number, once it has made the step."""
    wait_for(lambda: len(losses(run)) >= step)
    for process in psutil.process_iter(["pid", "cmdline"]):
        command = process.info["cmdline"] or []
        if "jetson_ft.runs.worker" in command and str(run.path) in command:
            return int(process.info["pid"])
    raise AssertionError("no worker")


def wait_for(condition: Any) -> Any:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.005)
    raise AssertionError("the condition never became true")
