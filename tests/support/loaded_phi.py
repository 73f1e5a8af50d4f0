"""The tiny Phi, loaded with its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class LoadedModel:
    """A model, its tokenizer, and the ids that end its replies."""

    model: Any
    tokenizer: Any
    eos_ids: list[int]

    def prompt(self, text: str) -> list[int]:
        """Return the ids of a conversation with one question."""
        from jetson_ft.data.chat_template import encode_prompt

        return encode_prompt(self.tokenizer, [{"role": "user", "content": text}])


@pytest.fixture(scope="session")
def phi(tiny_phi: Path) -> LoadedModel:
    """Return the model, loaded once a session; no test may change it."""
    import torch

    from jetson_ft.data.chat_template import end_ids
    from jetson_ft.models import loading
    from jetson_ft.models.files import BaseModelFiles

    torch.set_num_threads(1)
    base = BaseModelFiles("tiny", tiny_phi)
    model = loading.load_model(base, loading.WeightFormat("fp32"), "cpu")
    tokenizer = loading.load_tokenizer(base)
    return LoadedModel(model, tokenizer, end_ids(tokenizer, model))
