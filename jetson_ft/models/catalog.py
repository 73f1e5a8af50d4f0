"""The models known by name: what planning needs of them, without their files or a network.

An entry has the values of the model's config.json that set its dimensions. These are computed here
from the values, not by `dims.dims_from_config`, which builds the model: for that torch and
transformers are imported, which takes seconds on a board, and `plan` and `models` need neither. A
test builds each model and compares.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jetson_ft.models import loading
from jetson_ft.models.dims import LinearGroup, ModelDims, ModuleGroup, ModuleKind, dims_from_config
from jetson_ft.models.files import BaseModelFiles, is_hub_id

# What transformers calls the classes of an architecture's layers, by `model_type`.
_CLASS_PREFIXES = {
    "phi": "Phi", "phi3": "Phi3", "llama": "Llama", "smollm3": "SmolLM3", "qwen2": "Qwen2",
    "qwen3": "Qwen3", "qwen3_5_text": "Qwen3_5", "gemma3_text": "Gemma3",
}  # fmt: skip


@dataclass(frozen=True)
class CatalogModel:
    """A model on the Hub."""

    config: dict[str, Any]  # `model_type` and values of the text model's config
    licence: str
    gated: bool = False  # the Hub gives it only to accounts that accepted its terms
    # In its files beside the text model: a head that equals the embedding, a vision tower.
    other_parameters: int = 0

    @cached_property
    def dims(self) -> ModelDims:
        return _count(self.config)

    @property
    def file_bytes(self) -> int:
        """Size of the weights on disk: two bytes for each parameter (bf16 or fp16)."""
        return 2 * (self.dims.parameters + self.other_parameters)


def _config(
    model_type: str, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int,
    head_dim: int, vocabulary: int, tied: bool = True, **others: Any,
) -> dict[str, Any]:  # fmt: skip
    return {
        "model_type": model_type, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": heads, "head_dim": head_dim,
        "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "tie_word_embeddings": tied,
        **others,
    }  # fmt: skip


# A hybrid: each fourth layer has attention, the others Gated DeltaNet.
_HYBRID: dict[str, Any] = {
    "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip
_APACHE = "Apache-2.0"
_SMOLLM2_135M = CatalogModel(_config("llama", 576, 1536, 30, 9, 3, 64, 49152), _APACHE)
_QWEN2_5_500M = CatalogModel(_config("qwen2", 896, 4864, 24, 14, 2, 64, 151936), _APACHE)
_QWEN2_5_1500M = CatalogModel(_config("qwen2", 1536, 8960, 28, 12, 2, 128, 151936), _APACHE)
_GEMMA_3_270M = CatalogModel(
    _config("gemma3_text", 640, 2048, 18, 4, 1, 256, 262144, sliding_window=512), "Gemma",
    gated=True,
)  # fmt: skip

# Sources: the models' config.json and, for what is in the files, the sizes on the Hub's pages.
# Unverified, as no config.json was at hand: that Qwen3.5-2B's head is tied (its published count of
# 1.88 billion needs it), and the vision towers of Qwen3.5-2B and -4B.
MODELS = {
    "embedded": _SMOLLM2_135M,
    "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM2_135M,
    "google/gemma-3-270m": _GEMMA_3_270M,
    "google/gemma-3-270m-it": _GEMMA_3_270M,
    "HuggingFaceTB/SmolLM2-360M-Instruct": CatalogModel(
        _config("llama", 960, 2560, 32, 15, 5, 64, 49152), _APACHE
    ),
    "Qwen/Qwen2.5-0.5B": _QWEN2_5_500M,
    "Qwen/Qwen2.5-0.5B-Instruct": _QWEN2_5_500M,
    "Qwen/Qwen3-0.6B": CatalogModel(
        _config("qwen3", 1024, 3072, 28, 16, 8, 128, 151936), _APACHE, other_parameters=155_582_464
    ),
    "Qwen/Qwen3.5-0.8B": CatalogModel(
        _config(
            "qwen3_5_text", 1024, 3584, 24, 8, 2, 256, 248320, **_HYBRID,
            linear_num_value_heads=16,
        ),
        _APACHE,
        other_parameters=121_045_760,
    ),
    "google/gemma-3-1b-it": CatalogModel(
        _config("gemma3_text", 1152, 6912, 26, 4, 1, 256, 262144, sliding_window=512), "Gemma",
        gated=True,
    ),
    "meta-llama/Llama-3.2-1B-Instruct": CatalogModel(
        _config("llama", 2048, 8192, 16, 32, 8, 64, 128256), "Llama 3.2", gated=True
    ),
    "microsoft/phi-1_5": CatalogModel(
        _config("phi", 2048, 8192, 24, 32, 32, 64, 51200, tied=False), "MIT"
    ),
    "Qwen/Qwen2.5-1.5B": _QWEN2_5_1500M,
    "Qwen/Qwen2.5-1.5B-Instruct": _QWEN2_5_1500M,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": CatalogModel(
        _config("llama", 2048, 8192, 24, 32, 32, 64, 49152), _APACHE
    ),
    "Qwen/Qwen3-1.7B": CatalogModel(
        _config("qwen3", 2048, 6144, 28, 16, 8, 128, 151936), _APACHE, other_parameters=311_164_928
    ),
    "Qwen/Qwen3.5-2B": CatalogModel(
        _config(
            "qwen3_5_text", 2048, 6144, 24, 8, 2, 256, 248320, **_HYBRID,
            linear_num_value_heads=16,
        ),
        _APACHE,
        other_parameters=392_244_736,
    ),
    "HuggingFaceTB/SmolLM3-3B": CatalogModel(
        _config("smollm3", 2048, 11008, 36, 16, 4, 128, 128256), _APACHE
    ),
    "meta-llama/Llama-3.2-3B-Instruct": CatalogModel(
        _config("llama", 3072, 8192, 28, 24, 8, 128, 128256), "Llama 3.2", gated=True
    ),
    "microsoft/Phi-4-mini-instruct": CatalogModel(
        _config("phi3", 3072, 8192, 32, 24, 8, 128, 200064, partial_rotary_factor=0.75), "MIT"
    ),
    "Qwen/Qwen3-4B": CatalogModel(_config("qwen3", 2560, 9728, 36, 32, 8, 128, 151936), _APACHE),
    "Qwen/Qwen3.5-4B": CatalogModel(
        _config(
            "qwen3_5_text", 2560, 9216, 32, 16, 4, 256, 248320, **_HYBRID,
            linear_num_value_heads=32,
        ),
        _APACHE,
        other_parameters=454_113_792,
    ),
    "Qwen/Qwen3-8B": CatalogModel(
        _config("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, tied=False), _APACHE
    ),
    "Qwen/Qwen3.5-9B": CatalogModel(
        _config(
            "qwen3_5_text", 4096, 12288, 32, 16, 4, 256, 248320, tied=False, **_HYBRID,
            linear_num_value_heads=32,
        ),
        _APACHE,
        other_parameters=699_301_104,
    ),
}  # fmt: skip


def known_dims(name: str) -> ModelDims | None:
    """Return the dimensions of a known model; None for others, and for a local path of its name."""
    return KNOWN_DIMS.get(name) if name == "embedded" or is_hub_id(name) else None


def model_dims(base: BaseModelFiles) -> ModelDims:
    """Return the dimensions of a model on disk; no weights are read.

    Raises:
        UserError: the config can't be read, or is of a model that can't be trained.
    """
    return known_dims(base.name) or dims_from_config(loading.load_config(base))


def nearest_name(name: str) -> str:
    """Return the known model whose name is most like this one, with or without its owner, or ""."""
    names = {part.lower(): known for known in MODELS for part in (known, known.split("/")[-1])}
    for wanted in (name.lower(), name.lower().split("/")[-1]):
        if near := difflib.get_close_matches(wanted, names, 1):
            return names[near[0]]
    return ""


def _count(config: dict[str, Any]) -> ModelDims:
    """Return the dimensions that a model of this config has, as `dims_from_config` counts them."""
    layers, head_dim = config["num_hidden_layers"], config["head_dim"]
    linears, modules, parameters = _parts(config)
    hybrid_layers = layers * 3 // 4 if "linear_attn.out_proj" in linears else 0
    classes = dict.fromkeys(linears, "Linear") | modules
    widths = {
        "self_attn.q_norm": head_dim, "self_attn.k_norm": head_dim,
        "linear_attn.norm": config.get("linear_value_head_dim", 0),
    }  # fmt: skip
    epsilons = {"LayerNorm": "eps", "Gemma3RMSNorm": "eps", "Qwen3_5RMSNorm": "eps"}

    def describe(path: str, class_name: str) -> ModuleKind:
        start = f"{path}."
        inside = {p.removeprefix(start): c for p, c in classes.items() if p.startswith(start)}
        if "Norm" in class_name:
            width = widths.get(path, config["hidden_size"])
            return ModuleKind(class_name, {}, epsilons.get(class_name, "variance_epsilon"), width)
        is_delta = class_name.endswith("GatedDeltaNet")
        return ModuleKind(class_name, inside, "layer_norm_epsilon" if is_delta else "")

    start, counts = "model.layers.*.", dict.fromkeys(classes, layers)
    for path in classes:
        if path.startswith("linear_attn"):
            counts[path] = hybrid_layers
        elif path.startswith("self_attn"):
            counts[path] = layers - hybrid_layers
    groups = [ModuleGroup(start + p, counts[p], describe(p, c)) for p, c in modules.items()]
    # The norms' weights, and the last norm's.
    parameters += sum(group.count * group.kind.width for group in groups) + config["hidden_size"]
    return ModelDims(
        layers=layers,
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=head_dim,
        vocabulary=config["vocab_size"],
        tied=config["tie_word_embeddings"],
        linears=tuple(LinearGroup(start + p, counts[p], *size) for p, size in linears.items()),
        modules=tuple(groups),
        other_parameters=parameters,
    )


def _parts(config: dict[str, Any]) -> tuple[dict[str, tuple[int, int]], dict[str, str], int]:
    """Return what a decoder layer consists of, in the order of its modules.

    That is: inputs and outputs of the linear layers, classes of the other modules, and the number
    of all the model's parameters that belong to neither a linear layer's weight nor a norm's.
    """
    model_type, layers = config["model_type"], config["num_hidden_layers"]
    hidden, inside, head_dim = (
        config[key] for key in ("hidden_size", "intermediate_size", "head_dim")
    )
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    prefix, parameters = _CLASS_PREFIXES[model_type], 0
    norm = f"{prefix}RMSNorm"
    projections = {
        "self_attn.q_proj": (hidden, q), "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv), "self_attn.o_proj": (q, hidden),
    }  # fmt: skip
    mlp = {
        "mlp.gate_proj": (hidden, inside), "mlp.up_proj": (hidden, inside),
        "mlp.down_proj": (inside, hidden),
    }  # fmt: skip
    linears = projections | mlp
    attention = {"self_attn": f"{prefix}Attention"}
    if model_type in ("qwen3", "qwen3_5_text", "gemma3_text"):
        attention |= {"self_attn.q_norm": norm, "self_attn.k_norm": norm}
    others = {
        "mlp": f"{prefix}MLP", "mlp.act_fn": "SiLUActivation", "input_layernorm": norm,
        "post_attention_layernorm": norm,
    }  # fmt: skip
    if model_type == "phi":
        linears = {
            "self_attn.q_proj": (hidden, q), "self_attn.k_proj": (hidden, kv),
            "self_attn.v_proj": (hidden, kv), "self_attn.dense": (q, hidden),
            "mlp.fc1": (hidden, inside), "mlp.fc2": (inside, hidden),
        }  # fmt: skip
        others = {
            "mlp": "PhiMLP", "mlp.activation_fn": "NewGELUActivation",
            "input_layernorm": "LayerNorm", "resid_dropout": "Dropout",
        }  # fmt: skip
        biases = sum(outputs for _inputs, outputs in linears.values()) + hidden  # and the norm's
        parameters = layers * biases + hidden + config["vocab_size"]  # the last norm's, the head's
    elif model_type == "phi3":
        linears = {
            "self_attn.o_proj": (q, hidden), "self_attn.qkv_proj": (hidden, q + 2 * kv),
            "mlp.gate_up_proj": (hidden, 2 * inside), "mlp.down_proj": (inside, hidden),
        }  # fmt: skip
        others = {
            "mlp": "Phi3MLP", "mlp.activation_fn": "SiLUActivation", "input_layernorm": norm,
            "post_attention_layernorm": norm, "resid_attn_dropout": "Dropout",
            "resid_mlp_dropout": "Dropout",
        }  # fmt: skip
    elif model_type == "gemma3_text":
        others["mlp.act_fn"] = "GELUTanh"
        others |= {"pre_feedforward_layernorm": norm, "post_feedforward_layernorm": norm}
    elif model_type == "qwen2":
        parameters = layers * (q + 2 * kv)  # biases
    elif model_type == "qwen3_5_text":
        gated_q = {"self_attn.q_proj": (hidden, 2 * q)}  # and the output's gate
        delta_linears, delta, of_layer = _delta_parts(config)
        linears = delta_linears | mlp | projections | gated_q
        return linears, delta | others | attention, layers * 3 // 4 * of_layer
    return linears, attention | others, parameters


def _delta_parts(
    config: dict[str, Any],
) -> tuple[dict[str, tuple[int, int]], dict[str, str], int]:
    """Return the same of Gated DeltaNet, which takes the place of attention in a hybrid's layer."""
    hidden, value_heads = config["hidden_size"], config["linear_num_value_heads"]
    value = value_heads * config["linear_value_head_dim"]
    mixed = value + 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"]
    linears = {
        "linear_attn.out_proj": (value, hidden), "linear_attn.in_proj_qkv": (hidden, mixed),
        "linear_attn.in_proj_z": (hidden, value), "linear_attn.in_proj_b": (hidden, value_heads),
        "linear_attn.in_proj_a": (hidden, value_heads),
    }  # fmt: skip
    prefix = _CLASS_PREFIXES[config["model_type"]]
    modules = {
        "linear_attn": f"{prefix}GatedDeltaNet", "linear_attn.conv1d": "Conv1d",
        "linear_attn.norm": f"{prefix}RMSNormGated",
    }  # fmt: skip
    convolution, decays = mixed * config["linear_conv_kernel_dim"], 2 * value_heads
    return linears, modules, convolution + decays


KNOWN_DIMS = {name: model.dims for name, model in MODELS.items()}
