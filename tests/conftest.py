"""Small real components: a Phi and a Llama with random weights and a byte-level tokenizer."""

from __future__ import annotations

import functools
import gc
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_hub import fake_hub
from fake_programs import fake
from hypothesis import settings
from in_browser import browser, chromium
from light_jobs import light_jobs
from loaded_phi import phi
from served import serve
from small_disk import small_disk
from tiny_models import CHAT_TEMPLATE, phi_config, save_model, write_rows
from training_bench import bench, make_bench
from upload_hub import upload_hub
from workbench import finished, light_runs, queued, workbench

__all__ = [
    "bench",
    "browser",
    "chromium",
    "fake",
    "fake_hub",
    "finished",
    "light_jobs",
    "light_runs",
    "make_bench",
    "phi",
    "queued",
    "serve",
    "small_disk",
    "upload_hub",
    "workbench",
]  # fixtures of several folders

settings.register_profile("brief", max_examples=20)

# Where it is ignored (a shell's background job), programs started here would ignore it too.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

gc.disable()  # while the test modules import torch and all; see jetson_ft.models.fast_import


def pytest_collection_finish() -> None:
    """From here on garbage is collected, but not looked for among what was imported."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long ones first, one to each of two processes, which begin with half of the list each."""

    def minutes(item: pytest.Item) -> float:
        slow = item.get_closest_marker("slow")
        return float(slow.kwargs.get("minutes", 0.1)) if slow else 0.0

    long = sorted(filter(minutes, items), key=minutes, reverse=True)
    short = [item for item in items if not minutes(item)]
    middle = len(short) // 2
    items[:] = [*long[::2], *short[:middle], *long[1::2], *short[middle:]]


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """No test reads or writes a person's caches; all processes share one embedded model."""
    cache, base = tmp_path_factory.mktemp("cache"), tmp_path_factory.getbasetemp()
    models = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "converted-models"
    models.mkdir(exist_ok=True)
    (cache / "models").symlink_to(models)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JETSON_FT_CACHE", str(cache))
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        yield


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what the program sets for its child processes when a test runs it in this one."""
    for name in ("HF_DATASETS_DISABLE_PROGRESS_BARS", "JETSON_FT_DEBUG"):
        monkeypatch.setenv(name, "")  # so that its absence is restored
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def tiny_phi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model without a chat template, as Phi-1.5 is one."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny-phi", phi_config(32), None)


@pytest.fixture(scope="session")
def wide_phi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for bitsandbytes, whose nf4 blocks hold 64 weights of one row."""
    return save_model(tmp_path_factory.mktemp("models") / "wide-phi", phi_config(64), None)


@pytest.fixture(scope="session")
def deep_phi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of enough layers that a part of them is less than all of them."""
    config = phi_config(32)
    config.num_hidden_layers = 8
    return save_model(tmp_path_factory.mktemp("models") / "deep-phi", config, None)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model with grouped heads and a tied head, as SmolLM2 is one."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=259, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=2048,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return save_model(tmp_path_factory.mktemp("models") / "tiny-llama", config, CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def short_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a table of 64 positions."""
    from transformers import GPT2Config

    config = GPT2Config(
        vocab_size=259, n_positions=64, n_embd=32, n_layer=2, n_head=4,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return save_model(tmp_path_factory.mktemp("models") / "short-gpt2", config, None)


@pytest.fixture(scope="session")
def tiny_model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that makes a small model of the architecture of a model in the catalog."""
    from transformers import AutoConfig

    from jetson_ft.models.catalog import MODELS

    @functools.cache
    def make(name: str) -> Path:
        config = MODELS[name].config | {
            "vocab_size": 259, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "max_position_embeddings": 2048, "bos_token_id": 0, "eos_token_id": 0,
            "pad_token_id": 0,
        }  # fmt: skip
        folder = tmp_path_factory.mktemp("models") / f"tiny-{config['model_type']}"
        return save_model(folder, AutoConfig.for_model(**config), CHAT_TEMPLATE)

    return make


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short alpaca rows, each different."""
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    write_rows(path)
    return path
