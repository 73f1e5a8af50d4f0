"""The fused LoRA layers give PEFT's own result and gradients, and leave the rest to PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from jetson_ft.models import lora
from jetson_ft.models.fused import fuse
from jetson_ft.models.load import Weights, load_model
from jetson_ft.models.lora import FusedLinear, make, register
from jetson_ft.models.resolve import Base

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])


def adapted(folder: Path, weights: Weights, fused: bool, **lora: Any) -> Any:
    """The model with an adapter that isn't the starting one."""
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        | lora
    )
    if fused:
        register(config)
    for module in (model := load_model(Base("m", folder), weights, "cpu")).modules():
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
def test_result_and_gradients_are_pefts(
    folder: str, rslora: bool, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(folder)
    mine, theirs = (
        adapted(path, Weights("fp32"), fused, use_rslora=rslora) for fused in (True, False)
    )
    assert fused_layers(mine) and not fused_layers(theirs)
    (logits, gradients), (own_logits, own_gradients) = results(mine), results(theirs)
    assert torch.allclose(logits, own_logits, atol=1e-5)
    assert gradients.keys() == own_gradients.keys()
    for name, gradient in gradients.items():
        assert float(own_gradients[name].abs().max()) > 0
        assert torch.allclose(gradient, own_gradients[name], rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_beside_quantised_weights_too(wide_phi: Path, quantize: str) -> None:
    weights = Weights("fp32", quantize)
    mine, theirs = (adapted(wide_phi, weights, fused) for fused in (True, False))
    assert fused_layers(mine)
    (logits, gradients), (own_logits, own_gradients) = results(mine), results(theirs)
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
def test_norms_and_activations_are_made_again_and_not_kept(
    folder: str, quantize: str, hidden_tensors: int, wide_tensors: int,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    """Only their own inputs, and attention's result, are left for backward."""
    path: Path = request.getfixturevalue(folder)
    own, mine = (adapted(path, Weights("fp32", quantize), True) for _ in range(2))
    fuse(mine)
    config = own.config
    layers, wide, hidden = config.num_hidden_layers, config.intermediate_size, config.hidden_size
    assert len(kept(mine, wide)) == layers * wide_tensors < len(kept(own, wide))
    # And the input of the last norm, behind the layers.
    assert len(kept(mine, hidden)) == layers * hidden_tensors + 1 < len(kept(own, hidden))
    (logits, gradients), (own_logits, own_gradients) = results(mine), results(own)
    assert torch.allclose(logits, own_logits, atol=1e-5)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, own_gradients[name], rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize(("quantize", "told"), [("nf4", True), ("int8", False)])
def test_a_layer_that_holds_its_input_holds_nothing_with_it(
    wide_phi: Path, quantize: str, told: bool
) -> None:
    """bitsandbytes' int8 layers do, past the backward pass and beside any checkpointing."""
    own, mine = (adapted(wide_phi, Weights("fp32", quantize), True) for _ in range(2))
    fuse(mine)
    inputs: list[torch.Tensor] = []
    for module in mine.modules():
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            module.register_forward_hook(lambda _, given, out: inputs.append(given[0]))
    (logits, gradients), (own_logits, own_gradients) = results(mine), results(own)
    assert inputs and any(vars(x) for x in inputs) is told
    assert torch.allclose(logits, own_logits, atol=1e-5)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, own_gradients[name], rtol=1e-3, atol=1e-6), name


def kept(model: Any, width: int) -> set[int]:
    """Addresses of the tokens' tensors of this width that a forward pass leaves for backward."""
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    found: list[torch.Tensor] = []  # and alive, so that no address is used twice

    def note(tensor: torch.Tensor) -> torch.Tensor:
        of_tokens = tensor.numel() == IDS.numel() * width
        if of_tokens and tensor.shape[-1] == width and tensor.data_ptr() not in weights:
            found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(IDS)
    return {tensor.data_ptr() for tensor in found}


def test_what_was_changed_since_is_kept_as_it_is() -> None:
    """As a model does that scales what a norm gives, in place."""
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["0"])
    register(config)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(5, 7)), config)
    layer = model.base_model.model[0]
    layer.lora_B["default"].weight.data.normal_()
    of = torch.randn(3, 5)
    changed, same = (make(torch.exp, of.exp(), of) for _ in range(2))
    changed.mul_(2)
    for x, factor in ((same, 1), (changed, 2)):
        model.zero_grad()
        layer(x).sum().backward()
        found = layer.lora_A["default"].weight.grad.clone()
        model.zero_grad()
        layer(factor * of.exp()).sum().backward()
        assert torch.allclose(found, layer.lora_A["default"].weight.grad)


def test_in_bf16_masters_and_gradients_stay_fp32(tiny_llama: Path) -> None:
    mine, theirs = (adapted(tiny_llama, Weights("bf16"), fused) for fused in (True, False))
    (logits, gradients), (own_logits, _) = results(mine), results(theirs)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    scale = float(own_logits.abs().max())
    assert float((logits - own_logits).abs().max()) < 0.03 * scale  # bf16 keeps 8 bits


def test_the_input_gradient_is_checked_numerically() -> None:
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["0"])
    register(config)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(5, 7)), config).double()
    layer = model.base_model.model[0]
    assert type(layer) is FusedLinear
    layer.lora_B["default"].weight.data.normal_()
    x = torch.randn(3, 5, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)


def test_layers_of_one_input_are_multiplied_at_once(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is learnt takes part from the next pass on."""
    at_once = lora._multiplied
    mine = adapted(tiny_llama, Weights("fp32"), True)
    fuse(mine)
    firsts = [one for one in mine.modules() if getattr(one, "siblings", ())]
    assert sorted(len(one.siblings) for one in firsts) == [1, 1, 2, 2]  # gate; query
    groups = []
    monkeypatch.setattr(
        lora, "_multiplied", lambda x, layers, *rest: groups.append(len(layers)) or at_once(
            x, layers, *rest
        )
    )  # fmt: skip
    mine(IDS)
    assert groups == [3, 1, 2, 1] * 2  # query, key, value; output; gate, up; down
    (logits, _), optimizer = results(mine), torch.optim.AdamW(mine.parameters(), lr=0.1, fused=True)
    optimizer.step()
    theirs = adapted(tiny_llama, Weights("fp32"), False)
    theirs.load_state_dict({n: p for n, p in mine.named_parameters() if p.requires_grad}, False)
    (found, gradients), (expected, own) = results(mine), results(theirs)
    assert not torch.allclose(found, logits, atol=1e-2)
    assert torch.allclose(found, expected, atol=1e-4)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, own[name], rtol=1e-3, atol=1e-6), name


@pytest.fixture
def pair() -> tuple[FusedLinear, FusedLinear]:
    """A layer and its sibling, fp64."""
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["0", "1"])
    register(config)
    plain = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(5, 6))
    first, second = get_peft_model(plain, config).double().base_model.model
    for layer in (first, second):
        layer.lora_B["default"].weight.data.normal_()
    first.siblings = (second,)
    return first, second


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5)])
def test_gradients_of_siblings_are_checked_numerically(
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
    assert torch.autograd.gradcheck(first, x), "its sibling is never asked"


@pytest.mark.parametrize("change", ["input", "adapter", "graph"])
def test_what_waited_is_not_served_after_a_change(
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
    found = second(x)
    assert torch.allclose(found, second(x.clone()))
    assert found.requires_grad is (change != "adapter")


def test_one_that_goes_pefts_way_leaves_the_others_theirs(
    pair: tuple[FusedLinear, FusedLinear],
) -> None:
    first, second = pair
    second.enable_adapters(False)
    x = torch.randn(3, 5, dtype=torch.double)
    assert torch.allclose(second.base_layer(x), (first(x), second(x))[1])


def test_only_layers_of_one_width_are_introduced(tiny_llama: Path) -> None:
    mine = adapted(tiny_llama, Weights("fp32"), True)
    layer = mine.base_model.model.model.layers[0].self_attn
    layer.k_proj.in_features += 1
    fuse(mine)
    assert layer.q_proj.siblings == ()


@pytest.mark.parametrize("setting", [{"use_dora": True}, {"lora_dropout": 0.5}])
def test_what_is_not_plain_lora_goes_pefts_way(tiny_llama: Path, setting: dict[str, Any]) -> None:
    mine, theirs = (adapted(tiny_llama, Weights("fp32"), fused, **setting) for fused in (1, 0))
    for model in (mine, theirs):
        model.train()
    found = []
    for model in (mine, theirs):
        torch.manual_seed(3)
        found.append(results(model)[0])
    assert torch.equal(*found)


def test_switched_off_it_is_the_base(tiny_llama: Path) -> None:
    mine = adapted(tiny_llama, Weights("fp32"), True)
    fuse(mine)
    base = load_model(Base("m", tiny_llama), Weights("fp32"), "cpu")
    with torch.no_grad(), mine.disable_adapter():
        assert torch.allclose(mine(IDS).logits, base(IDS).logits, atol=1e-5)


def test_the_saved_adapter_is_an_ordinary_one(tiny_llama: Path, tmp_path: Path) -> None:
    mine = adapted(tiny_llama, Weights("fp32"), True).eval()
    mine.save_pretrained(tmp_path)
    base = load_model(Base("m", tiny_llama), Weights("fp32"), "cpu")
    plain = PeftModel.from_pretrained(base, tmp_path)
    assert not fused_layers(plain)
    with torch.no_grad():
        assert torch.allclose(plain(IDS).logits, mine(IDS).logits, atol=1e-5)
