"""Training repeats to the last digit: over micro-batches, over stops, and beside plain torch."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jetson_ft.errors import UserError
from jetson_ft.training import checkpoint
from jetson_ft.training.checkpoint import Progress

FAST = {"warmup_steps": 0, "learning_rate": 3e-2}
# Losses of six steps at that rate; random weights begin near ln 259 = 5.557.
PINNED = [5.568169, 5.350890, 5.329569, 5.296616, 5.202903, 5.210028]


def lora(model: Any) -> dict[str, Any]:
    return {
        name: value.detach().clone() for name, value in model.named_parameters() if "lora_" in name
    }


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    import torch

    return all(torch.equal(value, second[name]) for name, value in first.items())


def stop_at(step: int) -> Any:
    """A `stop_requested` that says yes from its `step`-th question on."""
    asked = iter(range(1, 10_000))
    return lambda: next(asked) >= step


@pytest.fixture(scope="module")
def nine_steps(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An uninterrupted epoch: (events, progress, adapter, folder of checkpoints)."""
    home = tmp_path_factory.mktemp("nine-steps")
    model = bench.model(dropout=0.1)
    progress = bench.fit(model, bench.job(home, eval_every=3))
    return list(bench.events), progress, lora(model), home


def test_losses_are_the_pinned_ones(bench: Any, tmp_path: Path) -> None:
    bench.fit(bench.model(), bench.job(tmp_path, max_steps=6, **FAST))
    assert bench.of("step", "loss") == pytest.approx(PINNED, abs=1e-4)


@pytest.mark.parametrize("capacity", [64, 4096])
def test_micro_batches_change_nothing(bench: Any, tmp_path: Path, capacity: int) -> None:
    bench.fit(bench.model(), bench.job(tmp_path, max_steps=6, capacity=capacity, **FAST))
    assert bench.of("step", "loss") == pytest.approx(PINNED, abs=1e-4)
    first = bench.of("step", "loss")
    bench.fit(bench.model(), bench.job(tmp_path / "again", max_steps=6, capacity=300, **FAST))
    assert bench.of("step", "loss") == pytest.approx(first, abs=1e-5)


def test_recomputing_activations_changes_nothing(bench: Any, tmp_path: Path) -> None:
    bench.fit(bench.model(), bench.job(tmp_path, max_steps=6, recompute=True, **FAST))
    assert bench.of("step", "loss") == pytest.approx(PINNED, abs=1e-4)


def test_a_micro_batch_leaves_nothing_in_memory_for_the_next(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where layers keep hold of their inputs past the backward pass, as bitsandbytes' int8."""
    import torch

    from jetson_ft.training import trainer

    class Input:
        pass

    class Holds(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, losses: torch.Tensor, held: Input) -> torch.Tensor:
            ctx.held = held
            return losses.clone()

        @staticmethod
        def backward(ctx: Any, d_losses: torch.Tensor) -> Any:
            return d_losses, None

    inputs: list[weakref.ref[Input]] = []
    token_losses = trainer.token_losses

    def watched(model: Any, pack: Any) -> torch.Tensor:
        assert all(one() is None for one in inputs)
        held = Input()
        inputs.append(weakref.ref(held))
        return Holds.apply(token_losses(model, pack), held)

    monkeypatch.setattr(trainer, "token_losses", watched)
    bench.fit(bench.model(), bench.job(tmp_path, max_steps=2, capacity=64, **FAST))
    assert len(inputs) > 4


def plain_gradients(model: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """transformers' own loss, row by row, as a mean over all learnt tokens."""
    import torch

    learnt = sum(sum(map(bool, row["parts"][1:])) for row in rows)
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        labels = torch.where(torch.tensor([row["parts"]]) > 0, ids, -100)
        loss = model(input_ids=ids, labels=labels).loss
        count = sum(map(bool, row["parts"][1:]))
        (loss * count / learnt).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_are_those_of_a_plain_loss(bench: Any, tmp_path: Path) -> None:
    import torch

    from jetson_ft.models import attention
    from jetson_ft.training.trainer import LoraTrainer

    model = bench.model()
    trainer = LoraTrainer(model, bench.job(tmp_path, capacity=128), Progress())
    with attention.packed(model):
        trainer.training_step(model, trainer.train_dataset[0])
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    rows = list(bench.rows.train.select(trainer.steps[0]))
    theirs = plain_gradients(model, rows)
    assert ours.keys() == theirs.keys() and len(rows) > 2
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-7)


def test_steps_are_made_in_the_planned_order(bench: Any, tmp_path: Path) -> None:
    from jetson_ft.training.schedule import plan_steps

    job = bench.job(tmp_path, epochs=2.0)
    bench.fit(bench.model(), job)
    planned = [
        int(job.train_tokens[step].sum()) for step in plan_steps(job.train_tokens, job.recipe)
    ]
    seen = bench.of("step", "tokens")
    assert [b - a for a, b in zip([0, *seen], seen, strict=False)] == planned


def test_counters_are_those_of_the_rows(bench: Any, nine_steps: Any) -> None:
    _, progress, _, _ = nine_steps
    train = bench.rows.train
    assert progress.rows == len(train)
    assert progress.tokens == sum(train["length"])
    assert progress.supervised_tokens == sum(train["supervised"])
    assert progress.step == progress.total_steps


def test_measures_before_on_schedule_and_at_the_end_and_never_twice(nine_steps: Any) -> None:
    events, progress, _, _ = nine_steps
    measured = [event["step"] for event in events if event["kind"] == "eval"]
    assert measured == sorted({0, 3, 6, 9, progress.total_steps})


@pytest.mark.parametrize("step", [1, 4, 6])
def test_stopped_and_resumed_equals_uninterrupted(
    bench: Any, nine_steps: Any, tmp_path: Path, step: int
) -> None:
    events, _, adapter, _ = nine_steps
    first = bench.fit(bench.model(0.1), bench.job(tmp_path, stop_at(step), eval_every=3))
    assert first.step == step and not first.complete
    model = bench.model(0.1)
    folder, faults = checkpoint.newest_intact(tmp_path)
    progress = bench.fit(model, bench.job(tmp_path, eval_every=3), folder)
    assert not faults and progress.complete
    assert same(lora(model), adapter)
    losses = [event["loss"] for event in events if event["kind"] == "step"]
    assert bench.of("step", "loss") == losses[step:]


def test_a_longer_run_goes_on_where_the_shorter_one_ended(bench: Any, tmp_path: Path) -> None:
    short = bench.fit(bench.model(), bench.job(tmp_path, epochs=1.0))
    folder = tmp_path / f"step-{short.step}"
    longer = bench.fit(bench.model(), bench.job(tmp_path, epochs=2.0), folder)
    assert longer.step == longer.total_steps > short.total_steps
    assert longer.rows == 2 * short.rows
    assert bench.of("step", "step")[0] == short.step + 1


def test_a_complete_run_makes_no_step_more(bench: Any, nine_steps: Any) -> None:
    _, progress, adapter, home = nine_steps
    model = bench.model(0.1)
    again = bench.fit(model, bench.job(home, eval_every=3), home / f"step-{progress.step}")
    assert again == progress and bench.events == []
    assert same(lora(model), adapter)


# --- max_minutes -------------------------------------------------------------------------


def test_minutes_become_steps_once_and_are_stored_at_once(bench: Any, tmp_path: Path) -> None:
    job = bench.job(tmp_path, stop_at(6), max_minutes=1e-4, epochs=50.0, eval_every=100)
    progress = bench.fit(bench.model(), job)
    assert bench.of("length", "step") == [5]
    assert progress.total_steps == bench.of("length", "total_steps")[0] < 50
    assert checkpoint.read_progress(tmp_path / "step-5").total_steps == progress.total_steps


def test_slow_first_steps_do_not_shorten_the_run(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jetson_ft.training.trainer import LoraTrainer

    real, seconds = LoraTrainer.take_stock, iter([1000.0, 30.0, 1.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr(
        LoraTrainer, "take_stock", lambda self: replace(real(self), seconds=next(seconds))
    )
    minutes = {"max_minutes": 20 / 60, "epochs": 50.0, "eval_every": 100}
    progress = bench.fit(bench.model(), bench.job(tmp_path, stop_at(6), **minutes))
    assert 15 <= progress.total_steps <= 25  # a second each


def test_settled_minutes_stay_settled_on_a_faster_machine(bench: Any, tmp_path: Path) -> None:
    minutes = {"max_minutes": 1e-4, "epochs": 50.0, "checkpoint_minutes": 1e-9}
    first = bench.fit(bench.model(), bench.job(tmp_path, stop_at(5), **minutes))
    quicker = Progress(**vars(first) | {"train_seconds": 1e-6})
    folder = checkpoint.write(tmp_path, quicker, copier(tmp_path / "step-5"))
    second = bench.fit(bench.model(), bench.job(tmp_path, **minutes), folder)
    assert second.total_steps == first.total_steps == second.step
    assert bench.of("length", "step") == []


def copier(source: Path) -> Any:
    """`save_files` that copies an existing checkpoint."""
    kept = {path.name: path.read_bytes() for path in source.iterdir()}

    def save(folder: Path) -> None:
        for name, content in kept.items():
            if name not in ("manifest.json", "progress.json"):
                (folder / name).write_bytes(content)

    return save


def test_more_minutes_on_a_slower_machine_cost_no_step(bench: Any, tmp_path: Path) -> None:
    minutes = {"max_minutes": 0.1, "epochs": 1.0}  # the rows end first, however slow it is here
    first = bench.fit(bench.model(), bench.job(tmp_path, stop_at(5), **minutes))
    slower = Progress(**vars(first) | {"train_seconds": 1e6})
    folder = checkpoint.write(tmp_path, slower, copier(tmp_path / "step-5"))
    job = bench.job(tmp_path, stop_at(1), **minutes | {"max_minutes": 0.2})
    assert bench.fit(bench.model(), job, folder).total_steps == first.total_steps > 6


def test_more_minutes_make_a_resumed_run_longer(bench: Any, tmp_path: Path) -> None:
    first = bench.fit(bench.model(), bench.job(tmp_path, max_minutes=1e-5, epochs=50.0))
    assert first.complete and first.step == 6
    folder = tmp_path / "step-6"
    second = bench.fit(bench.model(), bench.job(tmp_path, max_minutes=1.0, epochs=2.0), folder)
    assert second.step == second.total_steps > first.step


# --- what can go wrong -------------------------------------------------------------------


def poison(model: Any, step: int, act: Any) -> Any:
    """A `stop_requested` that never stops, but does `act` to the adapter after a step."""
    asked = iter(range(1, 10_000))
    chosen = next(value for name, value in model.named_parameters() if "lora_B" in name)

    def question() -> bool:
        if next(asked) == step:
            act(chosen)
        return False

    return question


def test_nan_loss_ends_the_run_and_keeps_the_last_checkpoint(bench: Any, tmp_path: Path) -> None:
    model = bench.model()
    spoil = poison(model, 5, lambda weight: weight.data.fill_(math.nan))
    with pytest.raises(UserError, match="The loss became infinite at step 6") as caught:
        bench.fit(model, bench.job(tmp_path, spoil, eval_every=4))
    assert "learning_rate=0.0025" in caught.value.fix
    assert checkpoint.newest_intact(tmp_path) == (tmp_path / "step-4", [])


def test_infinite_gradient_never_reaches_the_weights(bench: Any, tmp_path: Path) -> None:
    import torch

    model = bench.model()
    spoil = poison(model, 2, lambda weight: weight.register_hook(lambda grad: grad * math.inf))
    with pytest.raises(UserError, match="gradient became infinite at step 3"):
        bench.fit(model, bench.job(tmp_path, spoil, checkpoint_minutes=1e-9))
    assert all(torch.isfinite(value).all() for value in lora(model).values())
    assert checkpoint.newest_intact(tmp_path) == (tmp_path / "step-2", [])


def test_nan_on_heldout_rows_is_not_saved(bench: Any, tmp_path: Path) -> None:
    model = bench.model()
    spoil = poison(model, 3, lambda weight: weight.data.fill_(math.nan))
    with pytest.raises(UserError, match="held-out loss became infinite at step 3"):
        bench.fit(model, bench.job(tmp_path, spoil, eval_every=3))
    assert checkpoint.folders(tmp_path) == []


def test_stops_early_and_keeps_the_best(bench: Any, tmp_path: Path) -> None:
    job = bench.job(
        tmp_path, epochs=20.0, learning_rate=1.0, warmup_steps=2, eval_every=1, early_stopping=2,
        max_grad_norm=1e6,
    )  # fmt: skip
    progress = bench.fit(bench.model(), job)
    measured = dict(zip(bench.of("eval", "step"), bench.of("eval", "heldout_loss"), strict=True))
    measured.pop(0)
    assert progress.stopped_early and progress.complete
    assert progress.step == progress.best_step + 2 < progress.total_steps
    assert progress.best_loss == min(measured.values()) == measured[progress.best_step]
    assert checkpoint.fault(tmp_path / f"step-{progress.best_step}") is None


def test_checkpoints_by_the_clock_are_rotated(bench: Any, tmp_path: Path) -> None:
    progress = bench.fit(
        bench.model(),
        bench.job(tmp_path, checkpoint_minutes=1e-9, keep_checkpoints=3, eval_every=2, max_steps=7),
    )
    kept = [checkpoint.step_of(folder) for folder in checkpoint.folders(tmp_path)]
    assert kept == sorted({5, 6, 7, progress.best_step})
    assert bench.of("checkpoint", "step") == [1, 2, 3, 4, 5, 6, 7]


def test_a_checkpoint_is_a_plain_peft_adapter(bench: Any, nine_steps: Any) -> None:
    from peft import PeftModel

    _, progress, adapter, home = nine_steps
    base = bench.model().unload()
    loaded = PeftModel.from_pretrained(base, home / f"step-{progress.step}")
    assert same(lora(loaded), adapter)
