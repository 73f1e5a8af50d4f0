"""The process that scores token ids by llama.cpp: `python -m jetson_ft.export.score_process`.

Each line of standard input and output is a JSON object. The first one has the settings
(`llama_reader.LlamaScorer`); the answer `{}` shows that the model is loaded. The others are
`{"ids": …, "places": …}`, token ids and the places whose predictions count, answered by
`{"nats": …}`; or `{"tokens": …}`, answered by `{"ends": …}`: whether each one ends a reply.

llama.cpp's HTTP API has no log-probabilities of given tokens. So the process calls its C API
(include/llama.h), in the library of the package xllamacpp.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_uint32, c_void_p
from typing import Any

from jetson_ft.child_process import end_with_parent
from jetson_ft.export.quantize import load_library

_CHUNK = 256  # tokens that are computed together


class _Parameters(ctypes.Structure):
    """Parameters of a model or a context, of which only the first fields are known.

    Both are passed by value and have more than 16 bytes. The calling conventions of x86-64 and
    aarch64 then pass them in memory, where a larger object does no harm: its size is not a part of
    the interface. So it may be of a version with more fields. Of a model's, `n_ctx` and the others
    are parts of pointers, which nothing sets here.
    """

    _fields_ = (
        ("n_ctx", c_uint32), ("n_batch", c_uint32), ("n_ubatch", c_uint32),
        ("rest", ctypes.c_char * 1012),
    )  # fmt: skip


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)), ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(c_int8)),
    )  # fmt: skip


_RESULTS: dict[str, Any] = {
    "llama_model_default_params": _Parameters, "llama_context_default_params": _Parameters,
    "llama_model_load_from_file": c_void_p, "llama_init_from_model": c_void_p,
    "llama_adapter_lora_init": c_void_p, "llama_n_ctx": c_uint32, "llama_n_batch": c_uint32,
    "llama_get_memory": c_void_p, "llama_batch_init": _Batch, "llama_decode": c_int32,
    "llama_get_logits_ith": POINTER(c_float), "llama_model_get_vocab": c_void_p,
    "llama_vocab_n_tokens": c_int32, "llama_vocab_is_eog": c_bool,
    "llama_set_adapters_lora": c_int32, "llama_memory_clear": None, "llama_set_n_threads": None,
}  # fmt: skip
_ARGUMENTS: dict[str, list[Any]] = {
    "llama_model_load_from_file": [c_char_p, _Parameters],
    "llama_init_from_model": [c_void_p, _Parameters],
    "llama_adapter_lora_init": [c_void_p, c_char_p],
    "llama_set_adapters_lora": [c_void_p, POINTER(c_void_p), ctypes.c_size_t, POINTER(c_float)],
    "llama_n_ctx": [c_void_p], "llama_n_batch": [c_void_p], "llama_get_memory": [c_void_p],
    "llama_memory_clear": [c_void_p, c_bool], "llama_decode": [c_void_p, _Batch],
    "llama_get_logits_ith": [c_void_p, c_int32], "llama_model_get_vocab": [c_void_p],
    "llama_vocab_n_tokens": [c_void_p], "llama_vocab_is_eog": [c_void_p, c_int32],
    "llama_batch_init": [c_int32, c_int32, c_int32],
    "llama_set_n_threads": [c_void_p, c_int32, c_int32],
}  # fmt: skip


class _Model:
    """A GGUF model, perhaps with an adapter, in llama.cpp."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._library = library = load_library()
        for name, result in _RESULTS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, _ARGUMENTS.get(name, [])
        library.llama_backend_init()
        path = os.fsencode(settings["model"])
        model = library.llama_model_load_from_file(path, library.llama_model_default_params())
        if not model:
            raise RuntimeError("llama.cpp can't load the model")
        parameters = library.llama_context_default_params()
        parameters.n_ctx = n_ctx = max(settings["n_ctx"], _CHUNK)
        parameters.n_batch = parameters.n_ubatch = _CHUNK
        self._context = library.llama_init_from_model(model, parameters)
        if not self._context:
            raise RuntimeError("llama.cpp can't make a context")
        # A library whose structures differ from what is declared here would show other numbers.
        if (
            library.llama_n_ctx(self._context) < n_ctx
            or library.llama_n_batch(self._context) != _CHUNK
        ):
            raise RuntimeError("this version of xllamacpp has another interface")
        library.llama_set_n_threads(self._context, settings["threads"], settings["threads"])
        if settings["lora"]:
            adapter = library.llama_adapter_lora_init(model, os.fsencode(settings["lora"]))
            adapters, scales = (c_void_p * 1)(adapter), (c_float * 1)(1.0)
            if not adapter or library.llama_set_adapters_lora(self._context, adapters, 1, scales):
                raise RuntimeError("llama.cpp can't load the adapter")
        self._vocabulary = library.llama_model_get_vocab(model)
        self._size = int(library.llama_vocab_n_tokens(self._vocabulary))
        self._batch = library.llama_batch_init(_CHUNK, 0, 1)

    def nats(self, ids: list[int], places: list[int]) -> float:
        """Return the sum of -ln p of the tokens at these places, given all tokens before each."""
        import numpy as np

        library, batch, wanted = self._library, self._batch, {place - 1 for place in places}
        library.llama_memory_clear(library.llama_get_memory(self._context), False)
        total = 0.0
        for start in range(0, len(ids), _CHUNK):
            chunk = ids[start : start + _CHUNK]
            batch.n_tokens = len(chunk)
            for index, token in enumerate(chunk):
                batch.token[index], batch.pos[index] = token, start + index
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
                batch.logits[index] = start + index in wanted
            if code := library.llama_decode(self._context, batch):
                raise RuntimeError(f"llama_decode returned {code}")
            for index in range(len(chunk)):
                if start + index not in wanted:
                    continue
                row = library.llama_get_logits_ith(self._context, index)
                logits = np.ctypeslib.as_array(row, (self._size,)).astype(np.float64)
                largest = logits.max()
                total += largest + np.log(np.exp(logits - largest).sum())
                total -= logits[ids[start + index + 1]]
        return float(total)

    def is_end(self, token: int) -> bool:
        return bool(self._library.llama_vocab_is_eog(self._vocabulary, token))


def main() -> None:
    """Answer requests until standard input ends."""
    end_with_parent()
    # llama.cpp prints to stdout in places: keep that apart from the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    model = None
    for line in sys.stdin:
        request = json.loads(line)
        if model is None:
            model = _Model(request)
            answer: dict[str, Any] = {}
        elif "tokens" in request:
            answer = {"ends": [model.is_end(token) for token in request["tokens"]]}
        else:
            answer = {"nats": model.nats(request["ids"], request["places"])}
        print(json.dumps(answer), file=answers)
    os._exit(0)


if __name__ == "__main__":
    main()
