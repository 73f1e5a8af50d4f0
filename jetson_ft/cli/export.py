"""`jetson-ft export`."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from jetson_ft.cli.output import (
    RUNS,
    JsonOption,
    ProgressBar,
    RunArgument,
    RunsOption,
    json_errors,
    print_json,
    show,
)
from jetson_ft.files import quoted
from jetson_ft.i18n import duration


def export(
    run: RunArgument = "latest",
    kind: Annotated[
        str,
        Option(
            "--format",
            help="merged (safetensors), gguf (llama.cpp, Ollama), lora (the adapter as GGUF).",
        ),
    ] = "merged",
    quantize: Annotated[
        list[str] | None,
        Option(help="File type for gguf: f16, q8_0, q4_k_m, …; repeatable. By default f16."),
    ] = None,
    dtype: Annotated[str, Option(help="Weights for merged: bf16 or fp16.")] = "bf16",
    check: Annotated[
        bool, Option("--check/--no-check", help="Compare the result with the adapter.")
    ] = True,
    as_json: JsonOption = False,
    runs: RunsOption = RUNS,
) -> None:
    """Make what other programs read of a run's adapter."""
    from jetson_ft.runs import exports, store

    file_types = quantize or ["f16"]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # nothing half-made is left then
    with json_errors(as_json):
        exports.check_options(kind, file_types, dtype)
        exported = store.find_run(run, runs)
        plan = exports.plan_export(exported, kind, file_types, check)
        if not as_json:
            show(
                f"{exported.name}: up to {plan.disk / 10**9:.1f} GB of disk, "
                f"{plan.memory / 2**30:.1f} GiB of memory ({plan.memory_free / 2**30:.1f} GiB free)"
            )
        with ProgressBar(live=not as_json) as bar:
            update = _progress_of(bar, quiet=as_json)
            folders = exports.make_export(
                exported, kind, quantize=file_types, dtype=dtype, check=check, on_progress=update
            )
        made = [exports.find_export(exported, folder.name) for folder in folders]
    if as_json:
        print_json({"schema": 1, "exports": made})
        return
    for entry in made:
        assert entry is not None, "it was made above"
        print_export(entry)
    _print_next(exported.path, kind, folders)


def _progress_of(bar: ProgressBar, quiet: bool) -> Any:
    """Return a function that draws a part's progress and the time that it still takes."""
    part, started = "", 0.0

    def update(name: str, done: int, total: int) -> None:
        nonlocal part, started
        now = time.monotonic()
        if name != part:
            part, started = name, now
        left, share = "", ""
        if done and total:
            share = f": {done / total:.0%}"
            if now - started > 2 and done < total:
                left = f"about {duration((total - done) * (now - started) / done)} left"
        line = "" if quiet else f"{name}{share}{left and ', '}{left}"
        bar.show(name, done, total or None, left, line, due=not done)

    return update


def print_export(entry: dict[str, Any]) -> None:
    """Print the files of an export, and what its check found."""
    show(f"{entry['path']}/")
    for file in entry["files"]:
        show(f"  {file['name']:32} {file['bytes'] / 10**6:10,.1f} MB")
    merged = entry["merge"]
    if merged and "largest_logit_difference" in merged:
        base = entry["base"]
        if base["quantize"] != "none":
            show(
                f"  trained on the base as {base['quantize']}, merged into the unquantised one: "
                "they differ by that rounding"
            )
        show(
            f"  merged as {merged['dtype']}: the logits differ from the adapter's by at most "
            f"{merged['largest_logit_difference']:.3g} ({merged['positions']} positions of "
            f"{merged['rows']} held-out rows)"
        )
    show(f"  check: {check_phrase(entry['check'])}")


def check_phrase(check: dict[str, Any]) -> str:
    """Return the result of a check in a line."""
    if not check.get("checked", True):
        return "none (--no-check)"
    texts = ", no text compared" if check.get("prompts") == 0 else ""
    return f"{'passed' if check['passed'] else 'failed'}, read by {check['reader']}{texts}"


def _print_next(run: Path, kind: str, folders: list[Path]) -> None:
    from jetson_ft.export.modelfile import ollama_command

    if kind == "gguf":
        for folder in folders:
            show(f"Ollama:  {ollama_command(run.name, folder)}")
    if kind == "merged":
        show(f"Chat:    jetson-ft chat {quoted(str(folders[0]))}")
    show(f"Serve:   jetson-ft serve {quoted(str(run))}")
