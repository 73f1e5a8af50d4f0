"""The variants of a benchmark: each way to train, with its description, and its process.

`python -m jetson_ft.bench.variants VARIANT WORKLOAD RESULT` trains the workload once and writes the
measurement, or why the variant failed, to the file RESULT. Heavy libraries are imported when a
variant trains, not before: the process that starts the variants stays small.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jetson_ft.bench import llamafactory, ours
from jetson_ft.bench.table import Measurement
from jetson_ft.bench.workload import BenchWorkload, Result, Settings, load_workload
from jetson_ft.errors import UserError
from jetson_ft.files import write_json
from jetson_ft.hardware.detect import measure_flops
from jetson_ft.runs.processes import silence_libraries
from jetson_ft.training.memory import is_out_of_memory


@dataclass(frozen=True)
class Variant:
    """One way to train; `train` takes the workload and an empty folder to write to."""

    description: str
    train: Callable[[BenchWorkload, str], Result]
    package: str = ""  # needed, and not one of this program's: trl or llamafactory

    def unavailable(self, settings: Settings) -> str:
        """Return why the variant can't run on this machine, or an empty string."""
        python = settings.llamafactory
        if self.package == "trl" and not importlib.util.find_spec("trl"):
            return "trl is not installed in this environment"
        if self.package != "llamafactory":
            return ""
        if not python:
            return "no interpreter with LLaMA-Factory is given (--llamafactory PYTHON)"
        if not shutil.which(python):
            return f"{python} is not a program that can be started"
        code = "import importlib.util as u, sys; sys.exit(u.find_spec('llamafactory') is None)"
        done = subprocess.run([python, "-c", code], capture_output=True, check=False)
        return f"{python} doesn't have llamafactory" if done.returncode else ""


def _trainer(workload: BenchWorkload, folder: str, **options: Any) -> Result:
    from jetson_ft.bench import trainers

    return trainers.train(workload, folder, **options)


VARIANTS = {
    "trainer": Variant(
        "transformers' Trainer with PEFT: batches of 8 padded to the longest row, checkpointing",
        partial(_trainer, batch=8),
    ),
    "trainer-1x8": Variant(
        "transformers' Trainer with PEFT: one row at a time, gradients accumulated over 8",
        partial(_trainer, batch=1),
    ),
    "packed": Variant(
        "Trainer with PEFT: rows packed into bins of max_length, checkpointing, whole LM head",
        partial(_trainer, mode="packed"),
    ),
    "trl": Variant(
        "TRL's SFTTrainer, padding-free: 8 rows in one sequence, checkpointing",
        partial(_trainer, mode="padding-free"),
        "trl",
    ),
    "llamafactory": Variant(
        "LLaMA-Factory's command line, one row at a time, gradients accumulated over 8",
        llamafactory.train,
        "llamafactory",
    ),
    "llamafactory-batch-8": Variant(
        "LLaMA-Factory's command line, batches of 8 padded to the longest row",
        partial(llamafactory.train, batch=8),
        "llamafactory",
    ),
    "llamafactory-packed": Variant(
        "LLaMA-Factory's command line, rows packed into bins of max_length (neat_packing), about "
        "8 rows per step",
        partial(llamafactory.train, packed=True),
        "llamafactory",
    ),
    "ours": Variant("this program, as `jetson-ft train` trains", ours.train),
    "ours-without-fused": Variant(
        "ours with PEFT's own layers and the model's own norms and activations",
        partial(ours.train, without="fused layers"),
    ),
    "ours-without-head": Variant(
        "ours with all logits of a micro-batch in memory at once",
        partial(ours.train, without="chunked head"),
    ),
    "ours-without-packing": Variant(
        "ours with each row alone and transformers' attention",
        partial(ours.train, without="packing"),
    ),
    "ours-without-sharing": Variant(
        "ours with the shared prefix of the rows computed for each row",
        partial(ours.train, without="shared prefix"),
    ),
    "ours-with-checkpointing": Variant(
        "ours with activations recomputed instead of kept",
        partial(ours.train, without="kept activations"),
    ),
}


def main(name: str, workload_file: Path, result_file: Path) -> None:
    silence_libraries()
    try:
        measurement = measure(name, load_workload(workload_file))
    except Exception as error:
        traceback.print_exc()
        measurement = {"error": describe_error(error)}
    write_json(result_file, measurement)


def describe_error(error: Exception) -> str:
    """Return why a variant failed, in one line."""
    if isinstance(error, UserError):
        return str(error.what)
    if is_out_of_memory(error):
        return "out of memory"
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line}"


def measure(name: str, workload: BenchWorkload) -> Measurement:
    """Train the workload once; return the figures, timed over all steps but the first.

    The share of peak compares the required arithmetic with the machine's rate of matrix products.
    Required means: no recomputing, no padding, the LM head at supervised positions only, and a
    shared prefix as often as the variant computed it.

    Raises:
        RuntimeError: the variant made another number of steps than the workload has.
    """
    import torch

    from jetson_ft.training.cost_model import flops_per_token

    torch.set_num_threads(workload.settings.threads)
    kind, precision = workload.device.kind, workload.weights.precision
    before = measure_flops(kind, precision)
    with tempfile.TemporaryDirectory() as folder:
        result = VARIANTS[name].train(workload, folder)
    after = measure_flops(kind, precision)
    steps = len(workload.steps())
    if result.timed_tokens is None and len(result.step_ends) != steps:
        raise RuntimeError(f"made {len(result.step_ends)} of {steps} steps")
    tokens = result.timed_tokens or workload.timed_tokens()
    computed_tokens = result.computed_tokens or tokens
    seconds = result.step_ends[-1] - result.step_ends[0]
    flops = flops_per_token(workload.planner_workload(), checkpointing=False)
    return {
        "tokens": tokens,
        "computed_tokens": computed_tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_memory_bytes": result.peak_memory_bytes,
        "losses": [loss if math.isfinite(loss) else None for loss in result.losses],
        "plan": result.plan,
        "flops_per_token": flops,
        "matmul_flops": [before, after],
        "share_of_peak": computed_tokens / seconds * flops / ((before + after) / 2),
    }


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
