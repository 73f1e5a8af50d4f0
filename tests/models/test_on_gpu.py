"""What the CPU's tests hold, held on the GPU: rows apart, the same losses and gradients."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from jetson_ft.data.template import ANSWER, CONTEXT
from jetson_ft.models import attention, varlen
from jetson_ft.models.adapter import attach
from jetson_ft.models.fused import fuse
from jetson_ft.models.load import Weights, load_model, load_tokenizer
from jetson_ft.models.loss import token_losses, without_head
from jetson_ft.models.packing import pack
from jetson_ft.models.resolve import Base
from jetson_ft.recipe import LoraRecipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")

FORMATS = [
    Weights("fp32"), Weights("bf16"), Weights("bf16", "int8"), Weights("bf16", "nf4"),
]  # fmt: skip


def make_rows(opening: int) -> list[dict[str, Any]]:
    """Three rows of random ids behind the same opening."""
    random = torch.Generator().manual_seed(2)
    rows = []
    for length in (40, 7, 150):
        ids = torch.randint(3, 259, (length,), generator=random).tolist()
        parts = [CONTEXT] * (opening + 3) + [ANSWER] * (length - 3)
        rows.append({"input_ids": [*range(5, 5 + opening), *ids], "parts": parts})
    return rows


def adapted(folder: Path, weights: Weights, device: str, fused: bool = True) -> Any:
    """With an adapter that says something."""
    model = attach(load_model(Base("m", folder), weights, device), LoraRecipe(rank=4), 0, fused)
    random = torch.Generator().manual_seed(1)
    for parameter in filter(lambda one: one.requires_grad, model.parameters()):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=random).to(parameter)
    if fused:
        fuse(model)
    return model


def learn(model: Any, rows: list[dict[str, Any]], ours: bool) -> tuple[Any, list[Any]]:
    """Losses and gradients: of one pack on our way, or row by row on transformers' and PEFT's."""
    device = model.get_input_embeddings().weight.device
    groups = [rows] if ours else [[row] for row in rows]
    with (
        without_head(model) if ours else nullcontext(),
        attention.packed(model) if ours else nullcontext(),
    ):
        losses = torch.cat([token_losses(model, pack(one).to(device)) for one in groups])
        losses.sum().backward()
    trained = [one for one in model.parameters() if one.requires_grad]
    return losses.detach().cpu(), [one.grad.float().cpu() for one in trained]


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("opening", [0, 6])
@pytest.mark.parametrize("weights", FORMATS, ids=str)
@pytest.mark.parametrize("folder", ["wide_phi", "tiny_llama"])
def test_a_pack_learns_what_its_rows_learn_by_themselves(
    folder: str, weights: Weights, opening: int, request: pytest.FixtureRequest
) -> None:
    path, rows = request.getfixturevalue(folder), make_rows(opening)
    ours = learn(adapted(path, weights, "cuda"), rows, True)
    plain = learn(adapted(path, weights, "cuda", fused=False), rows, False)
    # Rounding to a bf16 of 8 bits, several times over; and of int8's inputs.
    allowed = {"fp32": 1e-5, "bf16": 2e-2}.get(str(weights), 5e-2)
    assert distance(ours[0], plain[0]) < allowed
    for mine, theirs in zip(ours[1], plain[1], strict=True):
        if float(theirs.norm()) > 1e-3:  # a key's bias changes nothing
            assert distance(mine, theirs) < 3 * allowed


@pytest.mark.parametrize("folder", ["tiny_phi", "tiny_llama"])
def test_the_gpu_learns_what_the_cpu_learns(folder: str, request: pytest.FixtureRequest) -> None:
    path, rows = request.getfixturevalue(folder), make_rows(6)
    found = [learn(adapted(path, Weights("fp32"), kind), rows, True) for kind in ("cuda", "cpu")]
    assert distance(found[0][0], found[1][0]) < 1e-5
    for mine, theirs in zip(found[0][1], found[1][1], strict=True):
        assert distance(mine, theirs) < 1e-3 or float(theirs.norm()) < 1e-3


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="its kernels want a GPU of Ampere's generation or a later one",
)
@pytest.mark.parametrize("queries_per_key", [1, 3])
def test_rows_go_in_one_call_and_stay_apart(
    queries_per_key: int,
) -> None:
    kernel = varlen.choose(torch.bfloat16, 64, queries_per_key)
    assert kernel, "this PyTorch has no such kernels; rows go one by one"
    tokens = [torch.randn(1, heads, 200, 64, device="cuda", dtype=torch.bfloat16)
              for heads in (2 * queries_per_key, 2, 2)]  # fmt: skip
    other = [tensor.clone() for tensor in tokens]
    for tensor in other:
        tensor[:, :, :90] += 1  # the first row alone
    found = [varlen._call(kernel, *each, [90, 110], None) for each in (tokens, other)]
    assert torch.equal(found[0][:, 90:], found[1][:, 90:])
    assert not torch.equal(found[0][:, :90], found[1][:, :90])


def test_replies_are_the_cpus(tiny_llama: Path) -> None:
    from jetson_ft.inference.generate import reply_all

    tokenizer = load_tokenizer(Base("m", tiny_llama))
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    found = [
        reply_all(adapted(tiny_llama, Weights("fp32"), kind), tokenizer, prompts, [2], 12)
        for kind in ("cuda", "cpu")
    ]
    assert found[0] == found[1]
