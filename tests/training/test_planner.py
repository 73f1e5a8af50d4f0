"""A plan fits where it is made for, and a prediction moves the way memory and time do."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jetson_ft.data import lengths
from jetson_ft.device.boards import BOARDS, find
from jetson_ft.device.probe import Device
from jetson_ft.errors import UserError
from jetson_ft.models.load import Weights
from jetson_ft.models.shapes import KNOWN, Shape
from jetson_ft.recipe import LoraRecipe, TrainRecipe
from jetson_ft.training import planner
from jetson_ft.training.memory import peak_memory_bytes, with_own
from jetson_ft.training.planner import Work

GIB = 2**30
CPU = Device("cpu", "a processor", None, 4, 16 * GIB, 8 * GIB, False, False)
NANO, NX = find("orin-nano-8gb").device(), find("orin-nx-16gb").device()
PHI = KNOWN["microsoft/phi-1_5"]
BF16 = Weights("bf16")


def work(
    shape: Shape = PHI,
    weights: Weights = BF16,
    longest: int = 1024,
    **settings: Any,
) -> Work:
    rows = lengths.KNOWN["llamafactory/alpaca_zh", "microsoft/phi-1_5"].cut(longest)
    lora = LoraRecipe(**settings.pop("lora", {}))
    train = TrainRecipe(**{"epochs": 1.0, "tokens_per_step": 6500, **settings})
    return Work(shape, weights, lora, train, rows, heldout_tokens=60 * rows.mean)


works = st.builds(
    work,
    shape=st.sampled_from(list(KNOWN.values())),
    weights=st.builds(
        Weights,
        st.sampled_from(["fp32", "bf16", "fp16"]),
        st.sampled_from(["none", "int8", "nf4"]),
        st.booleans(),
    ),
    longest=st.integers(16, 1082),
    lora=st.builds(
        lambda rank, dropout: {"rank": rank, "dropout": dropout},
        st.integers(1, 256),
        st.sampled_from([0.0, 0.1]),
    ),
    tokens_per_step=st.integers(1, 20_000),
)
devices = st.builds(
    lambda device, free: replace(device, memory_available=free),
    st.sampled_from([CPU, NANO, replace(NX, integrated=False)]),
    st.integers(1, 80 * GIB),
)


def peak(one: Work, device: Device, tokens: int = 1024, checkpointing: bool = False) -> int:
    return sum(planner.memory(one, device, tokens, checkpointing).values())


# Memory


@given(works, devices, st.integers(2, 8))
def test_split_layers_take_no_more_than_whole_ones(one: Work, device: Device, shards: int) -> None:
    one = replace(one, weights=replace(one.weights, quantize="none"))
    split = replace(one, shards=shards)
    rounding = 6  # bytes: each part is rounded up
    assert peak(split, device) <= peak(one, device) + rounding
    assert peak(replace(split, shards=shards + 1), device) <= peak(split, device) + rounding


def test_a_split_model_is_loaded_whole_first() -> None:
    whole, split = work(longest=16), work(longest=16)
    split = replace(split, shards=1000)
    weights = planner.weight_bytes(PHI, BF16)
    parts = planner.memory(split, NX, 16, checkpointing=True)
    assert sum(parts.values()) - parts["process"] - parts["context"] >= weights
    assert peak(split, NX, 16, True) < peak(whole, NX, 16, True)


@pytest.mark.parametrize(
    ("weights", "gib"),
    [
        (Weights("bf16"), 2.64), (Weights("fp32"), 5.28), (Weights("bf16", "int8"), 1.52),
        (Weights("bf16", "nf4", False), 1.02), (Weights("bf16", "nf4", True), 0.97),
    ],
)  # fmt: skip
def test_phis_weights_take_what_is_known_of_each_format(weights: Weights, gib: float) -> None:
    assert planner.weight_bytes(PHI, weights) / GIB == pytest.approx(gib, abs=0.006)


@pytest.mark.parametrize(
    ("model", "quantize"),
    [("tiny_llama", "none"), ("wide_phi", "none"), ("wide_phi", "int8"), ("wide_phi", "nf4")],
)
def test_weights_take_what_a_loaded_model_takes(
    model: str, quantize: str, request: pytest.FixtureRequest
) -> None:
    from jetson_ft.models import load, shapes
    from jetson_ft.models.resolve import Base

    base = Base(model, request.getfixturevalue(model))
    weights = Weights("bf16", quantize, double_quantize=False)
    loaded = sum(load.bytes_per_part(load.load_model(base, weights, "cpu")).values())
    assert planner.weight_bytes(shapes.of(base), weights) == pytest.approx(loaded, rel=0.01)


def test_phi_keeps_what_was_counted_of_a_token() -> None:
    per_token = PHI.layers * planner.layer_bytes(work(), 2) / 2**20
    assert per_token == pytest.approx(0.94, abs=0.01)
    dropped = PHI.layers * planner.layer_bytes(work(lora={"dropout": 0.05}), 2) / 2**20
    assert dropped - per_token == pytest.approx(1.7, abs=0.05)


def test_smollm2_keeps_what_a_step_was_seen_to_keep() -> None:
    one = work(KNOWN["embedded"], weights=Weights("fp32"))
    per_token = one.shape.layers * planner.layer_bytes(one, 1) / 2**20
    assert per_token == pytest.approx(0.68, abs=0.01)
    int8 = replace(one, weights=Weights("fp32", "int8"))
    assert planner.layer_bytes(int8, 1) == planner.layer_bytes(one, 1) + 4 * (2 * 576 + 1536)
    # bitsandbytes holds its inputs whatever is recomputed; attention's result is one of them.
    parts = [planner.memory(x, CPU, 512, checkpointing=True)["activations"] for x in (one, int8)]
    assert parts[1] - parts[0] == 30 * 512 * 4 * (2 * 576 + 576 + 1536)


@given(works, st.sampled_from([CPU, NANO]), st.booleans(), st.integers(1, 4096))
def test_memory_grows_with_tokens_rank_and_layers(
    one: Work, device: Device, checkpointing: bool, tokens: int
) -> None:
    larger = [
        (one, tokens + 100),
        (replace(one, lora=one.lora.model_copy(update={"rank": one.lora.rank + 8})), tokens),
        (replace(one, shape=deeper(one.shape)), tokens),
    ]
    before = peak(one, device, tokens, checkpointing)
    assert all(peak(more, device, size, checkpointing) > before for more, size in larger)


def deeper(shape: Shape) -> Shape:
    """Half as many layers again."""
    layers = shape.layers * 3 // 2
    linears = tuple(replace(one, count=layers) for one in shape.linears)
    return replace(shape, layers=layers, linears=linears)


@given(works, st.sampled_from([CPU, NANO]), st.integers(1, 8192))
def test_recomputing_never_takes_more_memory_nor_less_time(
    one: Work, device: Device, tokens: int
) -> None:
    assert peak(one, device, tokens, True) <= peak(one, device, tokens, False)
    assert planner.flops_per_token(one, True) > planner.flops_per_token(one, False)


# Choosing


@given(works, devices)
def test_a_chosen_plan_fits_and_a_refusal_is_true(one: Work, device: Device) -> None:
    try:
        plan = planner.choose(one, device, 1e12)
    except UserError:
        assert planner.least_memory(one, device) > 0.9 * device.memory_available
        return
    assert plan.peak_memory_bytes == sum(plan.parts.values()) < device.memory_available
    assert plan.seconds and plan.seconds > 0
    longest, step = one.lengths.longest, one.train.tokens_per_step
    assert longest <= plan.micro_batch_tokens <= max(longest, step)


@given(works, devices)
def test_every_remedy_fits(one: Work, device: Device) -> None:
    for settings, least in planner.remedies(one, device):
        assert settings and least <= device.memory_available


def test_memory_decides_between_large_batches_small_ones_and_recomputing() -> None:
    def chosen(gib: float) -> tuple[int, bool]:
        plan = planner.choose(work(), replace(NX, memory_available=int(gib * GIB)), 1e12)
        return plan.micro_batch_tokens, plan.checkpointing

    found = [chosen(gib) for gib in (9.2, 7, 6, 5, 4.9)]
    assert found == [(4096, False), (2048, False), (1024, False), (2048, True), (1024, True)]


def test_a_cpu_takes_small_micro_batches_and_whole_steps_where_those_are_smaller() -> None:
    embedded = work(KNOWN["embedded"], longest=256)
    assert planner.choose(embedded, CPU, 1e11).micro_batch_tokens == 768
    wide = replace(embedded, weights=Weights("fp32"))
    assert planner.choose(wide, CPU, 1e11).micro_batch_tokens == 512
    one = replace(embedded, train=TrainRecipe(tokens_per_step=300))
    assert planner.choose(one, CPU, 1e11).micro_batch_tokens == 300


def test_what_cant_fit_is_refused_with_settings_that_would() -> None:
    tight = replace(NANO, memory_available=4 * GIB)
    with pytest.raises(UserError) as refusal:
        planner.choose(work(), tight, 1e12)
    assert "quantize: nf4" in refusal.value.fix and "GiB" in refusal.value.fix
    with pytest.raises(UserError, match="smaller model"):
        planner.choose(work(), replace(NANO, memory_available=1), 1e12)


def test_settings_are_joined_where_one_alone_is_not_enough() -> None:
    one = work(weights=Weights("bf16", "nf4"), longest=1024, lora={"rank": 256})
    room = int(planner.least_memory(one, NANO) * 0.95)
    found = planner.remedies(one, replace(NANO, memory_available=room), at_most=9)
    assert any("data.max_length" in text and "lora.rank" in text for text, _ in found)


# Time


def test_operations_are_those_counted_by_hand() -> None:
    assert planner.flops_per_token(work(), False) == pytest.approx(5.49e9, rel=0.01)
    assert planner.flops_per_token(work(), True) == pytest.approx(7.99e9, rel=0.01)


def test_time_follows_the_devices_rate_and_the_epochs() -> None:
    once = planner.seconds(work(), "cuda", 1e13, False)
    assert planner.seconds(work(), "cuda", 2e13, False) == pytest.approx(once / 2)
    assert planner.seconds(work(epochs=3.0), "cuda", 1e13, False) == pytest.approx(
        3 * once, rel=0.1
    )


def test_a_cpus_time_depends_on_the_arithmetic_and_the_weights() -> None:
    """As shares of the matrix rate: docs/measurements.md, "Planned and measured speed"."""
    shares = {}
    for weights in (Weights("fp32"), BF16, Weights("bf16", "int8"), Weights("bf16", "nf4")):
        one = work(KNOWN["embedded"], weights=weights)
        one = replace(one, heldout_tokens=0.0)
        needed = planner.flops_per_token(one, False) * planner.tokens_to_train(one)
        shares[str(weights)] = needed / planner.seconds(one, "cpu", 1e11, False) / 1e11
    assert list(shares.values()) == pytest.approx([0.55, 0.43, 0.43 * 0.95, 0.43 * 0.95])


def test_the_heads_logits_are_counted_as_it_makes_them() -> None:
    """SmolLM2's 49,152: 341 positions in bf16, 42 of them in fp32 too, and all their gradients."""
    one = work(KNOWN["embedded"])
    gradients = 768 * 576 * 2
    assert planner.head_bytes(one, 768, "cpu") == 49152 * (341 * 2 + 42 * 4) + gradients
    assert planner.head_bytes(one, 768, "cuda") == 49152 * (341 * 2 + 170 * 4) + gradients
    fp32 = work(KNOWN["embedded"], weights=Weights("fp32"))
    assert planner.head_bytes(fp32, 768, "cpu") == 49152 * 170 * 4 + 2 * gradients


def test_limits_bound_the_time() -> None:
    minutes = planner.seconds(work(max_minutes=60.0), "cuda", 1e13, False) / 60
    assert 60 < minutes < 70  # with the held-out measurements
    assert planner.tokens_to_train(work(max_steps=10)) == pytest.approx(65_000, rel=0.1)


@pytest.mark.parametrize("name", BOARDS)
def test_every_module_has_an_answer_for_the_whole_job(name: str) -> None:
    board = find(name)
    plan = planner.best(work(), board.device(), board.flops("bf16"))
    assert (plan is None) == (name == "orin-nano-4gb")
    assert plan is None or (plan.seconds or 0) > 3600


def test_a_plan_is_written_with_its_parts() -> None:
    found = planner.choose(work(), NX, 1e12).as_json()
    assert set(found) == {field.name for field in dataclasses.fields(planner.Plan)}
    assert found["parts"]["weights"] == planner.weight_bytes(PHI, Weights("bf16"))


# What was taken in fact


def test_what_the_process_holds_counts_as_free_where_memory_is_shared() -> None:
    assert with_own(CPU).memory_available > CPU.memory_available
    assert with_own(CPU, 4).memory_available < with_own(CPU, 2).memory_available
    discrete = replace(NX, integrated=False)
    assert with_own(discrete) == discrete == with_own(discrete, 2)


def test_peak_memory_is_in_bytes_and_never_falls() -> None:
    before = peak_memory_bytes("cpu")
    block = bytearray(200 * 2**20)
    block[:: 2**12] = b"x" * len(block[:: 2**12])
    after = peak_memory_bytes("cpu")
    del block
    assert before > 2**20
    assert after >= before + 100 * 2**20 or after > 300 * 2**20
    assert peak_memory_bytes("cpu") >= after


# --- memory that the recipe grants ---------------------------------------------------------------


def test_granted_memory_stands_above_what_is_free() -> None:
    roomy = planner.choose(work(KNOWN["embedded"]), CPU, 1e11)
    tight = planner.choose(work(KNOWN["embedded"], max_memory_gb=1.2), CPU, 1e11)
    assert not roomy.checkpointing and tight.checkpointing
    assert (tight.peak_memory_bytes or 0) <= 1.2e9 < (roomy.peak_memory_bytes or 0)
    full = replace(CPU, memory_available=GIB)
    assert planner.choose(work(KNOWN["embedded"], max_memory_gb=8), full, 1e11) == roomy


def test_too_little_granted_is_refused_by_that_name() -> None:
    with pytest.raises(UserError, match=r"train.max_memory_gb: 0.5"):
        planner.choose(work(KNOWN["embedded"], max_memory_gb=0.5), CPU, 1e11)
