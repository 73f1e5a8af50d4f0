#!/usr/bin/env python3
"""The gain of computing a shared prefix once, on short rows behind one long system prompt.

    python benchmarks/shared_prefix.py
    python benchmarks/shared_prefix.py --rows 32 --rounds 3 --facts 4

Each row has the same system prompt, a manual of `--facts` sentences, then one short question and
its answer. `ours` computes the prompt once for the rows of a micro-batch, `ours-without-sharing`
for each row. Both run in processes of their own, in interleaved rounds. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import fmean, median

from jetson_ft.bench.runner import bench
from jetson_ft.bench.table import (
    Report,
    loss_difference,
    markdown_table,
    maximum,
    pair_by_round,
    require_success,
    speed_ratios,
    summarize,
)
from jetson_ft.bench.workload import Settings
from jetson_ft.hardware.detect import usable_cores

BASELINE, SHARING = "ours-without-sharing", "ours"
PARTS = (
    "main valve", "feed pump", "heat exchanger", "control panel", "drain filter", "fan belt",
    "pressure gauge", "safety switch", "oil tank", "water inlet",
)  # fmt: skip
ACTIONS = ("check", "clean", "replace", "calibrate")


def make_rows(path: Path, rows: int, facts: int) -> Path:
    """Write `rows` conversations, whose system prompt states `facts` facts about a machine."""
    prompt = "You answer questions about the plant from this manual, in one short sentence. "
    prompt += " ".join(
        f"The {PARTS[number % len(PARTS)]} has the part number {4100 + 37 * number}; inspect it "
        f"every {number + 2} weeks and note the date in the log."
        for number in range(facts)
    )
    lines = []
    for number in range(rows):
        part, action = PARTS[number % len(PARTS)], ACTIONS[number // len(PARTS) % len(ACTIONS)]
        messages = [
            {"role": "system", "content": prompt},
            {"role": "user", "content": f"Request {number}: when do I {action} the {part}?"},
            {"role": "assistant", "content": f"Please {action} it after {3 * number + 10} hours."},
        ]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def show(report: Report) -> None:
    """Print a Markdown table, then the size of the rows and the largest difference in loss."""
    rounds = report["rounds"]
    require_success(rounds)
    cells = []
    for line in summarize([BASELINE, SHARING], {}, rounds):
        own = [one for one in rounds if one["variant"] == line.variant]
        ratios = speed_ratios(pair_by_round(own, BASELINE, rounds))
        cells.append(
            (
                line.variant,
                f"{line.tokens_per_second:,.0f} ({line.slowest:,.0f} to {line.fastest:,.0f})",
                f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                f"{fmean(one['computed_tokens'] / one['tokens'] for one in own):.0%}",
                f"{(line.peak_memory_bytes or 0) / 2**30:.2f}",
            )
        )
    head = ("variant", "tokens/s", "ratio", "tokens computed", "peak GiB")
    print("\n".join(markdown_table(head, cells)))
    workload, plan = report["workload"], rounds[-1]["plan"] or {}
    per_step = workload["timed_tokens"] / (workload["steps"] - 1)
    print(
        f"\n{report['precision']}, {workload['steps']} steps of {per_step:,.0f} tokens, "
        f"{workload['rows'] / workload['steps']:.0f} rows each; "
        f"micro-batches of {plan['micro_batch_tokens']} tokens"
    )
    ours = [one for one in rounds if one["variant"] == SHARING]
    largest = maximum([loss_difference(*pair) for pair in pair_by_round(ours, BASELINE, rounds)])
    difference = "an unknown amount" if largest is None else f"at most {largest:.6f} nats"
    print(f"losses differ by {difference}")


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--facts", type=int, default=6, help="sentences of the system prompt")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--max-length", type=int, default=1024)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # More rows than needed: some are held out.
        rows = make_rows(Path(folder) / "rows.jsonl", 2 * options.rows, options.facts)
        settings = Settings(
            model=options.model,
            data=str(rows),
            rows=options.rows,
            max_length=options.max_length,
            rank=8,
            rounds=options.rounds,
            threads=options.threads,
            variants=(BASELINE, SHARING),
            precision=options.precision,
        )
        show(bench(settings, Path(folder) / "out", lambda turn: None))


if __name__ == "__main__":
    main()
