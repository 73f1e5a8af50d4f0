"""The process of one arm in one round: `python -m jetson_ft.bench.arm ARM LESSON RESULT`.

It writes what it measured, or why it failed, to the file RESULT.
"""

from __future__ import annotations

import math
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from jetson_ft.bench import lesson as lessons
from jetson_ft.bench.arms import ARMS
from jetson_ft.bench.lesson import Lesson
from jetson_ft.device.probe import measure_flops
from jetson_ft.errors import UserError
from jetson_ft.paths import write_json
from jetson_ft.runs.worker import quieten
from jetson_ft.training.memory import is_out_of_memory


def main(name: str, lesson: Path, result: Path) -> None:
    """Trains the lesson; any failure is a result too."""
    quieten()
    try:
        found = measure(name, lessons.load(lesson))
    except Exception as error:
        traceback.print_exc()
        found = {"error": reason(error)}
    write_json(result, found)


def reason(error: Exception) -> str:
    """Why an arm failed, in one line."""
    if isinstance(error, UserError):
        return error.what
    if is_out_of_memory(error):
        return "out of memory"
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"


def measure(name: str, lesson: Lesson) -> dict[str, Any]:
    """Figures of one training: a rate over all steps but the first, memory, losses, roof.

    The roof is what the machine's matrix products allow in the needed arithmetic alone: no
    recomputing, no padding, the head where a token is learnt, and of an opening that rows
    share, what the arm computed of it.
    """
    import torch

    from jetson_ft.training.planner import flops_per_token

    torch.set_num_threads(lesson.settings.threads)
    kind, precision = lesson.device.kind, lesson.precision
    before = measure_flops(kind, precision)
    with tempfile.TemporaryDirectory() as folder:
        seen = ARMS[name].train(lesson, folder)
    after = measure_flops(kind, precision)
    if seen.timed_tokens is None and len(seen.ends) != len(lesson.steps()):
        raise RuntimeError(f"made {len(seen.ends)} of {len(lesson.steps())} steps")
    tokens = seen.timed_tokens or lesson.timed_tokens()
    seconds = seen.ends[-1] - seen.ends[0]
    needed = flops_per_token(lesson.work(), checkpointing=False)
    computed = seen.computed_tokens or tokens
    return {
        "tokens": tokens,
        "computed_tokens": computed,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_memory_bytes": seen.peak_memory_bytes,
        "losses": [loss if math.isfinite(loss) else None for loss in seen.losses],
        "plan": seen.plan,
        "flops_per_token": needed,
        "matmul_flops": [before, after],
        "roof_share": computed / seconds * needed / ((before + after) / 2),
    }


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
