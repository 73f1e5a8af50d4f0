"""Make the runs of this version that tests keep: tests/versions/N has what version N wrote.

    python scripts/keep_version.py            # into tests/versions/<version of the run directory>

Later versions must show and resume these runs, so a folder of a released version is never made
again: only that of the version in work is. A folder has a random model of a few KB, rows, a
finished run and a run that was stopped in the middle. All paths in it are relative to it, so that
a test can copy it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests" / "support"))
SETTINGS = {
    "model": "model", "precision": "fp32", "output_dir": "runs",
    "data": {"train": "rows.jsonl", "heldout": 4, "max_length": 128},
    "lora": {"rank": 2, "dropout": 0.1},
    "train": {"epochs": 4, "tokens_per_step": 100, "learning_rate": 0.01, "eval_every": 4,
              "save_total_limit": 1},
    "eval": {"max_new_tokens": 4, "samples": 2},
}  # fmt: skip
SECONDS = 120.0  # that a run may take


def make_model(folder: Path) -> None:
    """Write a Llama of one layer with random weights, and a tokenizer of bytes."""
    from tiny_models import CHAT_TEMPLATE, save_model
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    save_model(folder, config, CHAT_TEMPLATE)


def make_rows(path: Path) -> None:
    """Write rows that are all different."""
    rows = [{"instruction": f"{n}加{n}？", "output": f"等于{2 * n}。"} for n in range(20)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def make_runs() -> None:
    """Make both runs in the current folder."""
    from jetson_ft.recipe import Recipe
    from jetson_ft.runs import manager

    manager._with_absolute_paths = lambda recipe: recipe  # else the runs could not be copied
    for name, is_stopped in (("finished", False), ("stopped", True)):
        run = manager.launch(Recipe.model_validate(SETTINGS), name)
        deadline = time.monotonic() + SECONDS
        while manager.reconcile_state(run) in ("queued", "running", "stopping"):
            if is_stopped and any(event.kind == "step" for event in run.events()):
                run.request_stop()
            if time.monotonic() > deadline:
                raise SystemExit(f"{run.path} doesn't end; see its log.txt")
            time.sleep(0.002)
        state = run.state()
        if state.state != name or state.resumable != is_stopped:
            raise SystemExit(f"{run.path} is {state}; run this script again")
        while run.is_locked("supervisor"):
            time.sleep(0.01)
        manager.set_title_and_notes(run, f"标题 {name}", "notes")
        run.path.rename(run.path.with_name(name))


def main() -> None:
    """Make the folder anew."""
    from jetson_ft.runs.contents import SCHEMA

    parser = argparse.ArgumentParser(description="Make the runs of this version for the tests.")
    parser.add_argument("--folder", type=Path, default=ROOT / "tests" / "versions" / str(SCHEMA))
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        make_model(Path("model"))
        make_rows(Path("rows.jsonl"))
        make_runs()
        return
    target = options.folder.absolute()
    with tempfile.TemporaryDirectory(prefix="version-") as folder:
        environment: dict[str, Any] = {
            **os.environ, "PYTHONPATH": str(ROOT), "JETSON_FT_CACHE": f"{folder}/cache",
            "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        made = Path(folder, "made")
        made.mkdir()
        command = [sys.executable, __file__, "--here"]
        subprocess.run(command, cwd=made, env=environment, check=True)
        for lock in made.rglob("*.lock"):
            lock.unlink()
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(made, target)
    files = [path for path in target.rglob("*") if path.is_file()]
    print(f"{target}: {len(files)} files, {sum(path.stat().st_size for path in files):,} bytes")


if __name__ == "__main__":
    main()
