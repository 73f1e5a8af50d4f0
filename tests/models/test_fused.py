"""Fused layers give what the model's own give, and nothing else is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck
from transformers import AutoModelForCausalLM
from transformers.activations import NewGELUActivation
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from jetson_ft.models.fused import _RMSNorm, _SwiGLU, fuse

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def grads(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(IDS).logits.square().mean().backward()
    # Norms are frozen in training: their own gradient isn't made.
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.ndim > 1}


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("tiny_llama", {"rms_norm": 5, "swiglu": 2, "rotary": 2}),
        ("tiny_phi", {"layer_norm": 3, "gelu_tanh": 2, "rotary": 2}),
    ],
)
def test_logits_and_gradients_stay(
    folder: str, expected: dict[str, int], request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(folder)
    own, mine = (AutoModelForCausalLM.from_pretrained(path) for _ in range(2))
    assert fuse(mine) == expected
    with torch.no_grad():
        assert torch.allclose(mine(IDS).logits, own(IDS).logits, atol=1e-5)
    for (name, found), theirs in zip(grads(mine).items(), grads(own).values(), strict=True):
        assert torch.allclose(found, theirs, rtol=1e-3, atol=1e-7), name


def test_gradients_are_checked_numerically() -> None:
    torch.manual_seed(0)
    x, y = (torch.randn(3, 8, dtype=torch.double, requires_grad=True) for _ in range(2))
    weight = torch.randn(8, dtype=torch.double)
    assert gradcheck(lambda a: _RMSNorm.apply(a, weight, 1e-6)[0], x, atol=1e-5)
    assert gradcheck(_SwiGLU.apply, (x, y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_keeps_the_dtype_and_computes_in_fp32(dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(64).to(dtype)
    x = (100 * torch.randn(4, 64)).to(dtype).requires_grad_()  # its squares overflow fp16
    mine, _ = _RMSNorm.apply(x, norm.weight, norm.variance_epsilon)
    assert mine.dtype == dtype
    assert torch.allclose(mine.float(), norm(x).float(), rtol=0.01)
    (gradient,) = torch.autograd.grad(mine.float().sum(), x)
    assert gradient.dtype == dtype
    assert bool(gradient.isfinite().all())


def test_a_module_of_that_name_that_computes_something_else_is_left() -> None:
    class OtherRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) + 1

    class OtherGELU(NewGELUActivation):
        pass

    OtherGELU.__name__ = "NewGELUActivation"
    OtherGELU.forward = lambda self, x: x  # type: ignore[method-assign]
    model = torch.nn.ModuleList([OtherRMSNorm(16), OtherGELU()])
    assert fuse(model) == {}
