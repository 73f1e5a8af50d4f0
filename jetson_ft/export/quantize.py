"""Quantise a GGUF file of 16-bit weights by ggml's own kernels, tensor by tensor.

The kernels are those of the library in the package xllamacpp, on every platform that it has a wheel
for. The package gguf reads and writes the files; by itself it can't make K-quants.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jetson_ft.errors import UserError, _
from jetson_ft.export.llama import INSTALL_EXPORT, default_threads
from jetson_ft.files import disk_errors

if TYPE_CHECKING:
    import numpy as np

# By file type: the type of most matrices; of the head, and of embeddings that are the head too; of
# those that need more bits. From llama.cpp's src/llama-quant.cpp, `llama_tensor_get_type_impl`.
MIXTURES = {
    "q8_0": ("Q8_0", "Q8_0", "Q8_0"),
    "q4_0": ("Q4_0", "Q6_K", "Q4_0"),
    "q4_k_m": ("Q4_K", "Q6_K", "Q6_K"),
    "q5_k_m": ("Q5_K", "Q6_K", "Q6_K"),
    "q6_k": ("Q6_K", "Q6_K", "Q6_K"),
}
# Where a row's length is no multiple of a type's block; from `tensor_type_fallback` there.
_FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
# Written by the writer itself, or with other values.
_OWN_FIELDS = ("general.architecture", "general.file_type", "general.quantization_version")
_CHUNK = 1 << 22  # weights that a thread quantises at a time


def quantize_file(
    source: Path,
    out: Path,
    file_type: str,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the model in `source` with its 16-bit matrices quantised.

    Args:
        source: a GGUF file of llama.cpp's converter, whose matrices are f16 or bf16. What must stay
            exact (norms, biases, routers) is fp32 there, and is copied.
        out: is written in place: use a staging folder.
        file_type: a key of `MIXTURES`.
        on_progress: called with the bytes of `source` that are done, and their total.

    Raises:
        UserError: xllamacpp is not installed, or the disk is full.
    """
    import gguf
    import numpy as np

    load_library()
    reader = gguf.GGUFReader(source)
    with disk_errors(out):
        writer = gguf.GGUFWriter(out, _value(reader, "general.architecture"))
        for field in reader.fields.values():
            if field.name.startswith("GGUF.") or field.name in _OWN_FIELDS:
                continue
            kind = field.types[0]
            sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=sub_type)
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{file_type.upper()}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        types = _tensor_types(reader, file_type)
        for tensor in reader.tensors:
            kind = types[tensor.name]
            shape = [int(size) for size in reversed(tensor.shape)]
            nbytes = math.prod(gguf.quant_shape_to_byte_shape(shape, kind))
            writer.add_tensor_info(tensor.name, shape, np.float32, nbytes, raw_dtype=kind)
        done, total = 0, sum(int(tensor.n_bytes) for tensor in reader.tensors)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in reader.tensors:
                on_progress(done, total)
                kind = types[tensor.name]
                data = tensor.data
                writer.write_tensor_data(
                    data if kind == tensor.tensor_type else quantize(data, tensor.tensor_type, kind)
                )
                done += int(tensor.n_bytes)
        finally:
            writer.close()
    on_progress(done, total)


def quantize(data: np.ndarray, source: Any, target: Any) -> np.ndarray:
    """Return a tensor in another type, as bytes.

    Args:
        data: the values; of bf16 the bytes, as gguf's reader has them.
        source, target: GGMLQuantizationType of `data` and of the result.
    """
    import gguf
    import numpy as np

    library = load_library()
    rows = data.reshape(-1, data.shape[-1])
    block, block_bytes = gguf.GGML_QUANT_SIZES[target]
    columns = rows.shape[1] // (2 if source == gguf.GGMLQuantizationType.BF16 else 1)
    result = np.empty((len(rows), columns // block * block_bytes), np.uint8)
    step = max(1, _CHUNK // columns)

    def quantize_rows(start: int) -> None:
        chunk = gguf.dequantize(rows[start : start + step], source)
        chunk = np.ascontiguousarray(chunk, np.float32)
        target_rows = result[start : start + step]
        library.ggml_quantize_chunk(
            int(target), chunk.ctypes.data_as(ctypes.c_void_p),
            target_rows.ctypes.data_as(ctypes.c_void_p),
            0, len(chunk), columns, None,
        )  # fmt: skip

    with ThreadPoolExecutor(default_threads()) as pool:  # ctypes releases Python's lock
        list(pool.map(quantize_rows, range(0, len(rows), step)))
    return result


@lru_cache(maxsize=1)
def load_library() -> ctypes.CDLL:
    """Return llama.cpp's library, which is in the package xllamacpp.

    Raises:
        UserError: it is not installed.
    """
    spec = importlib.util.find_spec("xllamacpp")
    folders = (spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in Path(folder).glob("xllamacpp*.so")]
    if not files:
        raise UserError(_("llama.cpp is not installed."), "xllamacpp", INSTALL_EXPORT)
    library = ctypes.CDLL(str(files[0]))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    return library


def _tensor_types(reader: Any, file_type: str) -> dict[str, Any]:
    """Return the GGMLQuantizationType that each tensor gets, by name."""
    import gguf

    sixteen_bits = (gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16)
    names = [tensor.name for tensor in reader.tensors]
    is_tied = "output.weight" not in names
    layers = int(_value(reader, f"{_value(reader, 'general.architecture')}.block_count"))
    usual, head, more_bits = MIXTURES[file_type]
    types = {}
    for tensor in reader.tensors:
        types[tensor.name] = tensor.tensor_type
        if tensor.tensor_type not in sixteen_bits or len(tensor.shape) < 2:
            continue
        name = usual
        if tensor.name == ("token_embd.weight" if is_tied else "output.weight"):
            name = head
        elif match := re.fullmatch(
            r"blk\.(\d+)\.(attn_v|attn_qkv|attn_kv_b|ffn_down|ffn_down_exps)\.weight", tensor.name
        ):
            # The first and the last eighth of the layers, and each third one between them.
            layer, eighth = int(match[1]), layers // 8
            if layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2:
                name = more_bits
        columns = int(tensor.shape[0])
        if columns % _block_size(name):
            name = _FALLBACKS.get(name, name)
        if columns % _block_size(name):
            name = "F16"
        types[tensor.name] = gguf.GGMLQuantizationType[name]
    return types


def _block_size(name: str) -> int:
    import gguf

    return int(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][0])


def _value(reader: Any, key: str) -> Any:
    return reader.fields[key].contents()
