"""What GELU as one operation gains on Phi-1.5: random weights, rows as long as real ones.

For whoever has a GPU. Both forms are timed in turns on one model, so that only
their ratio within a round counts. `--layers 1` makes it small enough for a CPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PhiConfig

from jetson_ft.data.lengths import KNOWN
from jetson_ft.data.template import ANSWER
from jetson_ft.device import probe
from jetson_ft.models import adapter, attention, fused
from jetson_ft.models.load import Weights
from jetson_ft.models.loss import token_losses, without_head
from jetson_ft.models.packing import Pack, pack
from jetson_ft.recipe import LoraRecipe


def make_model(layers: int, device: str, dtype: torch.dtype) -> Any:
    """Phi-1.5's shape, which is the default of its config."""
    torch.manual_seed(0)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(PhiConfig(num_hidden_layers=layers), dtype=dtype)
    base.requires_grad_(False)
    return adapter.attach(base, LoraRecipe(rank=8), seed=0)


def make_pack(tokens: int, seed: int, vocabulary: int, device: str) -> Pack:
    """Random ids in rows of alpaca_zh's lengths; a rest shorter than 16 tokens is left out."""
    draw = torch.Generator().manual_seed(seed)
    groups = KNOWN["llamafactory/alpaca_zh", "microsoft/phi-1_5"].groups
    rows: list[dict[str, Any]] = []
    while tokens >= 16:
        length, learnt = groups[int(torch.randint(len(groups), (1,), generator=draw))]
        size = min(int(length), tokens)
        parts = [0] * max(1, size - int(learnt)) + [ANSWER] * int(learnt)
        ids = torch.randint(vocabulary, (size,), generator=draw)
        rows.append({"input_ids": ids, "parts": parts[:size]})
        tokens -= size
    return pack(rows).to(device)


def speed(model: Any, packs: list[Pack], optimizer: Any, warmup: int) -> float:
    """Tokens a second over one step for each pack, after some steps that don't count."""
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


def unfuse(model: Any) -> None:
    """Gives the activations their own forward back."""
    for module in model.modules():
        if type(module).__name__ == "NewGELUActivation":
            module.__dict__.pop("forward", None)


def compare(model: Any, packs: list[Pack], warmup: int, rounds: int) -> list[tuple[float, float]]:
    """(own, fused) tokens a second of each round."""
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-4, fused=True)
    found = []
    with without_head(model), attention.packed(model):
        for _ in range(rounds):
            unfuse(model)
            own = speed(model, packs, optimizer, warmup)
            fused.fuse(model)
            found.append((own, speed(model, packs, optimizer, warmup)))
    return found


def main() -> None:
    """Prints both speeds of each round and the median of their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=4096, help="in a step")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    device = probe.probe()
    precision = device.precision("auto")
    print(f"{device.name}, {precision}, {chosen.layers} layers, {chosen.tokens} tokens a step")
    model = make_model(chosen.layers, device.kind, Weights(precision).dtype()).train()
    vocabulary = model.config.vocab_size
    packs = [make_pack(chosen.tokens, n, vocabulary, device.kind) for n in range(chosen.steps)]
    found = compare(model, packs, chosen.warmup, chosen.rounds)
    for own, one in found:
        print(f"gelu_new {own:,.0f} tokens/s, fused {one:,.0f} tokens/s, {one / own:.2f} x")
    print(f"median {statistics.median(one / own for own, one in found):.2f} x")


if __name__ == "__main__":
    main()
