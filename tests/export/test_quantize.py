"""Quantised GGUF files: ggml's bytes, the right type for each tensor, and all the rest copied."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from jetson_ft.errors import UserError
from jetson_ft.export import quantize as quantize_module
from jetson_ft.export.quantize import MIXTURES, load_library, quantize, quantize_file

F16, BF16 = gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16
_LAYERS = 8


def _write(path: Path, width: int, tied: bool = True) -> dict[str, Any]:
    """Write a model's tensors, without a tokenizer; return the values."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(_LAYERS)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_token_list(["a", "好", "c"])
    shapes = {"token_embd.weight": (48, width), "output_norm.weight": (width,)}
    if not tied:
        shapes["output.weight"] = (48, width)
    for layer in range(_LAYERS):
        for name in ("attn_q", "attn_v", "ffn_down"):
            shapes[f"blk.{layer}.{name}.weight"] = (32, width)
    shapes["blk.0.attn_qkv.weight"] = (32, width)
    values = {}
    for name, shape in shapes.items():
        dtype = np.float32 if len(shape) == 1 else np.float16
        values[name] = random.normal(0, 0.1, shape).astype(dtype)
        writer.add_tensor(name, values[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def _tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def test_threads_are_llama_cpps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those of all cores: a container may have fewer."""
    pools: list[int] = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, threads: int) -> None:
            pools.append(threads)
            super().__init__(threads)

    monkeypatch.setattr(quantize_module, "ThreadPoolExecutor", Pool)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    quantize(np.ones((2, 32), np.float16), F16, gguf.GGMLQuantizationType.Q8_0)
    assert pools == [3]


@pytest.mark.parametrize("file_type", MIXTURES)
def test_values_stay_near_and_the_rest_the_same(tmp_path: Path, file_type: str) -> None:
    source, out = tmp_path / "f16.gguf", tmp_path / "out.gguf"
    values = _write(source, 512)
    steps: list[tuple[int, int]] = []
    quantize_file(source, out, file_type, lambda done, total: steps.append((done, total)))
    bound = {"q8_0": 0.01, "q4_0": 0.12, "q4_k_m": 0.1, "q5_k_m": 0.06, "q6_k": 0.03}[file_type]
    for name, tensor in _tensors(out).items():
        result = gguf.dequantize(tensor.data, tensor.tensor_type)
        error = np.sqrt(np.mean((result - values[name].astype(np.float32)) ** 2))
        if values[name].ndim == 1:
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F32 and error == 0
        else:
            assert 0 < error < bound * np.std(values[name].astype(np.float32)), name
    fields = gguf.GGUFReader(out).fields
    assert fields["tokenizer.ggml.tokens"].contents() == ["a", "好", "c"]
    wanted = gguf.LlamaFileType[f"MOSTLY_{file_type.upper()}"]
    assert fields["general.file_type"].contents() == wanted
    assert steps[0][0] == 0 and steps[-1][0] == steps[-1][1] > 0


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("source", [F16, BF16])
def test_bytes_are_those_of_another_implementation(kind: str, source: Any) -> None:
    values = np.random.default_rng(1).normal(0, 0.05, (70, 96)).astype(np.float32)
    stored = gguf.quantize(values, source)
    target = gguf.GGMLQuantizationType[kind]
    expected = gguf.quantize(gguf.dequantize(stored, source), target)
    assert np.array_equal(quantize(stored, source, target), expected)


def test_chunks_of_threads_are_joined_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(2).normal(0, 1, (33, 64)).astype(np.float16)
    whole = quantize(values, F16, gguf.GGMLQuantizationType.Q8_0)
    monkeypatch.setattr(quantize_module, "_CHUNK", 128)
    assert np.array_equal(quantize(values, F16, gguf.GGMLQuantizationType.Q8_0), whole)


@pytest.mark.parametrize(
    ("file_type", "width", "tied", "expected"),
    [
        ("q4_k_m", 512, True, {"embd": "Q6_K", "q": "Q4_K", "v": "Q4_K", "v0": "Q6_K"}),
        ("q4_k_m", 512, False, {"embd": "Q4_K", "output": "Q6_K", "down7": "Q6_K"}),
        ("q4_k_m", 576, True, {"embd": "Q8_0", "q": "Q5_0", "v0": "Q8_0", "qkv": "Q8_0"}),
        ("q5_k_m", 576, True, {"q": "Q5_1", "v0": "Q8_0"}),
        ("q4_0", 512, True, {"embd": "Q6_K", "q": "Q4_0", "v0": "Q4_0"}),
        ("q8_0", 512, True, {"embd": "Q8_0", "q": "Q8_0"}),
        ("q8_0", 40, True, {"embd": "F16", "q": "F16"}),
        # Layer 3 is the third of those after the first eighth, 1.
        ("q4_k_m", 512, True, {"v3": "Q6_K", "v1": "Q4_K", "v2": "Q4_K"}),
    ],
)
def test_types_are_llama_cpps(
    tmp_path: Path, file_type: str, width: int, tied: bool, expected: dict[str, str]
) -> None:
    source, out = tmp_path / "f16.gguf", tmp_path / "out.gguf"
    _write(source, width, tied)
    quantize_file(source, out, file_type)
    names = {
        "embd": "token_embd", "output": "output", "q": "blk.1.attn_q", "v": "blk.1.attn_v",
        "v0": "blk.0.attn_v", "v1": "blk.1.attn_v", "v2": "blk.2.attn_v", "v3": "blk.3.attn_v",
        "down7": "blk.7.ffn_down", "qkv": "blk.0.attn_qkv",
    }  # fmt: skip
    tensors = _tensors(out)
    types = {key: tensors[f"{names[key]}.weight"].tensor_type.name for key in expected}
    assert types == expected


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    load_library.cache_clear()
    monkeypatch.setattr(quantize_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="jetson-ft\\[export\\]"):
        load_library()
    load_library.cache_clear()
