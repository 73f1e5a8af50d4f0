"""A run that is cut short loses no step that was saved, and goes on as if nothing had happened."""

from __future__ import annotations

import math
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from workbench import Workbench

from jetson_ft.errors import UserError
from jetson_ft.events import Failed, Step
from jetson_ft.runs import exit_status
from jetson_ft.runs.store import Run
from jetson_ft.training import checkpoint
from jetson_ft.training.state import TrainState


def adapter_bytes(run: Run) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def losses(run: Run) -> list[float | None]:
    return [event.loss for event in run.events() if isinstance(event, Step)]


# --- killed while it trains --------------------------------------------------------------------


SLOW = pytest.mark.slow
KILLS = ["step-2", "eval-4", "step-7", "checkpoint-8", "best", "phase-comparison"]


@pytest.mark.promise(1)
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


# --- killed while it saves ---------------------------------------------------------------------


def save(home: Path, step: int) -> Path:
    """Write a checkpoint of two small files."""

    def two_files(folder: Path) -> None:
        (folder / "weights").write_bytes(b"w" * 5000)
        (folder / "optimizer").write_bytes(b"o" * 5000)

    return checkpoint.write_checkpoint(home, TrainState(step=step), two_files)


def listing(home: Path) -> list[str]:
    return sorted(path.name for path in home.iterdir())


@pytest.mark.promise(2)
def test_run_killed_while_it_saves_uses_the_checkpoint_before(
    workbench: Workbench, finished: Run
) -> None:
    """The kill comes when half of the second checkpoint's files are written."""
    run = workbench.run("half-saved")
    assert workbench.work(run, "step-7") == -signal.SIGKILL
    half = Path(shutil.copytree(run.checkpoints / "step-4", run.checkpoints / ".step-7.tmp"))
    (half / "manifest.json").unlink()
    assert workbench.work(run) == 0
    assert adapter_bytes(run) == adapter_bytes(finished)
    assert not list(run.checkpoints.glob(".*"))


def killed_at_line(number: int, work: Callable[[], Any]) -> bool:
    """Run `work` in a child that is killed before its `number`-th line; return whether it was."""
    child = os.fork()
    if child == 0:
        left = iter(range(number))

        def tracer(frame: Any, event: str, _: Any) -> Any:
            if not frame.f_code.co_filename.endswith("checkpoint.py"):
                return None
            if event == "line" and next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return tracer

        code = 1
        try:
            sys.settrace(tracer)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:  # whatever happens, this is no second test session
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0, "the work failed by itself"
    return os.WIFSIGNALED(status)


def save_and_rotate(home: Path, step: int) -> None:
    save(home, step)
    checkpoint.delete_old_checkpoints(home, 1, TrainState(step=step, best_step=1))


@pytest.mark.promise(2)
@pytest.mark.slow
def test_a_kill_at_any_line_of_a_save_loses_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the rotation after it; every place is tried, one process each."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a kill, unlike a power cut, needs none
    for step in (1, 2):
        save(tmp_path / "model", step)
    for line in range(1000):
        home = tmp_path / str(line)
        shutil.copytree(tmp_path / "model", home)
        killed = killed_at_line(line, lambda home=home: save_and_rotate(home, 3))  # type: ignore[misc]
        newest, faults = checkpoint.newest_intact(home)
        assert newest in (home / "step-2", home / "step-3") and faults == []
        assert checkpoint.find_fault(home / "step-1") is None, "the best one"
        assert not list(home.glob(".*"))
        if not killed:
            break
    assert line > 40 and listing(home) == ["step-1", "step-3"]


# --- a loss that is not finite -----------------------------------------------------------------


@pytest.mark.promise(10)
def test_run_whose_loss_is_not_finite_fails_with_what_to_try(
    tiny_phi: Path, rows_file: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_phi, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.final_layernorm.weight"][0] = math.inf
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    bench = Workbench(model, rows_file, tmp_path / "runs")
    run = bench.run("infinite")
    assert bench.work(run) == exit_status.EXIT_REFUSED
    (error,) = [event for event in run.events() if isinstance(event, Failed)]
    assert "is not finite at step 1" in error.what
    assert "train.learning_rate=0.0025" in error.fix and "bf16" in error.fix
    assert not run.adapter.exists()


def poison(model: Any, step: int, act: Any) -> Any:
    """Return a `stop_requested` that never stops, but does `act` to the adapter after a step."""
    asked = iter(range(1, 10_000))
    chosen = next(value for name, value in model.named_parameters() if "lora_B" in name)

    def question() -> bool:
        if next(asked) == step:
            act(chosen)
        return False

    return question


@pytest.mark.promise(10)
def test_nan_loss_ends_the_run_and_keeps_the_last_checkpoint(bench: Any, tmp_path: Path) -> None:
    model = bench.model()
    spoil = poison(model, 5, lambda weight: weight.data.fill_(math.nan))
    with pytest.raises(UserError, match="The loss is not finite at step 6") as caught:
        bench.train(model, bench.job(tmp_path, spoil, eval_every=4))
    assert "learning_rate=0.0025" in str(caught.value.fix)
    assert checkpoint.newest_intact(tmp_path) == (tmp_path / "step-4", [])


@pytest.mark.promise(10)
def test_infinite_gradient_never_reaches_the_weights(bench: Any, tmp_path: Path) -> None:
    import torch

    model = bench.model()
    spoil = poison(model, 2, lambda weight: weight.register_hook(lambda grad: grad * math.inf))
    with pytest.raises(UserError, match="gradient is not finite at step 3"):
        bench.train(model, bench.job(tmp_path, spoil, save_minutes=1e-9))
    assert all(
        torch.isfinite(value).all() for name, value in model.named_parameters() if "lora_" in name
    )
    assert checkpoint.newest_intact(tmp_path) == (tmp_path / "step-2", [])


@pytest.mark.promise(10)
def test_nan_on_heldout_rows_is_not_saved(bench: Any, tmp_path: Path) -> None:
    model = bench.model()
    spoil = poison(model, 3, lambda weight: weight.data.fill_(math.nan))
    with pytest.raises(UserError, match="held-out loss is not finite at step 3"):
        bench.train(model, bench.job(tmp_path, spoil, eval_every=3))
    assert checkpoint.list_checkpoints(tmp_path) == []
