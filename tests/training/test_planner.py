"""A plan fits its device; predictions grow and shrink as memory and time do."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jetson_ft.data import lengths
from jetson_ft.errors import UserError
from jetson_ft.hardware.boards import BOARDS, find_board
from jetson_ft.hardware.detect import Device
from jetson_ft.models.catalog import KNOWN_DIMS
from jetson_ft.models.dims import ModelDims
from jetson_ft.models.loading import WeightFormat
from jetson_ft.recipe import LoraRecipe, TrainRecipe
from jetson_ft.training import cost_model, planner
from jetson_ft.training.cost_model import Workload
from jetson_ft.training.memory import peak_memory_bytes, with_own_memory

GIB = 2**30
CPU = Device("cpu", "a processor", None, 4, 16 * GIB, 8 * GIB, False, False)
NANO, NX = find_board("orin-nano-8gb").device(), find_board("orin-nx-16gb").device()
PHI = KNOWN_DIMS["microsoft/phi-1_5"]
BF16 = WeightFormat("bf16")


def workload(
    dims: ModelDims = PHI,
    weights: WeightFormat = BF16,
    longest: int = 1024,
    **settings: Any,
) -> Workload:
    rows = lengths.KNOWN_LENGTHS["llamafactory/alpaca_zh", "microsoft/phi-1_5"].cut(longest)
    lora = LoraRecipe(**settings.pop("lora", {}))
    train = TrainRecipe(**{"epochs": 1.0, "tokens_per_step": 6500, **settings})
    return Workload(dims, weights, lora, train, rows, heldout_tokens=60 * rows.mean)


workloads = st.builds(
    workload,
    dims=st.sampled_from(list(KNOWN_DIMS.values())),
    weights=st.builds(
        WeightFormat,
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


def peak(one: Workload, device: Device, tokens: int = 1024, checkpointing: bool = False) -> int:
    return sum(cost_model.predict_memory(one, device, tokens, checkpointing).values())


# Memory


def reply_peak(one: Workload, device: Device, rows: int, width: int) -> int:
    return sum(cost_model.predict_reply_memory(one, device, rows, width).values())


@given(workloads, devices, st.integers(0, 2000), st.integers(1, 4000), st.integers(1, 2000))
def test_peak_is_that_of_training_or_of_one_reply(
    one: Workload, device: Device, prompt: int, reply: int, width: int
) -> None:
    one = replace(one, longest_prompt=prompt, reply_tokens=reply)
    needed = reply_peak(one, device, 1, prompt)
    for plan in planner.candidate_plans(one, device):
        training = peak(one, device, plan.micro_batch_tokens, plan.checkpointing)
        assert plan.peak_memory_bytes == sum(plan.parts.values()) == max(training, needed)
        batch = planner.reply_batch_size(one, device, plan, width)
        assert 1 <= batch <= 36
        assert batch == 1 or reply_peak(one, device, batch, width) <= plan.peak_memory_bytes
        if batch < 36:
            assert reply_peak(one, device, batch + 1, width) > plan.peak_memory_bytes


def test_long_replies_are_planned_for() -> None:
    short = replace(workload(), longest_prompt=100, reply_tokens=160)
    long = replace(short, reply_tokens=8192)
    cache = 25 * 2 * 2048 * 2 * (8192 - 160)  # bytes: layers and one more, K and V, bf16
    assert reply_peak(long, NANO, 1, 100) - reply_peak(short, NANO, 1, 100) >= 0.9 * cache
    assert planner.best_plan(short, NANO, 1e12) and not planner.best_plan(long, NANO, 1e12)


def test_small_board_generates_fewer_replies_at_a_time() -> None:
    one = replace(workload(), longest_prompt=60, reply_tokens=160)
    plans = [planner.best_plan(one, board, 1e12) for board in (NANO, NX)]
    assert plans[0] and plans[1]
    assert 1 <= planner.reply_batch_size(one, NANO, plans[0], 60) < 30
    assert planner.reply_batch_size(one, NX, plans[1], 60) == 36


@pytest.mark.parametrize(
    ("number", "rows", "width", "measured_mb"),
    # Growth of the process on a CPU, of four layers with adapters, while two tokens were generated.
    [("fp32", 36, 250, 382), ("fp32", 16, 500, 333), ("fp32", 4, 1000, 134), ("bf16", 36, 250, 193),
     ("bf16", 16, 500, 151)],
)  # fmt: skip
def test_replies_take_no_more_than_predicted(
    number: str, rows: int, width: int, measured_mb: float
) -> None:
    dims = replace(KNOWN_DIMS["embedded"], layers=4)
    one = replace(workload(dims, WeightFormat(number)), reply_tokens=2)
    parts = cost_model.predict_reply_memory(one, CPU, rows, width)
    predicted = (parts["activations"] + parts["transient"]) / 10**6
    assert measured_mb < predicted < 1.6 * measured_mb


@given(workloads, devices, st.integers(2, 8))
def test_split_layers_take_no_more_than_whole_ones(
    one: Workload, device: Device, shards: int
) -> None:
    one = replace(one, weights=replace(one.weights, quantize="none"))
    split = replace(one, shards=shards)
    rounding = 6  # bytes: each part is rounded up
    assert peak(split, device) <= peak(one, device) + rounding
    assert peak(replace(split, shards=shards + 1), device) <= peak(split, device) + rounding


def test_a_split_model_is_loaded_whole_first() -> None:
    whole, split = workload(longest=16), workload(longest=16)
    split = replace(split, shards=1000)
    weights = cost_model.weight_bytes(PHI, BF16)
    parts = cost_model.predict_memory(split, NX, 16, checkpointing=True)
    assert sum(parts.values()) - parts["process"] - parts["context"] >= weights
    assert peak(split, NX, 16, True) < peak(whole, NX, 16, True)


@pytest.mark.parametrize(
    ("weights", "gib"),
    [
        (WeightFormat("bf16"), 2.64), (WeightFormat("fp32"), 5.28),
        (WeightFormat("bf16", "int8"), 1.52),
        (WeightFormat("bf16", "nf4", False), 1.02), (WeightFormat("bf16", "nf4", True), 0.97),
    ],
)  # fmt: skip
def test_phis_weights_take_the_known_size_of_each_format(weights: WeightFormat, gib: float) -> None:
    assert cost_model.weight_bytes(PHI, weights) / GIB == pytest.approx(gib, abs=0.006)


@pytest.mark.parametrize(
    ("model", "quantize"),
    [("tiny_llama", "none"), ("wide_phi", "none"), ("wide_phi", "int8"), ("wide_phi", "nf4")],
)
def test_weights_take_what_a_loaded_model_takes(
    model: str, quantize: str, request: pytest.FixtureRequest
) -> None:
    from jetson_ft.models import catalog, loading
    from jetson_ft.models.files import BaseModelFiles

    base = BaseModelFiles(model, request.getfixturevalue(model))
    weights = WeightFormat("bf16", quantize, double_quantize=False)
    loaded = sum(loading.bytes_per_part(loading.load_model(base, weights, "cpu")).values())
    assert cost_model.weight_bytes(catalog.model_dims(base), weights) == pytest.approx(
        loaded, rel=0.01
    )


def test_phi_keeps_the_counted_bytes_of_a_token() -> None:
    per_token = PHI.layers * cost_model.layer_bytes(workload(), 2) / 2**20
    assert per_token == pytest.approx(0.94, abs=0.01)
    dropped = PHI.layers * cost_model.layer_bytes(workload(lora={"dropout": 0.05}), 2) / 2**20
    assert dropped - per_token == pytest.approx(1.7, abs=0.05)


def test_smollm2_keeps_the_measured_bytes_of_a_token() -> None:
    one = workload(KNOWN_DIMS["embedded"], weights=WeightFormat("fp32"))
    per_token = one.dims.layers * cost_model.layer_bytes(one, 1) / 2**20
    assert per_token == pytest.approx(0.68, abs=0.01)
    int8 = replace(one, weights=WeightFormat("fp32", "int8"))
    assert cost_model.layer_bytes(int8, 1) == cost_model.layer_bytes(one, 1) + 4 * (2 * 576 + 1536)
    # bitsandbytes holds its inputs whatever is recomputed; attention's result is one of them.
    activations = [
        cost_model.predict_memory(x, CPU, 512, checkpointing=True)["activations"]
        for x in (one, int8)
    ]
    assert activations[1] - activations[0] == 30 * 512 * 4 * (2 * 576 + 576 + 1536)


@given(workloads, st.sampled_from([CPU, NANO]), st.booleans(), st.integers(1, 4096))
def test_memory_grows_with_tokens_rank_and_layers(
    one: Workload, device: Device, checkpointing: bool, tokens: int
) -> None:
    larger = [
        (one, tokens + 100),
        (replace(one, lora=one.lora.model_copy(update={"rank": one.lora.rank + 8})), tokens),
        (replace(one, dims=deeper(one.dims)), tokens),
    ]
    before = peak(one, device, tokens, checkpointing)
    assert all(peak(more, device, size, checkpointing) > before for more, size in larger)


def deeper(dims: ModelDims) -> ModelDims:
    """Return the model with half as many layers again."""
    layers = dims.layers * 3 // 2
    return replace(
        dims,
        layers=layers,
        linears=tuple(replace(one, count=layers) for one in dims.linears),
        modules=tuple(replace(one, count=layers) for one in dims.modules),
    )


@given(workloads, st.sampled_from([CPU, NANO]), st.integers(1, 8192))
def test_checkpointing_never_takes_more_memory_nor_less_time(
    one: Workload, device: Device, tokens: int
) -> None:
    assert peak(one, device, tokens, True) <= peak(one, device, tokens, False)
    assert cost_model.flops_per_token(one, True) > cost_model.flops_per_token(one, False)


# Choosing


@given(workloads, devices)
def test_a_chosen_plan_fits_and_a_refused_workload_does_not(one: Workload, device: Device) -> None:
    try:
        plan = planner.choose_plan(one, device, 1e12)
    except UserError:
        assert planner.least_memory(one, device) > 0.9 * device.memory_available
        return
    assert plan.peak_memory_bytes == sum(plan.parts.values()) < device.memory_available
    assert plan.seconds and plan.seconds > 0
    longest, step = one.lengths.longest, one.train.tokens_per_step
    assert longest <= plan.micro_batch_tokens <= max(longest, step)


@given(workloads, devices)
def test_every_suggestion_fits(one: Workload, device: Device) -> None:
    for settings, least in planner.suggestions(one, device):
        assert settings and least <= device.memory_available


def test_memory_decides_between_large_batches_small_ones_and_recomputing() -> None:
    def chosen(gib: float) -> tuple[int, bool]:
        plan = planner.choose_plan(workload(), replace(NX, memory_available=int(gib * GIB)), 1e12)
        return plan.micro_batch_tokens, plan.checkpointing

    plans = [chosen(gib) for gib in (9.2, 7, 6, 5, 4.9)]
    assert plans == [(4096, False), (2048, False), (1024, False), (2048, True), (1024, True)]


def test_a_cpu_takes_small_micro_batches_and_whole_steps_where_those_are_smaller() -> None:
    embedded = workload(KNOWN_DIMS["embedded"], longest=256)
    assert planner.choose_plan(embedded, CPU, 1e11).micro_batch_tokens == 768
    wide = replace(embedded, weights=WeightFormat("fp32"))
    assert planner.choose_plan(wide, CPU, 1e11).micro_batch_tokens == 512
    one = replace(embedded, train=TrainRecipe(tokens_per_step=300))
    assert planner.choose_plan(one, CPU, 1e11).micro_batch_tokens == 300


def test_a_workload_that_does_not_fit_is_refused_with_settings_that_would() -> None:
    tight = replace(NANO, memory_available=4 * GIB)
    with pytest.raises(UserError) as refusal:
        planner.choose_plan(workload(), tight, 1e12)
    assert "quantize: nf4" in str(refusal.value.fix) and "GiB" in str(refusal.value.fix)
    with pytest.raises(UserError, match="smaller model"):
        planner.choose_plan(workload(), replace(NANO, memory_available=1), 1e12)


def test_settings_are_joined_where_one_alone_is_not_enough() -> None:
    one = workload(weights=WeightFormat("bf16", "nf4"), longest=1024, lora={"rank": 256})
    budget = int(planner.least_memory(one, NANO) * 0.95)
    suggestions = planner.suggestions(one, replace(NANO, memory_available=budget), at_most=9)
    assert any("data.max_length" in text and "lora.rank" in text for text, _ in suggestions)


# Time


def test_operations_are_those_counted_by_hand() -> None:
    assert cost_model.flops_per_token(workload(), False) == pytest.approx(5.49e9, rel=0.01)
    assert cost_model.flops_per_token(workload(), True) == pytest.approx(7.99e9, rel=0.01)


def test_time_follows_the_devices_rate_and_the_epochs() -> None:
    once = cost_model.predict_seconds(workload(), "cuda", 1e13, False)
    assert cost_model.predict_seconds(workload(), "cuda", 2e13, False) == pytest.approx(once / 2)
    assert cost_model.predict_seconds(workload(epochs=3.0), "cuda", 1e13, False) == pytest.approx(
        3 * once, rel=0.1
    )


def test_a_cpus_time_depends_on_the_arithmetic_and_the_weights() -> None:
    """As shares of the matrix rate: docs/measurements/plan-speed.md."""
    shares = {}
    for weights in (
        WeightFormat("fp32"),
        BF16,
        WeightFormat("bf16", "int8"),
        WeightFormat("bf16", "nf4"),
    ):
        one = workload(KNOWN_DIMS["embedded"], weights=weights)
        one = replace(one, heldout_tokens=0.0)
        needed = cost_model.flops_per_token(one, False) * cost_model.tokens_to_train(one)
        shares[str(weights)] = needed / cost_model.predict_seconds(one, "cpu", 1e11, False) / 1e11
    assert list(shares.values()) == pytest.approx([0.55, 0.43, 0.43 * 0.95, 0.43 * 0.95])


def test_the_quickstarts_comparison_and_loading_take_the_measured_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Measured with 66 long rows where training made 604 tokens/s: 27 s, and 10 s to training.

    The comparison had no probes then.
    """
    from jetson_ft.inference import generate

    rows = lengths.KNOWN_LENGTHS["bundled", "embedded"]
    one = replace(
        workload(KNOWN_DIMS["embedded"]), lengths=rows, heldout_rows=66,
        heldout_tokens=66 * 130.0, reply_tokens=48,
    )  # fmt: skip
    flops = 604 * cost_model.flops_per_token(one, False) / 0.43
    with_probes = cost_model.predict_other_seconds(one, "cpu", flops)
    monkeypatch.setattr(cost_model, "_PROBE_TOKENS", 0)
    assert cost_model.predict_other_seconds(one, "cpu", flops) == pytest.approx(37, rel=0.1)
    assert 5 < with_probes - cost_model.predict_other_seconds(one, "cpu", flops) < 30
    short = replace(one, reply_tokens=24)
    assert cost_model.predict_other_seconds(short, "cpu", flops) < 33
    assert cost_model.STEP_COST == generate.STEP_COST
    assert cost_model.MAX_REPLY_BATCH == generate.MAX_REPLY_BATCH


def test_the_heads_logits_are_counted_by_its_chunks() -> None:
    """SmolLM2's 49,152: 341 positions in bf16, 42 of them in fp32 too, and all their gradients."""
    one = workload(KNOWN_DIMS["embedded"])
    gradients = 768 * 576 * 2
    assert cost_model.head_bytes(one, 768, "cpu") == 49152 * (341 * 2 + 42 * 4) + gradients
    assert cost_model.head_bytes(one, 768, "cuda") == 49152 * (341 * 2 + 170 * 4) + gradients
    fp32 = workload(KNOWN_DIMS["embedded"], weights=WeightFormat("fp32"))
    assert cost_model.head_bytes(fp32, 768, "cpu") == 49152 * 170 * 4 + 2 * gradients


def test_limits_bound_the_time() -> None:
    minutes = cost_model.predict_seconds(workload(max_minutes=60.0), "cuda", 1e13, False) / 60
    assert 60 < minutes < 70  # with the held-out measurements
    assert cost_model.tokens_to_train(workload(max_steps=10)) == pytest.approx(65_000, rel=0.1)


@pytest.mark.parametrize("name", BOARDS)
def test_every_module_but_the_smallest_has_a_plan_for_phi(name: str) -> None:
    board = find_board(name)
    plan = planner.best_plan(workload(), board.device(), board.flops("bf16"))
    assert (plan is None) == (name == "orin-nano-4gb")
    assert plan is None or (plan.seconds or 0) > 3600


def test_a_plan_is_written_with_its_parts() -> None:
    plan = planner.choose_plan(workload(), NX, 1e12).as_json()
    assert set(plan) == {field.name for field in dataclasses.fields(planner.Plan)}
    assert plan["parts"]["weights"] == cost_model.weight_bytes(PHI, WeightFormat("bf16"))


# Measured memory


def test_the_process_own_memory_counts_as_free_where_memory_is_shared() -> None:
    assert with_own_memory(CPU).memory_available > CPU.memory_available
    assert with_own_memory(CPU, 4).memory_available < with_own_memory(CPU, 2).memory_available
    discrete = replace(NX, integrated=False)
    assert with_own_memory(discrete) == discrete == with_own_memory(discrete, 2)


def test_peak_memory_is_in_bytes_and_never_falls() -> None:
    before = peak_memory_bytes("cpu")
    block = bytearray(200 * 2**20)
    block[:: 2**12] = b"x" * len(block[:: 2**12])
    after = peak_memory_bytes("cpu")
    del block
    assert before > 2**20
    assert after >= before + 100 * 2**20 or after > 300 * 2**20
    assert peak_memory_bytes("cpu") >= after


# Memory limit of the recipe


def test_max_memory_gb_overrides_the_free_memory() -> None:
    roomy = planner.choose_plan(workload(KNOWN_DIMS["embedded"]), CPU, 1e11)
    tight = planner.choose_plan(workload(KNOWN_DIMS["embedded"], max_memory_gb=1.2), CPU, 1e11)
    assert not roomy.checkpointing and tight.checkpointing
    assert (tight.peak_memory_bytes or 0) <= 1.2e9 < (roomy.peak_memory_bytes or 0)
    full = replace(CPU, memory_available=GIB)
    assert (
        planner.choose_plan(workload(KNOWN_DIMS["embedded"], max_memory_gb=8), full, 1e11) == roomy
    )


def test_too_small_a_max_memory_gb_is_refused_by_that_name() -> None:
    with pytest.raises(UserError, match=r"train.max_memory_gb: 0.5"):
        planner.choose_plan(workload(KNOWN_DIMS["embedded"], max_memory_gb=0.5), CPU, 1e11)
