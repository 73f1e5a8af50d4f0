"""Which models can be trained: causal language models with unquantized weights."""

from __future__ import annotations

import inspect
from typing import Any

from jetson_ft.errors import UserError, _

# They read a text in both directions, or permuted; transformers loads them for text generation too.
_NOT_CAUSAL = {
    "bert", "bert-generation", "big_bird", "camembert", "cpmant", "data2vec-text", "electra",
    "ernie", "megatron-bert", "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert",
    "roformer", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod",
}  # fmt: skip


def check_config(config: Any) -> None:
    """Check a transformers config before its model is built.

    Raises:
        UserError: no causal language model can be loaded from it, or its weights are quantized.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    what = ""
    if config.is_encoder_decoder:
        what = _("{name} is an encoder-decoder; only causal language models can be trained.")
    elif config.model_type in _NOT_CAUSAL:
        what = _("{name} is no causal language model; only such models can be trained.")
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        what = _("{name} is no causal language model; only such models can be trained.")
        if any(name in config.sub_configs for name in ("text_config", "vision_config")):
            what = _("{name} is a multimodal model whose text part transformers can't load alone.")
    if what:
        fix = _("Choose a model for text generation, as Qwen3, Gemma 3 or Llama.")
        raise UserError(what, model_label(config), fix, name=config.model_type)
    quantization = getattr(config, "quantization_config", None)
    quantization = quantization or getattr(config.get_text_config(), "quantization_config", None)
    if quantization:
        if not isinstance(quantization, dict):
            quantization = quantization.to_dict()
        raise UserError(
            _("The model's weights are quantized already ({method}), and can't be used."),
            model_label(config),
            _("Name the model's unquantized version; `quantize: nf4` makes it as small."),
            method=quantization.get("quant_method") or "quantization_config",
        )


def check_model(model: Any) -> None:
    """Check a model that transformers has built, with or without weights.

    Raises:
        UserError: the training loop can't compute its loss.
    """
    forward = inspect.signature(model.forward).parameters
    if model.get_output_embeddings() is None or "logits_to_keep" not in forward:
        raise UserError(
            _("transformers' {name} can't compute single logits, which training needs."),
            model_label(model.config),
            _("Choose another model."),
            name=model.config.model_type,
        )


def model_label(config: Any) -> str:
    """Return the folder or name that a config was loaded from, else its architecture."""
    return str(getattr(config, "name_or_path", "") or config.model_type)
