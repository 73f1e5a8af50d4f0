"""Fused layers give what the model's own give; no other layer is replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck
from transformers import AutoModelForCausalLM
from transformers.activations import NewGELUActivation
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from jetson_ft.kernels import fused_layers
from jetson_ft.kernels.families import LayerFamily
from jetson_ft.kernels.fused_layers import _RMSNorm, _SwiGLU, fuse_layers

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def grads(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(IDS).logits.square().mean().backward()
    # Norms are frozen in training and get no gradient.
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.ndim > 1}


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("tiny_llama", {"rms_norm": 5, "swiglu": 2, "rotary": 2}),
        ("tiny_phi", {"layer_norm": 3, "gelu_tanh": 2, "rotary": 2}),
    ],
)
def test_fused_logits_and_gradients_are_the_models_own(
    folder: str, expected: dict[str, int], request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(folder)
    own, fused = (AutoModelForCausalLM.from_pretrained(path) for _ in range(2))
    assert fuse_layers(fused) == expected
    with torch.no_grad():
        assert torch.allclose(fused(IDS).logits, own(IDS).logits, atol=1e-5)
    for (name, actual), expected_gradient in zip(
        grads(fused).items(), grads(own).values(), strict=True
    ):
        assert torch.allclose(actual, expected_gradient, rtol=1e-3, atol=1e-7), name


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
    fused, _ = _RMSNorm.apply(x, norm.weight, norm.variance_epsilon)
    assert fused.dtype == dtype
    assert torch.allclose(fused.float(), norm(x).float(), rtol=0.01)
    (gradient,) = torch.autograd.grad(fused.float().sum(), x)
    assert gradient.dtype == dtype
    assert bool(gradient.isfinite().all())


def test_a_module_of_a_known_name_that_computes_otherwise_is_not_replaced() -> None:
    class OtherRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) + 1

    class OtherGELU(NewGELUActivation):
        pass

    OtherGELU.__name__ = "NewGELUActivation"
    OtherGELU.forward = lambda self, x: x  # type: ignore[method-assign]
    model = torch.nn.ModuleList([OtherRMSNorm(16), OtherGELU()])
    assert fuse_layers(model) == {}


def test_lack_of_memory_in_the_trial_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def lack_memory(module: Any, x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(fused_layers, "rms_norm", lack_memory)
    with pytest.raises(torch.OutOfMemoryError):
        fuse_layers(torch.nn.ModuleList([LlamaRMSNorm(16)]))


def test_two_matching_families_apply_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def other_rms_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
        return fused_layers.rms_norm(module, x)

    monkeypatch.setattr(fused_layers, "other_rms_norm", other_rms_norm, raising=False)
    families = tuple(
        LayerFamily(name, "norm", lambda kind: "Norm" in kind.class_name, name)
        for name in ("rms_norm", "other_rms_norm")
    )
    monkeypatch.setattr(fused_layers, "FAMILIES", families)
    norm: Any = LlamaRMSNorm(16)
    assert fuse_layers(torch.nn.ModuleList([norm])) == {"rms_norm": 1}
    assert norm.forward.__func__ is fused_layers.rms_norm
