"""`jetson-ft bench`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from jetson_ft.cli.output import ProgressBar, show
from jetson_ft.i18n import duration

if TYPE_CHECKING:
    from jetson_ft.bench.runner import VariantProgress


def bench(
    model: Annotated[str, Option(help="`embedded`, a hub id or a folder.")] = "embedded",
    data: Annotated[str, Option(help="Rows: `bundled`, a file or a hub id.")] = "bundled",
    rows: Annotated[int, Option(min=16, help="Rows that a variant trains on, 8 a step.")] = 40,
    max_length: Annotated[int, Option(min=16, help="Longest row in tokens.")] = 512,
    rank: Annotated[int, Option(min=1, max=1024, help="Rank of the adapter.")] = 8,
    precision: Annotated[str, Option(help="auto, fp32, bf16 or fp16.")] = "auto",
    rounds: Annotated[int, Option(min=1, help="How often every variant runs.")] = 3,
    threads: Annotated[int | None, Option(min=1, help="Threads; by default all cores.")] = None,
    variants: Annotated[
        str | None, Option(metavar="A,B,…", help="Variants; by default all.")
    ] = None,
    llamafactory: Annotated[
        str | None, Option(metavar="PYTHON", help="An interpreter with LLaMA-Factory, to add it.")
    ] = None,
    output: Annotated[Path | None, Option(help="Folder for the results and the log.")] = None,
) -> None:
    """Compare this program's training with the usual alternatives, on this machine."""
    from jetson_ft.bench.runner import bench as run_bench
    from jetson_ft.bench.table import markdown
    from jetson_ft.bench.variants import VARIANTS
    from jetson_ft.bench.workload import Settings
    from jetson_ft.hardware.detect import usable_cores

    chosen = tuple(dict.fromkeys(variants.split(","))) if variants else tuple(VARIANTS)
    settings = Settings(
        model, data, rows, max_length, rank, rounds, threads or usable_cores(), chosen,
        llamafactory, precision,
    )  # fmt: skip
    folder = output or Path("bench") / time.strftime("%Y%m%d-%H%M%S")
    with bench_bar() as on_progress:
        report = run_bench(settings, folder, on_progress)
    show(markdown(report))
    show(f"written: {folder / 'bench.md'}, {folder / 'bench.json'}")
    if all("error" in measured for measured in report["rounds"]):
        raise typer.Exit(1)


@contextmanager
def bench_bar() -> Iterator[Callable[[VariantProgress], None]]:
    """Show a progress bar with the time left, and a line for each variant that has ended."""

    def update(progress: VariantProgress) -> None:
        measured, left = progress.measured, progress.seconds_left
        if measured is None:
            note = "" if left is None else f"about {duration(left)} left"
            text = f"round {progress.round}: {progress.variant}"
            bar.show(text, progress.number - 1, progress.of, note)
            return
        if "error" in measured:
            result = f"failed: {measured['error']}"
        else:
            peak = measured["peak_memory_bytes"]
            memory = f", {peak / 2**30:.2f} GiB" if peak else ""
            result = f"{measured['tokens_per_second']:,.0f} tokens/s{memory}"
        show(f"round {progress.round}  {progress.variant:24} {result}")

    with ProgressBar() as bar:
        bar.show("preparing", 0, None)
        yield update
