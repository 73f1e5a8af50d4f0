"""What the CPU's tests hold, held on the GPU: rows apart, the same losses and gradients."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny_architectures
import torch

from jetson_ft.adapter import attach_adapter
from jetson_ft.data.chat_template import ANSWER, CONTEXT
from jetson_ft.kernels import attention, attention_varlen
from jetson_ft.kernels.attention_trial import packing_obstacle
from jetson_ft.kernels.fused_layers import fuse_layers
from jetson_ft.kernels.lm_head_loss import chunked_lm_head, token_losses
from jetson_ft.kernels.packing import pack_rows
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.models.loading import WeightFormat, load_model, load_tokenizer
from jetson_ft.recipe import LoraRecipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")

FORMATS = [
    WeightFormat("fp32"), WeightFormat("bf16"),
    WeightFormat("bf16", "int8"), WeightFormat("bf16", "nf4"),
]  # fmt: skip


def make_rows(shared_prefix: int) -> list[dict[str, Any]]:
    """Three rows of random ids behind the same shared_prefix."""
    random = torch.Generator().manual_seed(2)
    rows = []
    for length in (40, 7, 150):
        ids = torch.randint(3, 259, (length,), generator=random).tolist()
        parts = [CONTEXT] * (shared_prefix + 3) + [ANSWER] * (length - 3)
        rows.append({"input_ids": [*range(5, 5 + shared_prefix), *ids], "segments": parts})
    return rows


def adapted(folder: Path, weights: WeightFormat, device: str, fused: bool = True) -> Any:
    """With an adapter that says something."""
    model = attach_adapter(
        load_model(BaseModelFiles("m", folder), weights, device), LoraRecipe(rank=4), 0, fused
    )
    random = torch.Generator().manual_seed(1)
    for parameter in filter(lambda one: one.requires_grad, model.parameters()):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=random).to(parameter)
    if fused:
        fuse_layers(model)
    return model


def losses_and_gradients(
    model: Any, rows: list[dict[str, Any]], ours: bool
) -> tuple[Any, list[Any]]:
    """Losses and gradients: of one pack, or row by row with transformers and PEFT alone."""
    device = model.get_input_embeddings().weight.device
    groups = [rows] if ours else [[row] for row in rows]
    with (
        chunked_lm_head(model) if ours else nullcontext(),
        attention.use_packed_attention(model) if ours else nullcontext(),
    ):
        losses = torch.cat([token_losses(model, pack_rows(one).to(device)) for one in groups])
        losses.sum().backward()
    trained = [one for one in model.parameters() if one.requires_grad]
    return losses.detach().cpu(), [one.grad.float().cpu() for one in trained]


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("shared_prefix", [0, 6])
@pytest.mark.parametrize("weights", FORMATS, ids=str)
@pytest.mark.parametrize("folder", ["wide_phi", "tiny_llama"])
def test_a_pack_gives_the_losses_and_gradients_of_its_rows_alone(
    folder: str, weights: WeightFormat, shared_prefix: int, request: pytest.FixtureRequest
) -> None:
    path, rows = request.getfixturevalue(folder), make_rows(shared_prefix)
    ours = losses_and_gradients(adapted(path, weights, "cuda"), rows, True)
    plain = losses_and_gradients(adapted(path, weights, "cuda", fused=False), rows, False)
    # Rounding to a bf16 of 8 bits, several times over; and of int8's inputs.
    allowed = {"fp32": 1e-5, "bf16": 2e-2}.get(str(weights), 5e-2)
    assert distance(ours[0], plain[0]) < allowed
    for actual, expected in zip(ours[1], plain[1], strict=True):
        if float(expected.norm()) > 1e-3:  # a key's bias changes nothing
            assert distance(actual, expected) < 3 * allowed


def test_soft_capped_scores_give_the_losses_of_the_rows_alone() -> None:
    model = tiny_architectures.tiny_model("gemma2").cuda()
    rows = [row | {"input_ids": [i % 150 for i in row["input_ids"]]} for row in make_rows(6)]
    pack = pack_rows(rows).to("cuda")
    with torch.no_grad():
        alone = torch.cat([token_losses(model, pack_rows([row]).to("cuda")) for row in rows])
        with attention.use_packed_attention(model):
            assert distance(token_losses(model, pack), alone) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("kind", "packed"), [("qwen3", True), ("gemma3_text", True), ("lfm2", False), ("mamba", False)]
)
def test_the_trial_of_packing_gives_the_cpus_verdict(
    kind: str, packed: bool, dtype: torch.dtype
) -> None:
    model = tiny_architectures.tiny_model(kind).to("cuda", dtype)
    assert (packing_obstacle(model) is None) == packed


@pytest.mark.parametrize("folder", ["tiny_phi", "tiny_llama"])
def test_gpu_and_cpu_give_the_same_losses_and_gradients(
    folder: str, request: pytest.FixtureRequest
) -> None:
    path, rows = request.getfixturevalue(folder), make_rows(6)
    cuda, cpu = [
        losses_and_gradients(adapted(path, WeightFormat("fp32"), kind), rows, True)
        for kind in ("cuda", "cpu")
    ]
    assert distance(cuda[0], cpu[0]) < 1e-5
    for actual, expected in zip(cuda[1], cpu[1], strict=True):
        assert distance(actual, expected) < 1e-3 or float(expected.norm()) < 1e-3


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="the kernels need a GPU of Ampere's generation or a later one",
)
@pytest.mark.parametrize("queries_per_key", [1, 3])
def test_the_varlen_kernel_keeps_rows_apart(
    queries_per_key: int,
) -> None:
    kernel = attention_varlen.choose_kernel(torch.bfloat16, 64, queries_per_key)
    assert kernel, "this PyTorch has no such kernels; rows go one by one"
    tokens = [torch.randn(1, heads, 200, 64, device="cuda", dtype=torch.bfloat16)
              for heads in (2 * queries_per_key, 2, 2)]  # fmt: skip
    other = [tensor.clone() for tensor in tokens]
    for tensor in other:
        tensor[:, :, :90] += 1  # the first row alone
    outputs = [attention_varlen._call(kernel, *each, [90, 110], None) for each in (tokens, other)]
    assert torch.equal(outputs[0][:, 90:], outputs[1][:, 90:])
    assert not torch.equal(outputs[0][:, :90], outputs[1][:, :90])


def test_gpu_and_cpu_give_the_same_replies(tiny_llama: Path) -> None:
    from jetson_ft.inference.generate import generate_replies

    tokenizer = load_tokenizer(BaseModelFiles("m", tiny_llama))
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    replies = [
        generate_replies(
            adapted(tiny_llama, WeightFormat("fp32"), kind), tokenizer, prompts, [2], 12
        )
        for kind in ("cuda", "cpu")
    ]
    assert replies[0] == replies[1]
