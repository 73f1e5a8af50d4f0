"""LLaMA-Factory's variants: its own command line, on the same conversations.

It tokenizes the conversations itself, with the template of the tokenizer. Its rate counts this
program's tokens of the rows (except for packed ones), so it says how fast the same text was
trained on. Written for release 0.9.5.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from jetson_ft.bench.workload import ROWS_PER_STEP, BenchWorkload, Result
from jetson_ft.files import read_json, write_atomic, write_json
from jetson_ft.recipe import strict_yaml


def train(workload: BenchWorkload, folder: str, batch: int = 1, packed: bool = False) -> Result:
    """Train the workload with `batch` rows, or bins of packed rows, at a time.

    A step ends when LLaMA-Factory logs it.
    """
    home, log = Path(folder), Path(folder) / "out" / "trainer_log.jsonl"
    _write_rows(workload, home)
    _write_model(workload, home / "model")
    config, code = home / "train.yaml", "from llamafactory.cli import main; main()"
    write_atomic(config, strict_yaml.dump_yaml(training_arguments(workload, home, batch, packed)))
    command = [str(workload.settings.llamafactory), "-c", code, "train", str(config)]
    process = subprocess.Popen(command, cwd=home, env=os.environ | {"PYTHONPATH": ""})
    result, running = Result(), True
    try:
        while running:
            running = process.poll() is None
            lines = log.read_text(encoding="utf-8").split("\n")[:-1] if log.exists() else []
            steps = [step for step in map(json.loads, lines) if "loss" in step]
            result.step_ends += [time.perf_counter()] * (len(steps) - len(result.step_ends))
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        raise RuntimeError(f"LLaMA-Factory ended with code {process.returncode}; see log.txt")
    if packed:
        result.timed_tokens = _count_packed(workload, steps)
    else:
        result.losses = [float(step["loss"]) for step in steps]
    if workload.device.kind == "cpu":
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        result.peak_memory_bytes = int(peak if sys.platform == "darwin" else peak * 1024)
    return result


def _count_packed(workload: BenchWorkload, steps: list[dict[str, Any]]) -> int:
    """Return an estimate of the tokens of all steps but the first, whose rows its packer chose.

    It logs how many positions its bins had so far. All bins are taken as equally full, which
    favours it: its packer fills the first ones best.
    """
    if len(steps) < 2:
        raise RuntimeError(f"made {len(steps)} steps of packed rows; two are needed")
    tokens = sum(len(row["input_ids"]) for row in workload.rows)
    return round(tokens * (1 - float(steps[0]["total_tokens"] / steps[-1]["total_tokens"])))


def _write_rows(workload: BenchWorkload, home: Path) -> None:
    rows = [{"messages": workload.messages[i]} for step in workload.steps() for i in step]
    write_json(home / "rows.json", rows)
    entry = {
        "file_name": "rows.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {
            "role_tag": "role", "content_tag": "content",
            "user_tag": "user", "assistant_tag": "assistant", "system_tag": "system",
        },
    }  # fmt: skip
    write_json(home / "dataset_info.json", {"rows": entry})


def _write_model(workload: BenchWorkload, folder: Path) -> None:
    """Link the model's files, with a config that states the precision of the benchmark.

    Without mixed precision, only the config sets it. SmolLM2's says bf16, which a CPU without
    bf16 instructions emulates slowly.
    """
    folder.mkdir()
    for path in workload.base.folder.iterdir():
        (folder / path.name).symlink_to(path.resolve())
    dtype = str(workload.weights.dtype()).removeprefix("torch.")
    config = read_json(folder / "config.json")
    (folder / "config.json").unlink()
    # `torch_dtype` is the key's name in older versions of transformers.
    write_json(folder / "config.json", config | {"dtype": dtype, "torch_dtype": dtype})


def training_arguments(
    workload: BenchWorkload, home: Path, batch: int = 1, packed: bool = False
) -> dict[str, Any]:
    """Return its settings where they aren't its defaults."""
    recipe = workload.settings.recipe()
    config = workload.training_arguments(str(home / "out"), batch) | {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": str(home / "model"),
        "dataset": "rows",
        "dataset_dir": str(home),
        "cutoff_len": workload.settings.max_length,
        "disable_shuffling": True,
        "overwrite_cache": True,
        "finetuning_type": "lora",
        "lora_target": "all",
        "lora_rank": recipe.lora.rank,
        "lora_alpha": int(recipe.lora.alpha or 0),
        "optim": "adamw_torch",
    }
    if packed:
        mean = sum(len(row["input_ids"]) for row in workload.rows) / len(workload.rows)
        bins = ROWS_PER_STEP * mean / workload.settings.max_length
        config |= {
            "packing": True,
            "neat_packing": True,
            "include_num_input_tokens_seen": True,  # logs `total_tokens`
            "gradient_accumulation_steps": max(1, round(bins)),
        }
    return config
