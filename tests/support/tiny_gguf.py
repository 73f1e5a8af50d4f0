"""A real GGUF file of a tiny Llama with a byte-level tokenizer, 80 kB."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from tokenizers import pre_tokenizers

HIDDEN, HEADS, LAYERS, FEED_FORWARD = 32, 4, 1, 64
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_CONTROL, _NORMAL = 3, 1  # GGUF's token types


def write_gguf(path: Path, seed: int = 0, context: int = 64, layers: int = LAYERS) -> Path:
    """Writes the file; the same seed makes the same bytes."""
    # transformers wants one merge at least, and its result among the tokens.
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "zz"]
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(context)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([_CONTROL] * len(SPECIAL) + [_NORMAL] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["z z"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    _add_weights(writer, len(tokens), layers, np.random.default_rng(seed))
    _finish(writer)
    return path


def write_lora(path: Path, seed: int) -> Path:
    """Write a LoRA adapter of rank 2 for that Llama as GGUF."""
    writer, random = GGUFWriter(path, "llama"), np.random.default_rng(seed)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_v", "attn_output"):
            tensor = f"blk.{layer}.{name}.weight"
            for part, shape in (("lora_a", (2, HIDDEN)), ("lora_b", (HIDDEN, 2))):
                values = random.normal(0, 0.5, shape).astype(np.float32)
                writer.add_tensor(f"{tensor}.{part}", values)
    _finish(writer)
    return path


def _finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_weights(
    writer: GGUFWriter, vocabulary: int, layers: int, random: np.random.Generator
) -> None:
    shapes = {"token_embd": (vocabulary, HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(layers):
        block = f"blk.{layer}"
        shapes |= {f"{block}.attn_norm": (HIDDEN,), f"{block}.ffn_norm": (HIDDEN,)}
        shapes |= {f"{block}.attn_{n}": (HIDDEN, HIDDEN) for n in ("q", "k", "v", "output")}
        shapes |= {f"{block}.ffn_{n}": (FEED_FORWARD, HIDDEN) for n in ("gate", "up")}
        shapes[f"{block}.ffn_down"] = (HIDDEN, FEED_FORWARD)
    for name, shape in shapes.items():
        values = random.normal(0, 0.1, shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", values + 1 if len(shape) == 1 else values)
