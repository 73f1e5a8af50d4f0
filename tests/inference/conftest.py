"""The tiny Phi with its tokenizer, ready to write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Writer:
    """A model, its tokenizer, and the ids that end its replies."""

    model: Any
    tokenizer: Any
    ends: list[int]

    def prompt(self, text: str) -> list[int]:
        """Ids of a conversation that waits for its first answer."""
        from jetson_ft.data.template import encode_prompt

        return encode_prompt(self.tokenizer, [{"role": "user", "content": text}])


@pytest.fixture(scope="session")
def writer(tiny_phi: Path) -> Writer:
    """Loaded once a session; no test changes it."""
    import torch

    from jetson_ft.data.template import end_ids
    from jetson_ft.models import load
    from jetson_ft.models.resolve import Base

    torch.set_num_threads(1)
    base = Base("tiny", tiny_phi)
    model, tokenizer = load.load_model(base, load.Weights("fp32"), "cpu"), load.load_tokenizer(base)
    return Writer(model, tokenizer, end_ids(tokenizer, model))
