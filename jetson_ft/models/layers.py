"""The linear layers of a torch model: which can have an adapter, which bitsandbytes quantizes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

# Parts that rows of text never reach: towers for other inputs, and attention to an encoder.
_OTHER_INPUTS = re.compile(
    r"vision|visual|image|audio|speech|video|projector|encoder_attn|cross_?att|embed_tokens_extend"
)
# Subclasses of Linear whose `forward` is a plain product; those of others sort or group tokens.
_PLAIN_SUBCLASSES = {"FalconLinear", "NonDynamicallyQuantizableLinear"}
# Layers whose weights the model reads directly, by its type; PEFT refuses Mamba's `out_proj`.
_MAMBA_MODELS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
_READ_DIRECTLY = {
    **dict.fromkeys(_MAMBA_MODELS, ("out_proj", "dt_proj")),
    **dict.fromkeys(("gemma3n", "gemma3n_text"), ("correction_coefs",)),
}

# Why a linear layer can't have an adapter.
OTHER_INPUTS, OWN_FORWARD, NO_EFFECT = "other inputs", "own forward", "refused or no effect"


def linear_layers(model: Any) -> dict[str, str]:
    """Return the path of each linear layer below the head, with why it can't have an adapter.

    The reason is "" for a layer that can. Experts that are stored as one tensor are no linear
    layers.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    language_part = _language_part(model)
    layers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head
    }
    refused = _names_without_effect(model, {path.rpartition(".")[2] for path in layers})

    def reason(path: str, layer: Any) -> str:
        if not f"{path}.".startswith(language_part) or _OTHER_INPUTS.search(path):
            return OTHER_INPUTS
        has_own_forward = type(layer).forward not in (torch.nn.Linear.forward, Conv1D.forward)
        is_quantized = type(layer).__module__.startswith("bitsandbytes")
        if has_own_forward and not is_quantized and type(layer).__name__ not in _PLAIN_SUBCLASSES:
            return OWN_FORWARD
        return NO_EFFECT if path.rpartition(".")[2] in refused else ""

    return {path: reason(path, layer) for path, layer in layers.items()}


def _language_part(model: Any) -> str:
    """Return the start of the paths of a multimodal model's language part; "" for other models."""
    if model.config.get_text_config() is model.config:
        return ""
    decoder = model.get_decoder()
    paths = (path for path, module in model.named_modules() if module is decoder)
    path = next(paths, "")
    return f"{path}." if path else ""


def _names_without_effect(model: Any, names: Iterable[str]) -> set[str]:
    """Return the names of layers on which an adapter is refused, misplaced, or without effect.

    For models whose experts were linear layers in transformers 4 and are one tensor now, PEFT
    changes targets with the experts' old names to targets on that tensor, when it attaches an
    adapter and when it loads one. Dense layers of the same names get nothing then.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    model_type = model.config.model_type
    refused = set(_READ_DIRECTLY.get(model_type, ()))
    if get_checkpoint_conversion_mapping(model_type) is None:
        return refused
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    for name in names:
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # half of a pair that became one tensor
            refused.add(name)
        if config.target_parameters:
            refused.add(name)
    return refused


def quantized_layers(model: Any) -> set[str]:
    """Return the paths of the layers that transformers lets bitsandbytes quantize.

    It passes over subclasses of Linear, experts stored as one tensor, the head, tied layers.
    """
    import torch
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())]
    return {
        path
        for path, module in model.named_modules()
        if (type(module) is torch.nn.Linear or isinstance(module, Conv1D))
        and should_convert_module(path, kept)
    }


def is_expert_tensor(module: Any, parameter: Any) -> bool:
    """Return whether a module's parameter holds the weights of several experts."""
    return parameter.ndim == 3 and "Experts" in type(module).__name__
