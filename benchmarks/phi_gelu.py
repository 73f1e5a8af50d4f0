"""Measure what GELU as one operation gains on Phi-1.5: random weights, rows of real lengths.

Meant for a GPU. Both forms are timed in turns on one model; only their ratio within a round
counts. `--layers 1` makes it small enough for a CPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PhiConfig

from jetson_ft import adapter
from jetson_ft.data.chat_template import ANSWER
from jetson_ft.data.lengths import KNOWN_LENGTHS
from jetson_ft.hardware import detect
from jetson_ft.kernels import attention, fused_layers
from jetson_ft.kernels.lm_head_loss import chunked_lm_head, token_losses
from jetson_ft.kernels.packing import Pack, pack_rows
from jetson_ft.models.loading import WeightFormat
from jetson_ft.recipe import LoraRecipe


def make_model(layers: int, device: str, dtype: torch.dtype) -> Any:
    """Return a model of Phi-1.5's dimensions, which are the defaults of its config."""
    torch.manual_seed(0)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(PhiConfig(num_hidden_layers=layers), dtype=dtype)
    base.requires_grad_(False)
    return adapter.attach_adapter(base, LoraRecipe(rank=8), seed=0)


def make_pack(tokens: int, seed: int, vocabulary: int, device: str) -> Pack:
    """Return random ids in rows of alpaca_zh's lengths; leave out a rest shorter than 16 tokens."""
    random = torch.Generator().manual_seed(seed)
    groups = KNOWN_LENGTHS["llamafactory/alpaca_zh", "microsoft/phi-1_5"].groups
    rows: list[dict[str, Any]] = []
    while tokens >= 16:
        length, trained = groups[int(torch.randint(len(groups), (1,), generator=random))]
        size = min(int(length), tokens)
        segments = [0] * max(1, size - int(trained)) + [ANSWER] * int(trained)
        ids = torch.randint(vocabulary, (size,), generator=random)
        rows.append({"input_ids": ids, "segments": segments[:size]})
        tokens -= size
    return pack_rows(rows).to(device)


def speed(model: Any, packs: list[Pack], optimizer: Any, warmup: int) -> float:
    """Return tokens per second over one step for each pack, after `warmup` untimed steps."""
    _steps(model, packs[:1] * warmup, optimizer)
    started = time.perf_counter()
    _steps(model, packs, optimizer)
    return sum(one.tokens for one in packs) / (time.perf_counter() - started)


def _steps(model: Any, packs: list[Pack], optimizer: Any) -> None:
    for one in packs:
        token_losses(model, one).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compare(model: Any, packs: list[Pack], warmup: int, rounds: int) -> list[tuple[float, float]]:
    """Return (own, fused) tokens per second of each round; all other layers are always fused."""
    fused_layers.fuse_layers(model)  # before the packed attention, with which no rotary is fused
    activations = [m for m in model.modules() if type(m).__name__ == "NewGELUActivation"]
    forwards = [vars(activation)["forward"] for activation in activations]
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-4, fused=True)
    speeds = []
    with chunked_lm_head(model), attention.use_packed_attention(model):
        for _ in range(rounds):
            for activation in activations:
                del activation.forward
            own = speed(model, packs, optimizer, warmup)
            for activation, forward in zip(activations, forwards, strict=True):
                activation.forward = forward
            speeds.append((own, speed(model, packs, optimizer, warmup)))
    return speeds


def main() -> None:
    """Print both speeds of each round and the median of their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=4096, help="in a step")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    device = detect.detect_device()
    precision = device.precision("auto")
    print(f"{device.name}, {precision}, {args.layers} layers, {args.tokens} tokens per step")
    model = make_model(args.layers, device.kind, WeightFormat(precision).dtype()).train()
    vocabulary = model.config.vocab_size
    packs = [make_pack(args.tokens, n, vocabulary, device.kind) for n in range(args.steps)]
    speeds = compare(model, packs, args.warmup, args.rounds)
    for own, fused in speeds:
        print(f"gelu_new {own:,.0f} tokens/s, fused {fused:,.0f} tokens/s, {fused / own:.2f} x")
    print(f"median {statistics.median(fused / own for own, fused in speeds):.2f} x")


if __name__ == "__main__":
    main()
