"""Training repeats to the last digit: over micro-batches, over stops, and beside plain torch."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from training_bench import field_values

from jetson_ft.training import checkpoint
from jetson_ft.training.state import TrainState

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
    """An uninterrupted epoch: (events, state, adapter, folder of checkpoints)."""
    home = tmp_path_factory.mktemp("nine-steps")
    model = bench.model(dropout=0.1)
    state = bench.train(model, bench.job(home, eval_every=3))
    return list(bench.events), state, lora(model), home


# Thirty steps in fp32 with weight decay and a rate of 1e-2, as transformers' Trainer made them with
# the same batches.
THIRTY = {
    "tiny_phi": [
        5.568169, 5.545822, 5.523832, 5.462849, 5.363318, 5.330677, 5.283073, 5.24112, 5.212686,
        5.189525, 5.201579, 5.165102, 5.164543, 5.151587, 5.168919, 5.137658, 5.125169, 5.135677,
        5.13196, 5.129478, 5.115074, 5.107073, 5.110256, 5.134747, 5.10001, 5.120532, 5.103076,
        5.112712, 5.114932, 5.091369,
    ],
    "tiny_llama": [
        5.570632, 5.516326, 5.510246, 5.433258, 5.365027, 5.338201, 5.3062, 5.281856, 5.309256,
        5.262068, 5.259522, 5.188028, 5.176999, 5.136405, 5.122408, 5.06705, 5.081311, 5.083039,
        5.06182, 5.01223, 5.032287, 5.020442, 5.020782, 5.008658, 5.002816, 4.999834, 4.992682,
        5.005451, 4.955947, 4.97018,
    ],
}  # fmt: skip


@pytest.mark.parametrize("capacity", [64, 4096])
@pytest.mark.parametrize("name", THIRTY)
def test_thirty_steps_have_the_losses_of_transformers_trainer(
    name: str, capacity: int, request: pytest.FixtureRequest, rows_file: Path, tmp_path: Path,
    make_bench: Any,
) -> None:  # fmt: skip
    bench = make_bench(request.getfixturevalue(name))
    job = bench.job(
        tmp_path, epochs=5.0, max_steps=30, capacity=capacity, eval_every=10, weight_decay=0.01
    )
    bench.train(bench.model(), job)
    # Other processors add in another order, and each step builds on the one before.
    assert bench.values("step", "loss") == pytest.approx(THIRTY[name], abs=1e-3)


def test_losses_are_the_pinned_ones(bench: Any, tmp_path: Path) -> None:
    bench.train(bench.model(), bench.job(tmp_path, max_steps=6, **FAST))
    assert bench.values("step", "loss") == pytest.approx(PINNED, abs=1e-4)


@pytest.mark.parametrize("capacity", [64, 4096])
def test_micro_batches_change_nothing(bench: Any, tmp_path: Path, capacity: int) -> None:
    bench.train(bench.model(), bench.job(tmp_path, max_steps=6, capacity=capacity, **FAST))
    assert bench.values("step", "loss") == pytest.approx(PINNED, abs=1e-4)
    first = bench.values("step", "loss")
    bench.train(bench.model(), bench.job(tmp_path / "again", max_steps=6, capacity=300, **FAST))
    assert bench.values("step", "loss") == pytest.approx(first, abs=1e-5)


def test_recomputing_activations_changes_nothing(bench: Any, tmp_path: Path) -> None:
    bench.train(bench.model(), bench.job(tmp_path, max_steps=6, recompute=True, **FAST))
    assert bench.values("step", "loss") == pytest.approx(PINNED, abs=1e-4)


def test_a_micro_batch_leaves_nothing_in_memory_for_the_next(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where layers keep hold of their inputs past the backward pass, as bitsandbytes' int8."""
    import torch

    from jetson_ft.training import loop

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
    token_losses = loop.token_losses

    def watched(model: Any, pack: Any) -> torch.Tensor:
        assert all(one() is None for one in inputs)
        held = Input()
        inputs.append(weakref.ref(held))
        return Holds.apply(token_losses(model, pack), held)

    monkeypatch.setattr(loop, "token_losses", watched)
    bench.train(bench.model(), bench.job(tmp_path, max_steps=2, capacity=64, **FAST))
    assert len(inputs) > 4


def plain_gradients(model: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """transformers' own loss, row by row, as a mean over all trained tokens."""
    import torch

    trained = sum(sum(map(bool, row["segments"][1:])) for row in rows)
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        labels = torch.where(torch.tensor([row["segments"]]) > 0, ids, -100)
        loss = model(input_ids=ids, labels=labels).loss
        count = sum(map(bool, row["segments"][1:]))
        (loss * count / trained).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_are_those_of_a_plain_loss(bench: Any, tmp_path: Path) -> None:
    import torch

    from jetson_ft.kernels import attention
    from jetson_ft.training import loop
    from jetson_ft.training.batches import StepBatches, plan_steps

    model, job = bench.model(), bench.job(tmp_path, capacity=128)
    steps = plan_steps(job.train_tokens, job.recipe)
    batch = StepBatches(job.train_rows, job.train_tokens, steps, 128)[0]
    with attention.use_packed_attention(model):
        loop.forward_backward(model.train(), batch, job, 1)
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    rows = list(bench.rows.train.select(steps[0]))
    theirs = plain_gradients(model, rows)
    assert ours.keys() == theirs.keys() and len(rows) > 2
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-7)


def test_steps_are_made_in_the_planned_order(bench: Any, tmp_path: Path) -> None:
    from jetson_ft.training.batches import plan_steps

    job = bench.job(tmp_path, epochs=2.0)
    bench.train(bench.model(), job)
    planned = [
        int(job.train_tokens[step].sum()) for step in plan_steps(job.train_tokens, job.recipe)
    ]
    seen = bench.values("step", "tokens")
    assert [b - a for a, b in zip([0, *seen], seen, strict=False)] == planned


def test_counters_are_those_of_the_rows(bench: Any, nine_steps: Any) -> None:
    _, state, _, _ = nine_steps
    train = bench.rows.train
    assert state.rows == len(train)
    assert state.tokens == sum(train["length"])
    assert state.supervised_tokens == sum(train["supervised"])
    assert state.step == state.total_steps


def test_measures_before_on_schedule_and_at_the_end_and_never_twice(nine_steps: Any) -> None:
    events, state, _, _ = nine_steps
    measured = field_values(events, "eval", "step")
    assert measured == sorted({0, 3, 6, 9, state.total_steps})


@pytest.mark.parametrize("step", [1, 4, 6, 9])
def test_stopped_and_resumed_equals_uninterrupted(
    bench: Any, nine_steps: Any, tmp_path: Path, step: int
) -> None:
    events, whole, adapter, _ = nine_steps
    first = bench.train(bench.model(0.1), bench.job(tmp_path, stop_at(step), eval_every=3))
    assert first.step == step and first.is_complete == (step == 9)
    assert not first.is_complete or first.evaluation_due
    model = bench.model(0.1)
    folder, faults = checkpoint.newest_intact(tmp_path)
    state = bench.train(model, bench.job(tmp_path, eval_every=3), folder)
    assert not faults and state.is_complete
    assert same(lora(model), adapter)
    losses = field_values(events, "step", "loss")
    assert bench.values("step", "loss") == losses[step:]
    # A held-out loss that was due when the stop came is measured on resume.
    assert bench.values("eval", "step") == [s for s in (3, 6, 9) if s >= step]
    assert (state.best_step, state.best_loss) == (whole.best_step, whole.best_loss)


def test_a_longer_run_goes_on_where_the_shorter_one_ended(bench: Any, tmp_path: Path) -> None:
    short = bench.train(bench.model(), bench.job(tmp_path, epochs=1.0))
    folder = tmp_path / f"step-{short.step}"
    longer = bench.train(bench.model(), bench.job(tmp_path, epochs=2.0), folder)
    assert longer.step == longer.total_steps > short.total_steps
    assert longer.rows == 2 * short.rows
    assert bench.values("step", "step")[0] == short.step + 1


def test_a_complete_run_makes_no_step_more(bench: Any, nine_steps: Any) -> None:
    _, state, adapter, home = nine_steps
    model = bench.model(0.1)
    again = bench.train(model, bench.job(home, eval_every=3), home / f"step-{state.step}")
    assert again == state and bench.events == []
    assert same(lora(model), adapter)


# --- LoRA+ ---


def test_lora_plus_moves_the_b_matrices_alone_and_in_proportion(bench: Any, tmp_path: Path) -> None:
    """AdamW's first step is the learning rate for every weight, whatever the gradient's size."""
    import torch

    moved = {}
    for ratio in (1.0, 4.0):
        model = bench.model()
        before = lora(model)
        home = tmp_path / str(ratio)
        bench.train(model, bench.job(home, max_steps=1, loraplus_lr_ratio=ratio, warmup_steps=0))
        moved[ratio] = {name: value - before[name] for name, value in lora(model).items()}
    for name, change in moved[1.0].items():
        if "lora_B" in name:
            norm = torch.linalg.vector_norm
            assert float(norm(moved[4.0][name]) / norm(change)) == pytest.approx(4.0, rel=1e-3)
        elif "lora_A" in name:
            assert float(moved[4.0][name].abs().max()) == float(change.abs().max())


def test_a_run_with_lora_plus_resumes_bitwise(bench: Any, tmp_path: Path) -> None:
    whole, resumed = bench.model(), bench.model()
    bench.train(whole, bench.job(tmp_path / "whole", loraplus_lr_ratio=4.0, max_steps=6))
    home = tmp_path / "resumed"
    bench.train(bench.model(), bench.job(home, stop_at(3), loraplus_lr_ratio=4.0, max_steps=6))
    bench.train(resumed, bench.job(home, loraplus_lr_ratio=4.0, max_steps=6), home / "step-3")
    assert same(lora(whole), lora(resumed))


# --- max_minutes -------------------------------------------------------------------------


def test_minutes_become_steps_once_and_are_stored_at_once(bench: Any, tmp_path: Path) -> None:
    job = bench.job(tmp_path, stop_at(6), max_minutes=1e-4, epochs=50.0, eval_every=100)
    state = bench.train(bench.model(), job)
    assert bench.values("total_steps", "step") == [5]
    assert state.total_steps == bench.values("total_steps", "total_steps")[0] < 50
    assert checkpoint.read_state(tmp_path / "step-5").total_steps == state.total_steps


def test_slow_first_steps_do_not_shorten_the_run(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jetson_ft.training import loop

    real, seconds = loop.reduce_stats, iter([10.0, 3.0, 1.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr(
        loop, "reduce_stats", lambda *given: replace(real(*given), seconds=next(seconds))
    )
    minutes = {"max_minutes": 40 / 60, "epochs": 50.0, "eval_every": 100}
    state = bench.train(bench.model(), bench.job(tmp_path, stop_at(6), **minutes))
    assert 25 <= state.total_steps <= 31  # 17 seconds are over, and the others take one each


def test_a_run_resumed_on_a_faster_machine_makes_more_steps(bench: Any, tmp_path: Path) -> None:
    minutes = {"max_minutes": 1e-4, "epochs": 50.0, "early_stopping_patience": None}
    first = bench.train(bench.model(), bench.job(tmp_path, stop_at(5), **minutes))
    quicker = TrainState(**vars(first) | {"train_seconds": -0.5})
    folder = checkpoint.write_checkpoint(tmp_path, quicker, copier(tmp_path / "step-5"))
    second = bench.train(bench.model(), bench.job(tmp_path, **minutes), folder)
    assert second.total_steps == second.step > 5
    assert bench.values("step", "total_steps")[-1] == second.step
    assert bench.values("total_steps", "step") == []


def copier(source: Path) -> Any:
    """`save_files` that copies an existing checkpoint."""
    kept = {path.name: path.read_bytes() for path in source.iterdir()}

    def save(folder: Path) -> None:
        for name, content in kept.items():
            if name not in ("manifest.json", checkpoint.STATE_FILE):
                (folder / name).write_bytes(content)

    return save


def test_a_run_over_its_minutes_ends_and_is_measured(bench: Any, tmp_path: Path) -> None:
    minutes = {"max_minutes": 0.1, "epochs": 1.0}
    first = bench.train(bench.model(), bench.job(tmp_path, stop_at(5), **minutes))
    slower = TrainState(**vars(first) | {"train_seconds": 1e6})
    folder = checkpoint.write_checkpoint(tmp_path, slower, copier(tmp_path / "step-5"))
    last = bench.train(bench.model(), bench.job(tmp_path, **minutes), folder)
    assert last.is_complete and last.step == last.evaluated_step == 5


def test_more_minutes_make_a_resumed_run_longer(bench: Any, tmp_path: Path) -> None:
    first = bench.train(bench.model(), bench.job(tmp_path, max_minutes=1e-5, epochs=50.0))
    assert first.is_complete and first.step == 5
    folder = tmp_path / "step-5"
    second = bench.train(bench.model(), bench.job(tmp_path, max_minutes=1.0, epochs=2.0), folder)
    assert second.step == second.total_steps > first.step


# --- what can go wrong -------------------------------------------------------------------


def test_stops_early_and_keeps_the_best(bench: Any, tmp_path: Path) -> None:
    job = bench.job(
        tmp_path, epochs=20.0, learning_rate=1.0, warmup_steps=2, eval_every=1,
        early_stopping_patience=2, max_grad_norm=1e6,
    )  # fmt: skip
    state = bench.train(bench.model(), job)
    measured = dict(
        zip(bench.values("eval", "step"), bench.values("eval", "heldout_loss"), strict=True)
    )
    measured.pop(0)
    assert state.stopped_early and state.is_complete
    assert state.step == state.best_step + 2 < state.total_steps
    assert state.best_loss == min(measured.values()) == measured[state.best_step]
    assert checkpoint.find_fault(tmp_path / f"step-{state.best_step}") is None


def test_checkpoints_by_the_clock_are_rotated(bench: Any, tmp_path: Path) -> None:
    state = bench.train(
        bench.model(),
        bench.job(tmp_path, save_minutes=1e-9, save_total_limit=3, eval_every=2, max_steps=7),
    )
    kept = [checkpoint.step_of(folder) for folder in checkpoint.list_checkpoints(tmp_path)]
    assert kept == sorted({5, 6, 7, state.best_step})
    assert bench.values("checkpoint", "step") == [1, 2, 3, 4, 5, 6, 7]


def test_a_checkpoint_is_a_plain_peft_adapter(bench: Any, nine_steps: Any) -> None:
    from peft import PeftModel

    _, state, adapter, home = nine_steps
    base = bench.model().unload()
    loaded = PeftModel.from_pretrained(base, home / f"step-{state.step}")
    assert same(lora(loaded), adapter)
