"""`jetson-ft models`."""

from __future__ import annotations

from dataclasses import asdict

from jetson_ft.cli import output
from jetson_ft.cli.output import JsonOption


def models(as_json: JsonOption = False) -> None:
    """The models known by name, and how each fits on boards of 8 to 64 GB, predicted."""
    from jetson_ft.runs.forecast import forecast_models

    job, forecasts = forecast_models()
    if as_json:
        entries = [asdict(forecast) for forecast in forecasts]
        output.print_json({"schema": 1, "job": job.model_dump(), "models": entries})
        return
    rows = [("name", "parameters", "on disk", "licence", *(f"{m} GB" for m in forecasts[0].fits))]
    for forecast in forecasts:
        fits = (fit["format"] if fit else "no" for fit in forecast.fits.values())
        licence = forecast.licence + (" (gated)" if forecast.gated else "")
        parameters, size = (
            f"{forecast.parameters / 1e9:.2f} B",
            f"{forecast.file_bytes / 1e9:.1f} GB",
        )
        rows.append((forecast.name, parameters, size, licence, *fits))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:  # not a table of Rich, which cuts names off in a narrow terminal
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        output.show("  ".join(cells).rstrip())
    output.out.print()
    output.show(
        "By the board's memory: the largest format of the weights that fits, for LoRA of rank "
        f"{job.lora.rank}\non every linear layer and rows of at most {job.data.max_length} tokens. "
        "Predicted; no board has run this yet.\n"
        "gated: accept its terms on its page on the Hub, then set HF_TOKEN.\n"
        "`jetson-ft plan --model NAME` predicts memory and time, also for other models on the Hub."
    )
