"""Small models as the views take them: with an adapter that changes much, and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_architectures
from inspected_models import load_base, with_adapter
from tiny_models import CHAT_TEMPLATE, make_tokenizer

from jetson_ft.chat.session import ChatSession


@pytest.fixture(scope="session")
def llama(tiny_llama: Path) -> ChatSession:
    """Return a model with grouped heads; no test may change it."""
    return load_base(tiny_llama)


@pytest.fixture(scope="session")
def adapted(tiny_llama: Path) -> ChatSession:
    """Return a model with an adapter; no test may change it."""
    return with_adapter(load_base(tiny_llama))


@pytest.fixture(scope="session")
def small() -> Any:
    """Return a function that makes a small model of an architecture; its texts are Latin."""

    def make(kind: str) -> ChatSession:
        model = tiny_architectures.tiny_model(kind)
        return ChatSession(model, make_tokenizer(CHAT_TEMPLATE), False, 512)

    return make
