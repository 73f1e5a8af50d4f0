"""The fused LoRA layers give PEFT's own result and gradients, and use PEFT for all others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from jetson_ft.kernels import lora_linear
from jetson_ft.kernels.fused_layers import fuse_layers
from jetson_ft.kernels.lora_linear import FusedLinear, mark_recomputable, register_layers
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.models.loading import WeightFormat, load_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])


def adapted(folder: Path, weights: WeightFormat, fused: bool, **lora: Any) -> Any:
    """The model with an adapter that isn't the starting one."""
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        | lora
    )
    if fused:
        register_layers(config)
    for module in (model := load_model(BaseModelFiles("m", folder), weights, "cpu")).modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    torch.manual_seed(0)
    model = get_peft_model(model, config)
    random = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=random)
    return model


def results(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradient of every trained parameter."""
    model.zero_grad()
    logits = model(IDS).logits
    logits.float().square().mean().backward()
    return logits.detach(), {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def fused_layers(model: Any) -> int:
    return sum("Fused" in type(module).__name__ for module in model.modules())


@pytest.mark.parametrize("folder", ["tiny_phi", "tiny_llama"])
@pytest.mark.parametrize("rslora", [False, True])
def test_fused_layers_give_pefts_result_and_gradients(
    folder: str, rslora: bool, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(folder)
    ours, peft = (
        adapted(path, WeightFormat("fp32"), fused, use_rslora=rslora) for fused in (True, False)
    )
    assert fused_layers(ours) and not fused_layers(peft)
    (logits, gradients), (own_logits, own_gradients) = results(ours), results(peft)
    assert torch.allclose(logits, own_logits, atol=1e-5)
    assert gradients.keys() == own_gradients.keys()
    for name, gradient in gradients.items():
        assert float(own_gradients[name].abs().max()) > 0
        assert torch.allclose(gradient, own_gradients[name], rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_quantized_fused_layers_give_pefts_result_and_gradients(
    wide_phi: Path, quantize: str
) -> None:
    weights = WeightFormat("fp32", quantize)
    ours, peft = (adapted(wide_phi, weights, fused) for fused in (True, False))
    assert fused_layers(ours)
    (logits, gradients), (own_logits, own_gradients) = results(ours), results(peft)
    assert torch.allclose(logits, own_logits, atol=1e-4)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, own_gradients[name], rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize(
    ("folder", "quantize", "hidden_tensors", "wide_tensors"),
    [
        ("tiny_llama", "none", 3, 2),
        ("wide_phi", "none", 2, 1),
        ("wide_phi", "nf4", 2, 1),
    ],
)
def test_results_of_norms_and_activations_are_recomputed_and_not_kept(
    folder: str, quantize: str, hidden_tensors: int, wide_tensors: int,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    """Only their eager inputs, and attention's result, are left for backward."""
    path: Path = request.getfixturevalue(folder)
    eager, fused_model = (adapted(path, WeightFormat("fp32", quantize), True) for _ in range(2))
    fuse_layers(fused_model)
    config = eager.config
    layers, wide, hidden = config.num_hidden_layers, config.intermediate_size, config.hidden_size
    assert len(kept(fused_model, wide)) == layers * wide_tensors < len(kept(eager, wide))
    # And the input of the last norm, behind the layers.
    assert len(kept(fused_model, hidden)) == layers * hidden_tensors + 1 < len(kept(eager, hidden))
    (logits, gradients), (own_logits, own_gradients) = results(fused_model), results(eager)
    assert torch.allclose(logits, own_logits, atol=1e-5)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, own_gradients[name], rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize(("quantize", "is_marked"), [("nf4", True), ("int8", False)])
def test_an_input_that_int8_layers_hold_has_no_recompute_mark(
    wide_phi: Path, quantize: str, is_marked: bool
) -> None:
    """bitsandbytes' int8 layers do, past the backward pass and beside any checkpointing."""
    eager, fused_model = (adapted(wide_phi, WeightFormat("fp32", quantize), True) for _ in range(2))
    fuse_layers(fused_model)
    inputs: list[torch.Tensor] = []
    for module in fused_model.modules():
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            module.register_forward_hook(lambda _, given, out: inputs.append(given[0]))
    (logits, gradients), (own_logits, own_gradients) = results(fused_model), results(eager)
    assert inputs and any(vars(x) for x in inputs) is is_marked
    assert torch.allclose(logits, own_logits, atol=1e-5)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, own_gradients[name], rtol=1e-3, atol=1e-6), name


def kept(model: Any, width: int) -> set[int]:
    """Addresses of the tokens' tensors of this width that a forward pass leaves for backward."""
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    tensors: list[torch.Tensor] = []  # kept alive, so that no address is used twice

    def note(tensor: torch.Tensor) -> torch.Tensor:
        of_tokens = tensor.numel() == IDS.numel() * width
        if of_tokens and tensor.shape[-1] == width and tensor.data_ptr() not in weights:
            tensors.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(IDS)
    return {tensor.data_ptr() for tensor in tensors}


def test_a_result_changed_after_its_mark_is_kept() -> None:
    """As a model does that scales what a norm gives, in place."""
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["0"])
    register_layers(config)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(5, 7)), config)
    layer = model.base_model.model[0]
    layer.lora_B["default"].weight.data.normal_()
    of = torch.randn(3, 5)
    changed, same = (mark_recomputable(torch.exp, of.exp(), of) for _ in range(2))
    changed.mul_(2)
    for x, factor in ((same, 1), (changed, 2)):
        model.zero_grad()
        layer(x).sum().backward()
        actual = layer.lora_A["default"].weight.grad.clone()
        model.zero_grad()
        layer(factor * of.exp()).sum().backward()
        assert torch.allclose(actual, layer.lora_A["default"].weight.grad)


def test_in_bf16_masters_and_gradients_stay_fp32(tiny_llama: Path) -> None:
    ours, peft = (adapted(tiny_llama, WeightFormat("bf16"), fused) for fused in (True, False))
    (logits, gradients), (own_logits, _) = results(ours), results(peft)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    scale = float(own_logits.abs().max())
    assert float((logits - own_logits).abs().max()) < 0.03 * scale  # bf16 keeps 8 bits


def test_the_input_gradient_is_checked_numerically() -> None:
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["0"])
    register_layers(config)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(5, 7)), config).double()
    layer = model.base_model.model[0]
    assert type(layer) is FusedLinear
    layer.lora_B["default"].weight.data.normal_()
    x = torch.randn(3, 5, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)


def test_linked_layers_are_multiplied_at_once(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with weights that an optimizer changed since the last pass."""
    multiply = lora_linear._multiply
    ours = adapted(tiny_llama, WeightFormat("fp32"), True)
    fuse_layers(ours)
    firsts = [one for one in ours.modules() if getattr(one, "linked_layers", ())]
    assert sorted(len(one.linked_layers) for one in firsts) == [1, 1, 2, 2]  # gate; query
    groups = []
    monkeypatch.setattr(
        lora_linear, "_multiply", lambda x, layers, *rest: groups.append(len(layers)) or multiply(
            x, layers, *rest
        )
    )  # fmt: skip
    ours(IDS)
    assert groups == [3, 1, 2, 1] * 2  # query, key, value; output; gate, up; down
    (logits, _), optimizer = results(ours), torch.optim.AdamW(ours.parameters(), lr=0.1, fused=True)
    optimizer.step()
    peft = adapted(tiny_llama, WeightFormat("fp32"), False)
    peft.load_state_dict({n: p for n, p in ours.named_parameters() if p.requires_grad}, False)
    (actual, gradients), (expected, own) = results(ours), results(peft)
    assert not torch.allclose(actual, logits, atol=1e-2)
    assert torch.allclose(actual, expected, atol=1e-4)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, own[name], rtol=1e-3, atol=1e-6), name


@pytest.fixture
def pair() -> tuple[FusedLinear, FusedLinear]:
    """Return a layer and the one linked to it, fp64."""
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["0", "1"])
    register_layers(config)
    plain = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(5, 6))
    first, second = get_peft_model(plain, config).double().base_model.model
    for layer in (first, second):
        layer.lora_B["default"].weight.data.normal_()
    first.linked_layers = (second,)
    return first, second


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5)])
def test_gradients_of_linked_layers_are_checked_numerically(
    pair: tuple[FusedLinear, FusedLinear], shape: tuple[int, ...]
) -> None:
    """The input's and every adapter's, results changed in place as some models do."""
    first, second = pair
    names = [f"{part}.default.weight" for part in ("lora_A", "lora_B")]
    masters = [layer.get_parameter(name) for layer in pair for name in names]

    def both(x: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        one, other = first(x), second(x)
        assert one.grad_fn is other.grad_fn
        return one.clamp_(-1, 1), other.mul_(2)

    x = torch.randn(shape, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(both, (x, *masters))
    assert torch.autograd.gradcheck(first, x), "the linked layer is not called"


@pytest.mark.parametrize("change", ["input", "adapter", "graph"])
def test_a_product_is_computed_anew_after_a_change(
    pair: tuple[FusedLinear, FusedLinear], change: str
) -> None:
    first, second = pair
    x = torch.randn(3, 5, dtype=torch.double)
    with torch.set_grad_enabled(change != "graph"):
        first(x)
    if change == "input":
        x.mul_(2)
    if change == "adapter":
        second.enable_adapters(False)
    actual = second(x)
    assert torch.allclose(actual, second(x.clone()))
    assert actual.requires_grad is (change != "adapter")


def test_a_linked_layer_with_pefts_forward_does_not_affect_the_first(
    pair: tuple[FusedLinear, FusedLinear],
) -> None:
    first, second = pair
    second.enable_adapters(False)
    x = torch.randn(3, 5, dtype=torch.double)
    assert torch.allclose(second.base_layer(x), (first(x), second(x))[1])


def test_layers_of_different_widths_are_not_linked(tiny_llama: Path) -> None:
    ours = adapted(tiny_llama, WeightFormat("fp32"), True)
    layer = ours.base_model.model.model.layers[0].self_attn
    layer.k_proj.in_features += 1
    fuse_layers(ours)
    assert layer.q_proj.linked_layers == ()


@pytest.mark.parametrize("setting", [{"use_dora": True}, {"lora_dropout": 0.5}])
def test_dora_and_dropout_use_pefts_forward(tiny_llama: Path, setting: dict[str, Any]) -> None:
    ours, peft = (adapted(tiny_llama, WeightFormat("fp32"), fused, **setting) for fused in (1, 0))
    for model in (ours, peft):
        model.train()
    logits = []
    for model in (ours, peft):
        torch.manual_seed(3)
        logits.append(results(model)[0])
    assert torch.equal(*logits)


def test_a_disabled_adapter_gives_the_base(tiny_llama: Path) -> None:
    ours = adapted(tiny_llama, WeightFormat("fp32"), True)
    fuse_layers(ours)
    base = load_model(BaseModelFiles("m", tiny_llama), WeightFormat("fp32"), "cpu")
    with torch.no_grad(), ours.disable_adapter():
        assert torch.allclose(ours(IDS).logits, base(IDS).logits, atol=1e-5)


def test_a_saved_adapter_loads_in_plain_peft(tiny_llama: Path, tmp_path: Path) -> None:
    ours = adapted(tiny_llama, WeightFormat("fp32"), True).eval()
    ours.save_pretrained(tmp_path)
    base = load_model(BaseModelFiles("m", tiny_llama), WeightFormat("fp32"), "cpu")
    plain = PeftModel.from_pretrained(base, tmp_path)
    assert not fused_layers(plain)
    with torch.no_grad():
        assert torch.allclose(plain(IDS).logits, ours(IDS).logits, atol=1e-5)
