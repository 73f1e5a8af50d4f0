"""The masks of dropout belong to the rows: another plan gives the same adapter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_architectures import tiny_config
from training_bench import Bench
from transformers import AutoModelForCausalLM
from workbench import Workbench

from jetson_ft import adapter
from jetson_ft.events import Warned
from jetson_ft.kernels import attention, dropout
from jetson_ft.kernels.packing import Pack, pack_rows
from jetson_ft.models import loading
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.recipe import LoraRecipe
from jetson_ft.training import loop

P = 0.1
Adapter = dict[str, torch.Tensor]


def train(
    bench: Bench, home: Path, share_prefix: bool = True, packed: bool = True, **plan: Any
) -> Adapter:
    """Return the adapter after five steps with dropout."""
    model = bench.model(dropout=P)
    job = replace(bench.job(home, max_steps=5, **plan), share_prefix=share_prefix)
    if packed:
        bench.train(model, job)
    else:
        loop.train(model, job)
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def pack_of(bench: Bench, rows: int) -> Pack:
    """Return a pack of the first rows."""
    return pack_rows(list(bench.rows.train)[:rows])


def difference(first: Adapter, second: Adapter) -> float:
    """Return the norm of the difference, relative to the norm of the first."""
    pairs = [(first[name].double(), second[name].double()) for name in first]
    change = sum((a - b).square().sum() for a, b in pairs)
    return float((change / sum(a.square().sum() for a, _ in pairs)).sqrt())


PLANS: dict[str, dict[str, Any]] = {
    "small micro-batches": {"capacity": 64},
    "each row alone": {"capacity": 0},
    "recomputed": {"recompute": True},
    "no shared prefix": {"share_prefix": False},
    "small, recomputed, no shared prefix": {
        "capacity": 100, "recompute": True, "share_prefix": False
    },
    "the model's own attention": {"capacity": 0, "packed": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """Return the adapter of the plan with one micro-batch a step."""
    return train(bench, tmp_path_factory.mktemp("whole"))


@pytest.mark.promise(57)
@pytest.mark.parametrize("name", PLANS)
def test_another_plan_gives_the_same_adapter(
    bench: Bench, trained: Adapter, tmp_path: Path, name: str
) -> None:
    assert difference(trained, train(bench, tmp_path, **PLANS[name])) < 1e-5


@pytest.mark.promise(57)
def test_another_step_seed_or_layer_draws_another_mask(bench: Bench, tmp_path: Path) -> None:
    """Else the tests above could pass with masks that never change."""
    model, pack = bench.model(dropout=P).train(), pack_of(bench, 3)
    layers = [m for m in model.modules() if isinstance(m, dropout.RowDropout)]
    ones = torch.ones(1, pack.tokens, 64)

    def mask(number: int, seed: int, step: int) -> torch.Tensor:
        with dropout.use_dropout_keys(model, pack, seed, step):
            return layers[number](ones) == 0

    first = mask(0, seed=0, step=1)
    assert torch.equal(first, mask(0, seed=0, step=1))
    for other in (mask(1, 0, 1), mask(0, 1, 1), mask(0, 0, 2), mask(0, 1, 0)):
        both = float((first & other).float().mean())
        assert both == pytest.approx(P * P, rel=0.15), "they are independent"


@pytest.mark.promise(57)
@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=6),
    prefix=st.lists(st.integers(0, 3), max_size=8),
)
def test_keys_are_those_of_each_row_alone(rows: list[list[int]], prefix: list[int]) -> None:
    """Also where rows begin alike, are equal, or are shared only in part."""
    items = [
        {"input_ids": [*prefix, *row], "segments": [0] * len(prefix) + [1] * len(row)}
        for row in rows
    ]
    pack = pack_rows(items)
    keys = dropout.token_keys(pack)
    shared, expected = pack.shared_prefix, []
    for number, item in enumerate(items):
        alone = dropout.token_keys(pack_rows([item], share=False))
        expected += alone[shared if number else 0 :].tolist()
    assert keys.tolist() == expected


# --- the masks are random ----------------------------------------------------------------------

TOKENS, FEATURES = 1000, 513  # odd: two features share a hash


@pytest.fixture(scope="module", params=[0.05, 0.5])
def dropped(request: pytest.FixtureRequest) -> tuple[float, torch.Tensor]:
    """Return a probability, and which features of the tokens of a row are dropped."""
    row = {"input_ids": [7] * TOKENS, "segments": [1] * TOKENS}  # only the position differs
    keys = (dropout.token_keys(pack_rows([row])) >> 32).to(torch.int32)
    y = dropout._drop(torch.ones(TOKENS, FEATURES), keys, request.param)
    dropped, kept = y.unique().tolist()
    assert dropped == 0 and kept == pytest.approx(1 / (1 - request.param), rel=1e-4)
    return request.param, y == 0


def assert_normal(z: torch.Tensor) -> None:
    """Check that z has mean 0 and variance 1, and no value far out."""
    assert abs(float(z.mean())) < 5 * z.numel() ** -0.5
    assert abs(float(z.square().sum()) - z.numel()) < 5 * (2 * z.numel()) ** 0.5  # chi-squared
    assert float(z.abs().max()) < 8  # products of rare drops have a long tail


@pytest.mark.promise(57)
def test_masks_have_the_right_share_and_no_pattern(dropped: tuple[float, torch.Tensor]) -> None:
    """Shares of tokens and of features, and correlations of neighbours and of whole tokens."""
    p, drop = dropped
    unit = (drop.double() - p) / (p * (1 - p)) ** 0.5
    assert abs(float(unit.sum())) < 4 * unit.numel() ** 0.5
    assert_normal(unit.sum(0) * TOKENS**-0.5)
    assert_normal(unit.sum(1) * FEATURES**-0.5)
    for tokens, features in ((1, 0), (0, 1), (0, 2), (1, 1), (64, 0), (0, 256)):
        product = unit[tokens:, features:] * unit[: TOKENS - tokens, : FEATURES - features]
        assert_normal(product.sum(0) * len(product) ** -0.5)
    correlations = unit[:200] @ unit[:200].T * FEATURES**-0.5
    first, second = torch.triu_indices(200, 200, 1)
    assert_normal(correlations[first, second])


@pytest.mark.promise(57)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_backward_pass_has_the_mask_of_the_forward_pass(dtype: torch.dtype) -> None:
    keys = torch.arange(70, dtype=torch.int32) * 1_000_003
    x = torch.randn(1, 70, 3000, dtype=dtype, requires_grad=True)  # of several blocks
    y = dropout._Dropout.apply(x, keys, 0.3)
    y.backward(torch.ones_like(y))
    assert y.dtype == dtype and x.grad is not None
    assert torch.equal(x.grad == 0, y == 0)
    assert torch.allclose(y, x.grad * x, rtol=0.01)
    assert y[y != 0].mean().isfinite()


# --- every kind of model -----------------------------------------------------------------------


@pytest.mark.promise(57)
@pytest.mark.parametrize("kind", ["bf16", "nf4", "int8", "dora"])
def test_masks_do_not_depend_on_the_plan_in_any_format(
    wide_phi: Path, rows_file: Path, tmp_path: Path, make_bench: Any, kind: str
) -> None:
    """The gradients of one step; with dropout of a half another mask would differ by far more."""
    formats = {"bf16": ("bf16", "none"), "nf4": ("fp32", "nf4"), "int8": ("fp32", "int8")}
    weights = loading.WeightFormat(*formats.get(kind, ("fp32", "none")))
    bench = make_bench(wide_phi)

    def gradients(rows_per_pack: int, recompute: bool) -> Adapter:
        base = loading.load_model(BaseModelFiles("wide", wide_phi), weights, "cpu")
        lora = LoraRecipe(rank=4, dropout=0.5, dora=kind == "dora")
        model = adapter.attach_adapter(base, lora, seed=0).train()
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, 0, 0.1, generator=torch.Generator().manual_seed(1))
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        rows = list(bench.rows.train)[:4]
        job = bench.job(tmp_path)
        with attention.use_packed_attention(model):
            for start in range(0, 4, rows_per_pack):
                pack = pack_rows(rows[start : start + rows_per_pack])
                loop.backward_pack(model, pack, job, 1, 100, 1.0)
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    limit = {"bf16": 0.05, "int8": 0.1}.get(kind, 1e-4)
    assert difference(gradients(4, False), gradients(1, True)) < limit


@pytest.mark.promise(57)
def test_evaluation_drops_nothing(bench: Bench) -> None:
    plain, dropping = bench.model().eval(), bench.model(dropout=0.9).eval()
    for model in (plain, dropping):
        for parameter in loop.trainable_parameters(model):
            torch.nn.init.normal_(parameter, 0, 0.1, generator=torch.Generator().manual_seed(2))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, dropping(ids).logits)


@pytest.mark.promise(57)
def test_dropout_of_the_base_is_off_and_said_to_be(short_gpt2: Path, tmp_path: Path) -> None:
    """GPT-2 drops a tenth of embeddings, residuals and attention by its config."""
    rows = tmp_path / "rows.json"
    pairs = [{"instruction": f"{n}?", "input": "", "output": str(n)} for n in range(40)]
    rows.write_text(json.dumps(pairs))
    bench = Workbench(short_gpt2, rows, tmp_path / "runs")
    run = bench.run("off", tokens_per_step=300, max_steps=3, eval_every=3)
    assert bench.work(run) == 0, (run.path / "log.txt").read_text()
    (warning,) = [event.message for event in run.events() if isinstance(event, Warned)]
    for share in ("attn_pdrop 0.1", "embd_pdrop 0.1", "resid_pdrop 0.1"):
        assert share in warning


@pytest.mark.promise(57)
@pytest.mark.parametrize("kind", ["gpt2", "opt", "bloom", "falcon", "gpt_neox"])
def test_model_with_its_dropout_off_draws_no_random_number(kind: str) -> None:
    """In modules, functions and attention; OPT skips whole layers too."""
    config = tiny_config(kind)
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.5)
    model = AutoModelForCausalLM.from_config(config).train()
    ids = torch.arange(20)[None]
    first, second = model(ids).logits, model(ids).logits
    assert not torch.equal(first, second), "the model drops as it comes"
    assert dropout.turn_off_base_dropout(model)
    state = torch.get_rng_state()
    assert torch.equal(model(ids).logits, model.eval()(ids).logits)
    assert torch.equal(torch.get_rng_state(), state) or kind == "opt"
