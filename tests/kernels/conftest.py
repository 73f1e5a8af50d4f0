"""Tiny models, and attention as on a CPU or on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(params=["tiny_phi", "tiny_llama"])
def model(request: pytest.FixtureRequest) -> Any:
    from transformers import AutoModelForCausalLM

    folder: Path = request.getfixturevalue(request.param)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(params=[True, False], ids=["as on a CPU", "as on a GPU"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention in blocks, as on a CPU, or row by row, as on a GPU."""
    from jetson_ft.kernels import attention

    devices = ("cpu",) if request.param else ()
    monkeypatch.setattr(attention, "_BLOCKWISE_DEVICES", devices)
