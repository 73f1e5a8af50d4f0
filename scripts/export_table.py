#!/usr/bin/env python3
"""Print a table of what GGUF files of a finished run lose and how fast they are, as Markdown.

    python scripts/export_table.py RUN [--types f16,q8_0,q4_0,q4_k_m] [--threads N]

The adapter is merged into its base; each file is made, and compared with transformers in fp32 on
the run's held-out rows (`jetson_ft.export.check`). Speed is that of one reply on the processor, the
better of two. Nothing is written into the run.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from jetson_ft import adapter
from jetson_ft.data.prepare import prepare_rows
from jetson_ft.export import check, gguf
from jetson_ft.export.llama import LlamaServer
from jetson_ft.export.merge import merge_adapter
from jetson_ft.export.quantize import quantize_file
from jetson_ft.models import files, loading
from jetson_ft.models.loading import WeightFormat
from jetson_ft.runs import store

REPLY_TOKENS = 64


def transformers_speed(model: Any, prompt: list[int]) -> float:
    """Return tokens per second of a greedy reply, the prompt's computation left out."""
    import torch

    ids = torch.tensor([prompt])
    speeds = []
    for _attempt in range(2):
        seconds = []
        for tokens in (1, REPLY_TOKENS + 1):
            started = time.perf_counter()
            with torch.inference_mode():
                model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                    max_new_tokens=tokens, min_new_tokens=tokens,
                )  # fmt: skip
            seconds.append(time.perf_counter() - started)
        speeds.append(REPLY_TOKENS / (seconds[1] - seconds[0]))
    return max(speeds)


def llama_speed(file: Path, prompt: list[int], threads: int) -> float:
    """Return tokens per second of a greedy reply by llama.cpp's own clock."""
    request = {"prompt": prompt, "n_predict": REPLY_TOKENS, "temperature": 0, "ignore_eos": True}
    with LlamaServer(file, n_ctx=len(prompt) + REPLY_TOKENS + 8, threads=threads) as server:
        answers = [server.request("/completion", request) for _attempt in range(2)]
    return float(max(answer["timings"]["predicted_per_second"] for answer in answers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="name of a finished run, or its folder")
    parser.add_argument("--runs-root", type=Path, default=Path("runs"))
    parser.add_argument("--types", default="f16,q8_0,q4_0,q4_k_m")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    run = store.find_run(arguments.run, arguments.runs_root)
    base = files.resolve_model(run.recipe().model)
    tokenizer = adapter.load_tokenizer(base, run.require_adapter())
    rows = prepare_rows(run.recipe().data, tokenizer)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        merged = folder / "merged"
        merge_adapter(base, run.require_adapter(), merged, "fp16")
        model = loading.load_model(
            files.BaseModelFiles("merged", merged), WeightFormat("fp32"), "cpu"
        )
        reference = check.measure_reference(
            model, tokenizer, list(rows.heldout_messages), list(rows.heldout)
        )
        prompt = reference.replies[0].prompt
        speed = transformers_speed(model, prompt)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        del model
        print(
            "| file | MB | bits per character | difference | same replies | tokens/s |\n"
            "|---|---|---|---|---|---|\n"
            f"| transformers, fp32 | {4 * parameters / 1e6:,.0f} | {reference.bits_per_char:.4f}"
            f" | | | {speed:.1f} |"
        )
        f16 = folder / "f16.gguf"
        gguf.convert_model(merged, f16, "f16")
        for file_type in arguments.types.split(","):
            file = folder / f"{file_type}.gguf"
            if file_type != "f16":
                quantize_file(f16, file, file_type)
            result = check.check_file(reference, file, file_type, threads=arguments.threads)
            bits = result["bits_per_character"]["export"]
            print(
                f"| {file_type} | {file.stat().st_size / 1e6:,.0f} | {bits:.4f}"
                f" | {bits / reference.bits_per_char - 1:+.1%}"
                f" | {result['same_text']} of {result['prompts']}"
                f" | {llama_speed(file, prompt, arguments.threads):.1f} |",
                flush=True,
            )
    print(f"\n{len(reference.rows)} held-out rows, {arguments.threads} threads.")


if __name__ == "__main__":
    main()
