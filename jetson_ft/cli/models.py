"""`jetson-ft models`."""

from __future__ import annotations

from dataclasses import asdict

from rich.table import Table

from jetson_ft.cli import output
from jetson_ft.cli.output import JsonOption

_TABLE_WIDTH = 104


def models(as_json: JsonOption = False) -> None:
    """The models known by name, and how each fits on boards of 8 to 64 GB, predicted."""
    from jetson_ft.runs.forecast import forecast_models

    job, forecasts = forecast_models()
    if as_json:
        entries = [asdict(forecast) for forecast in forecasts]
        output.print_json({"schema": 1, "job": job.model_dump(), "models": entries})
        return
    columns = ["name", "parameters", "on disk", "licence", *(f"{m} GB" for m in forecasts[0].fits)]
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, no_wrap=True, justify="right" if name in columns[1:3] else "left")
    for forecast in forecasts:
        table.add_row(
            forecast.name,
            f"{forecast.parameters / 1e9:.2f} B",
            f"{forecast.file_bytes / 1e9:.1f} GB",
            forecast.licence + (" (gated)" if forecast.gated else ""),
            *(fit["format"] if fit else "no" for fit in forecast.fits.values()),
        )
    # In a narrower terminal its lines are wrapped; Rich would leave columns out.
    output.out.print(table, width=max(output.out.width, _TABLE_WIDTH))
    output.out.print()
    output.show(
        "By the board's memory: the largest format of the weights that fits, for LoRA of rank "
        f"{job.lora.rank}\non every linear layer and rows of at most {job.data.max_length} tokens. "
        "Predicted; no board has run this yet.\n"
        "gated: accept its terms on its page on the Hub, then set HF_TOKEN.\n"
        "`jetson-ft plan --model NAME` predicts memory and time, also for other models on the Hub."
    )
