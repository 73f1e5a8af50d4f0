"""LLaMA-Factory as an arm: its own command line, on the same conversations.

It tokenises them itself, with the template it reads from the tokenizer; rows are counted as
ours are (but for packed ones), so its rate says how fast the same text was learnt. Written for
release 0.9.5.
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

from jetson_ft import strict_yaml
from jetson_ft.bench.lesson import ROWS_PER_STEP, Lesson, Trained
from jetson_ft.paths import read_json, write_atomic, write_json

_POLL_SECONDS = 0.02
_START = "from llamafactory.cli import main; main()"


def train(lesson: Lesson, folder: str, batch: int = 1, packed: bool = False) -> Trained:
    """Starts it with `batch` rows, or bins of packed rows, at a time; notes when it logs each step.

    Raises:
        RuntimeError: it failed; its own words are in the log.
    """
    home = Path(folder)
    _write_rows(lesson, home)
    _write_model(lesson, home / "model")
    write_atomic(home / "train.yaml", strict_yaml.dump(arguments(lesson, home, batch, packed)))
    command = [str(lesson.settings.llamafactory), "-c", _START, "train", str(home / "train.yaml")]
    seen = Trained()
    process = subprocess.Popen(command, cwd=home, env=os.environ | {"PYTHONPATH": ""})
    while process.poll() is None:
        _note_new(home / "out" / "trainer_log.jsonl", seen)
        time.sleep(_POLL_SECONDS)
    _note_new(home / "out" / "trainer_log.jsonl", seen)
    if process.returncode:
        raise RuntimeError(f"LLaMA-Factory ended with code {process.returncode}; see log.txt")
    if packed:
        _count_packed(lesson, home / "out" / "trainer_log.jsonl", seen)
    if lesson.device.kind == "cpu":
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        seen.peak_memory_bytes = int(peak if sys.platform == "darwin" else peak * 1024)
    return seen


def _note_new(log: Path, seen: Trained) -> None:
    """Each step's line comes when the step has ended."""
    if log.exists():
        losses = losses_in(log.read_text(encoding="utf-8"))
        seen.ends += [time.perf_counter()] * (len(losses) - len(seen.losses))
        seen.losses = losses


def losses_in(log: str) -> list[float]:
    """Of each step, out of `trainer_log.jsonl`."""
    return [float(line["loss"]) for line in _steps_in(log)]


def _steps_in(log: str) -> list[dict[str, Any]]:
    """A last line still being written is left out, as is one that is of no step."""
    lines = [json.loads(line) for line in log.split("\n")[:-1]]
    return [line for line in lines if "loss" in line]


def _count_packed(lesson: Lesson, log: Path, seen: Trained) -> None:
    """The tokens of all steps but the first: its packer chooses which rows those are of.

    It logs how many places its bins had so far; all are taken for equally full, which flatters
    it, as its packer fills the first ones best.

    Raises:
        RuntimeError: it made no second step.
    """
    places = [line["total_tokens"] for line in _steps_in(log.read_text(encoding="utf-8"))]
    if len(places) < 2:
        raise RuntimeError(f"made {len(places)} steps of packed rows; two are needed")
    tokens = sum(len(row["input_ids"]) for row in lesson.rows)
    seen.timed_tokens = round(tokens * (1 - places[0] / places[-1]))
    seen.losses = []


def _write_rows(lesson: Lesson, home: Path) -> None:
    rows = [{"messages": lesson.messages[i]} for step in lesson.steps() for i in step]
    tags = {
        "role_tag": "role", "content_tag": "content",
        "user_tag": "user", "assistant_tag": "assistant", "system_tag": "system",
    }  # fmt: skip
    write_json(home / "rows.json", rows)
    entry = {
        "file_name": "rows.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": tags,
    }
    write_json(home / "dataset_info.json", {"rows": entry})


def _write_model(lesson: Lesson, folder: Path) -> None:
    """The model, whose configuration alone says what it computes in without mixed precision.

    As stored, SmolLM2's says bf16, which a CPU without such instructions only emulates, slowly.
    """
    folder.mkdir()
    for path in Path(lesson.folder).iterdir():
        (folder / path.name).symlink_to(path.resolve())
    dtype = str(lesson.weights.dtype()).removeprefix("torch.")
    config = read_json(folder / "config.json")
    (folder / "config.json").unlink()
    # The second is what older transformers call it.
    write_json(folder / "config.json", config | {"dtype": dtype, "torch_dtype": dtype})


def arguments(lesson: Lesson, home: Path, batch: int = 1, packed: bool = False) -> dict[str, Any]:
    """Its settings where they are not its defaults; a batch of one row is that of its examples."""
    recipe, at_once = lesson.settings.recipe(), float(batch)
    packing: dict[str, Any] = {}
    if packed:  # its own counts of tokens are logged only on request
        packing = {"packing": True, "neat_packing": True, "include_num_input_tokens_seen": True}
        mean = sum(len(row["input_ids"]) for row in lesson.rows) / len(lesson.rows)
        at_once = lesson.settings.max_length / mean
    return packing | {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": str(home / "model"),
        "dataset": "rows",
        "dataset_dir": str(home),
        "output_dir": str(home / "out"),
        "cutoff_len": lesson.settings.max_length,
        "disable_shuffling": True,
        "overwrite_cache": True,
        "finetuning_type": "lora",
        "lora_target": "all",
        "lora_rank": recipe.lora.rank,
        "lora_alpha": int(recipe.lora.alpha),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": max(1, round(ROWS_PER_STEP / at_once)),
        "num_train_epochs": recipe.train.epochs,
        "learning_rate": recipe.train.learning_rate,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "bf16": lesson.precision == "bf16",
        "fp16": lesson.precision == "fp16",
        "use_cpu": lesson.device.kind == "cpu",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": recipe.train.seed,
    }
