"""One of several processes that train the tiny Phi together, forked with its imports behind it."""

from __future__ import annotations

import json
import os
import signal
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Scenario:
    """What the processes do; `ranks` says who does the unusual."""

    model: str
    rows: str
    home: str  # checkpoints, and what each process leaves: events, adapter or error
    train: dict[str, Any] = field(default_factory=dict)
    resume: str = ""  # a checkpoint that only rank 0 has the path of
    ranks: tuple[int, ...] = ()
    act: str = ""  # stop, die, hang, spoil: after the third step
    seed: int = 0  # of the adapter, in `ranks`
    split: bool = False  # the layers among all
    recompute: bool = False
    dropout: float = 0.0
    capacity: int = 2048  # tokens of a micro-batch
    capacity_step: int = 0  # more for each further rank

    def acts(self, act: str, rank: int) -> bool:
        """Whether that is this process's part."""
        return act == self.act and rank in self.ranks


def work(scenario: Scenario, rank: int, size: int, port: int) -> None:
    """As the launcher would start it."""
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    elsewhere = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test",
                 "JETSON_FT_DIST_TIMEOUT": 4, "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    os.environ.update({key: str(value) for key, value in (place | elsewhere).items()})
    left = Path(scenario.home) / f"rank-{rank}.json"
    try:
        left.write_text(json.dumps(_train(scenario, rank)))
    except Exception as error:
        traceback.print_exc()
        left.write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}))


def _train(scenario: Scenario, rank: int) -> dict[str, Any]:
    import torch
    from safetensors.torch import save_file
    from training_bench import Bench

    from jetson_ft import adapter
    from jetson_ft.data.prepare import prepare_rows
    from jetson_ft.models import loading
    from jetson_ft.models.files import BaseModelFiles
    from jetson_ft.recipe import DataRecipe, LoraRecipe
    from jetson_ft.training import distributed

    torch.set_num_threads(1)
    joined = distributed.connect()
    base = BaseModelFiles("tiny", Path(scenario.model))
    data = DataRecipe(train=scenario.rows, heldout=6)
    rows = prepare_rows(data, loading.load_tokenizer(base))
    bench = Bench(base.folder, rows)
    model = loading.load_model(base, loading.WeightFormat("fp32"), "cpu")
    seed = scenario.seed if rank in scenario.ranks else 0
    model = adapter.attach_adapter(model, LoraRecipe(rank=4, dropout=scenario.dropout), seed)
    home = Path(scenario.home) / "checkpoints"
    asked = iter(range(1, 10_000))

    def stop() -> bool:
        return next(asked) == 3 and _act(scenario, rank, model)

    if scenario.split:
        distributed.shard_layers(model, joined, "cpu")
    capacity = scenario.capacity + rank * scenario.capacity_step
    job = bench.job(home, stop, capacity, scenario.recompute, **scenario.train)
    plan = replace(job.plan, shards=joined.size if scenario.split else 1)
    job = replace(job, dist=joined, plan=plan)
    with joined.broadcast_directory(Path(scenario.resume) if scenario.resume else None) as folder:
        progress = bench.train(model, job, folder)
    kept = sum(_bytes_here(parameter) for parameter in model.parameters())
    weights = {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}
    save_file(weights, Path(scenario.home) / f"rank-{rank}.safetensors")
    return {"events": bench.events, "progress": vars(progress), "bytes": kept}


def _bytes_here(parameter: Any) -> int:
    """Of the part that this process keeps."""
    here = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return int(here.untyped_storage().nbytes())


def _act(scenario: Scenario, rank: int, model: Any) -> bool:
    if scenario.acts("die", rank):
        os.kill(os.getpid(), signal.SIGKILL)
    if scenario.acts("hang", rank):
        os.kill(os.getpid(), signal.SIGSTOP)
    if scenario.acts("spoil", rank):
        next(p for name, p in model.named_parameters() if "lora_B" in name).data.fill_(float("nan"))
    return scenario.acts("stop", rank)
