"""The kinds of layers that this package speeds up.

`fused_layers.fuse_layers` replaces what an entry matches; `training.cost_model` counts by the same
entries which tensors a layer keeps for its backward pass. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from jetson_ft.models.dims import ModelDims, ModuleKind


@dataclass(frozen=True)
class LayerFamily:
    """One kind of layer: how it is recognized, what replaces it, what it keeps for backward."""

    name: str
    role: Literal["norm", "gated_mlp", "mlp", "attention"]  # its part in a decoder layer
    matches: Callable[[ModuleKind], bool]
    # Function of `fused_layers`, the new `forward`; "": the model's own stays. The result of a new
    # norm or MLP is recomputed (`lora_linear.mark_recomputable`), not kept.
    replacement: str = ""
    # Tensors kept besides the result, as wide as the hidden state (norm) or as the inside of the
    # MLP. For attention see `training.cost_model.CostModel.attention_outputs_kept`.
    saved_inputs: int = 0


def _is_rms_norm(kind: ModuleKind) -> bool:
    return kind.class_name.endswith("RMSNorm") and kind.epsilon == "variance_epsilon"


def _is_swiglu(kind: ModuleKind) -> bool:
    has_parts = {"gate_proj", "up_proj", "down_proj", "act_fn"} <= kind.children.keys()
    return has_parts and "silu" in kind.children["act_fn"].lower()


def _is_rotary(kind: ModuleKind) -> bool:
    # These compute only q/k/v projections, rotary embedding, attention and output projection.
    names = {"LlamaAttention", "MistralAttention", "PhiAttention", "Qwen2Attention"}
    return kind.class_name in names and "q_layernorm" not in kind.children


def _has_name(name: str) -> Callable[[ModuleKind], bool]:
    return lambda kind: kind.class_name == name


# The first match is the one that `fuse_layers` replaces and `saved_tensors` counts. The last three
# are what every other model has.
FAMILIES = (
    LayerFamily("rms_norm", "norm", _is_rms_norm, "rms_norm", 1),
    LayerFamily("layer_norm", "norm", _has_name("LayerNorm"), "layer_norm", 1),
    LayerFamily("swiglu", "gated_mlp", _is_swiglu, "swiglu_mlp", 2),
    LayerFamily("gelu_tanh", "mlp", _has_name("NewGELUActivation"), "gelu_new", 1),
    LayerFamily("rotary", "attention", _is_rotary, "rotary_attention"),
    LayerFamily("other_norm", "norm", lambda _: True, saved_inputs=1),
    # Inputs of the activation and of the product: gate, activated gate, up.
    LayerFamily("other_gated_mlp", "gated_mlp", lambda _: True, saved_inputs=3),
    LayerFamily("other_mlp", "mlp", lambda _: True, saved_inputs=1),
)

# Layers that a module applies to the same input, in this order, by their names in it.
LINKED_LAYERS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def saved_tensors(dims: ModelDims, *, recompute: bool = True) -> tuple[int, int]:
    """Count the tensors that norms and MLP of one layer with adapters keep for backward.

    Return how many are as wide as the hidden state, and as the inside of the MLP. `recompute` is
    False where the linear layers hold their own inputs (bitsandbytes' int8).
    """
    # For Conv1D `lora_linear` has no layer: PEFT's own holds its input.
    recompute = recompute and not any(linear.is_conv1d for linear in dims.linears)

    def count(role: str, kinds: Sequence[ModuleKind]) -> int:
        entries = (family for family in FAMILIES if family.role == role)
        family = next(entry for entry in entries if any(map(entry.matches, kinds)))
        return family.saved_inputs + (0 if recompute and family.replacement else 1)

    hidden = sum(group.count * count("norm", [group.kind]) for group in dims.norms)
    kinds = [group.kind for group in dims.modules]
    return hidden // dims.layers, count("gated_mlp" if dims.is_gated else "mlp", kinds)


_LOGIT_BYTES = 32 * 2**20  # logits that exist at one time
# Logits in fp32 at one time: so few that a CPU's caches hold them; a GPU is faster with
# large kernels.
_SOFTMAX_BYTES = {"cpu": 8 * 2**20, "cuda": 32 * 2**20}


def head_chunk_rows(vocabulary: int, bytes_per_number: int, device: str) -> tuple[int, int]:
    """Return how many positions the head projects at once, and how many go through the softmax."""
    rows = max(16, _LOGIT_BYTES // (bytes_per_number * vocabulary))
    return rows, max(8, _SOFTMAX_BYTES[device] // (4 * vocabulary))
