"""Dimensions of known models, for planning where neither their files nor a network are at hand."""

from __future__ import annotations

from typing import Any

from jetson_ft.models import loading
from jetson_ft.models.dims import LinearGroup, ModelDims, ModuleGroup, ModuleKind, dims_from_config
from jetson_ft.models.files import BaseModelFiles


def model_dims(base: BaseModelFiles) -> ModelDims:
    """Return the dimensions of a model on disk; no weights are read."""
    return KNOWN_DIMS.get(base.name) or dims_from_config(loading.load_config(base))


def _dims(
    layers: int, hidden: int, linears: dict[str, tuple[int, int]],
    modules: dict[str, str], **others: Any,
) -> ModelDims:  # fmt: skip
    """Return the dimensions of a decoder whose layers all have these parts, by their paths."""
    classes = dict.fromkeys(linears, "Linear") | modules

    def describe(path: str, class_name: str) -> ModuleKind:
        prefix = f"{path}."
        inside = {p.removeprefix(prefix): c for p, c in classes.items() if p.startswith(prefix)}
        if not class_name.endswith("Norm"):
            return ModuleKind(class_name, inside)
        epsilon = "eps" if class_name == "LayerNorm" else "variance_epsilon"
        return ModuleKind(class_name, inside, epsilon, hidden)

    start = "model.layers.*."
    groups = [LinearGroup(start + path, layers, *size) for path, size in linears.items()]
    kinds = [ModuleGroup(start + path, layers, describe(path, c)) for path, c in modules.items()]
    return ModelDims(layers, hidden, linears=tuple(groups), modules=tuple(kinds), **others)


KNOWN_DIMS = {
    "microsoft/phi-1_5": _dims(
        layers=24, hidden=2048, intermediate=8192, heads=32, kv_heads=32, head_dim=64,
        vocabulary=51200, tied=False, other_parameters=595_968,
        linears={
            "self_attn.q_proj": (2048, 2048), "self_attn.k_proj": (2048, 2048),
            "self_attn.v_proj": (2048, 2048), "self_attn.dense": (2048, 2048),
            "mlp.fc1": (2048, 8192), "mlp.fc2": (8192, 2048),
        },
        modules={
            "self_attn": "PhiAttention", "mlp": "PhiMLP", "mlp.activation_fn": "NewGELUActivation",
            "input_layernorm": "LayerNorm", "resid_dropout": "Dropout",
        },
    ),
    "embedded": _dims(
        layers=30, hidden=576, intermediate=1536, heads=9, kv_heads=3, head_dim=64,
        vocabulary=49152, tied=True, other_parameters=35_136,
        linears={
            "self_attn.q_proj": (576, 576), "self_attn.k_proj": (576, 192),
            "self_attn.v_proj": (576, 192), "self_attn.o_proj": (576, 576),
            "mlp.gate_proj": (576, 1536), "mlp.up_proj": (576, 1536),
            "mlp.down_proj": (1536, 576),
        },
        modules={
            "self_attn": "LlamaAttention", "mlp": "LlamaMLP", "mlp.act_fn": "SiLUActivation",
            "input_layernorm": "LlamaRMSNorm", "post_attention_layernorm": "LlamaRMSNorm",
        },
    ),
}  # fmt: skip
