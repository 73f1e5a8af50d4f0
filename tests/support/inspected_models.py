"""Small models as the views of `jetson_ft.inside` take them."""

from __future__ import annotations

from pathlib import Path

from jetson_ft.chat.session import ChatSession


def load_base(folder: Path, quantize: str = "none") -> ChatSession:
    """Return a model of a folder without an adapter."""
    import torch

    from jetson_ft.models import loading
    from jetson_ft.models.files import BaseModelFiles

    torch.set_num_threads(1)
    base = BaseModelFiles("tiny", folder)
    weights = loading.WeightFormat("fp32", quantize)
    model = loading.load_model(base, weights, "cpu")
    return ChatSession(model, loading.load_tokenizer(base), False, 2048)


def with_adapter(base: ChatSession) -> ChatSession:
    """Attach an adapter whose B isn't zero, so that it changes every layer."""
    import torch

    from jetson_ft.adapter import attach_adapter
    from jetson_ft.recipe import LoraRecipe

    model = attach_adapter(base.model, LoraRecipe(rank=4), seed=0, fused=False).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    return ChatSession(model, base.tokenizer, True, base.context_length)
