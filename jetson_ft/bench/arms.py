"""The arms of a benchmark: what each one is, and how it trains a lesson.

An arm's function takes the lesson and an empty folder to write to. Nothing heavy is loaded
before one is called.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from jetson_ft.bench.lesson import Lesson, Settings, Trained

BASELINES = ("trainer", "packed")  # that the others are compared with


def _nothing(settings: Settings) -> str:
    return ""


@dataclass(frozen=True)
class Arm:
    """One way to train. `lacks` says what this machine lacks for it, or nothing."""

    description: str
    train: Callable[[Lesson, str], Trained]
    lacks: Callable[[Settings], str] = _nothing


def _padded(lesson: Lesson, folder: str, batch: int) -> Trained:
    from jetson_ft.bench import trainers

    return trainers.padded(lesson, folder, batch)


def _packed(lesson: Lesson, folder: str) -> Trained:
    from jetson_ft.bench import trainers

    return trainers.packed(lesson, folder)


def _trl(lesson: Lesson, folder: str) -> Trained:
    from jetson_ft.bench import trainers

    return trainers.padding_free(lesson, folder)


def _llamafactory(lesson: Lesson, folder: str, batch: int = 1, packed: bool = False) -> Trained:
    from jetson_ft.bench import llamafactory

    return llamafactory.train(lesson, folder, batch, packed)


def _ours(lesson: Lesson, folder: str, without: str = "") -> Trained:
    from jetson_ft.bench import ours

    return ours.train(lesson, folder, without)


def _lacks_trl(settings: Settings) -> str:
    return "" if importlib.util.find_spec("trl") else "trl is not installed in this environment"


def _lacks_llamafactory(settings: Settings) -> str:
    if not settings.llamafactory:
        return "no interpreter was named that has it (--llamafactory PYTHON)"
    if not shutil.which(settings.llamafactory):
        return f"{settings.llamafactory} is no program that can be started"
    code = "import importlib.util as u, sys; sys.exit(u.find_spec('llamafactory') is None)"
    done = subprocess.run([settings.llamafactory, "-c", code], capture_output=True, check=False)
    return f"{settings.llamafactory} doesn't have llamafactory" if done.returncode else ""


ARMS = {
    "trainer": Arm(
        "transformers' Trainer with PEFT: batches of 8 padded to the longest row, checkpointing",
        partial(_padded, batch=8),
    ),
    "trainer-1x8": Arm(
        "transformers' Trainer with PEFT: one row at a time, gradients accumulated over 8",
        partial(_padded, batch=1),
    ),
    "packed": Arm(
        "Trainer with PEFT: rows packed into bins of max_length, checkpointing, whole head",
        _packed,
    ),
    "trl": Arm(
        "TRL's SFTTrainer, padding-free: 8 rows in one sequence, checkpointing", _trl, _lacks_trl
    ),
    "llamafactory": Arm(
        "LLaMA-Factory's command line, one row at a time, gradients accumulated over 8",
        _llamafactory,
        _lacks_llamafactory,
    ),
    "llamafactory-batch-8": Arm(
        "LLaMA-Factory's command line, batches of 8 padded to the longest row",
        partial(_llamafactory, batch=8),
        _lacks_llamafactory,
    ),
    "llamafactory-packed": Arm(
        "LLaMA-Factory's command line, rows packed into bins of max_length (neat_packing), about "
        "8 rows a step",
        partial(_llamafactory, packed=True),
        _lacks_llamafactory,
    ),
    "ours": Arm("this program, as `jetson-ft train` trains", _ours),
    "ours-without-fused": Arm(
        "ours with PEFT's own layers and the model's own norms and activations",
        partial(_ours, without="fused"),
    ),
    "ours-without-head": Arm(
        "ours with a micro-batch's logits all in memory", partial(_ours, without="head")
    ),
    "ours-without-packing": Arm(
        "ours with each row alone and transformers' attention", partial(_ours, without="packing")
    ),
    "ours-without-sharing": Arm(
        "ours with what rows begin with computed anew for each", partial(_ours, without="sharing")
    ),
    "ours-with-checkpointing": Arm(
        "ours with activations computed again instead of kept", partial(_ours, without="kept")
    ),
}
