"""The result of a run: report.json for programs, report.md and report.html for people."""

from __future__ import annotations

import time
from importlib import metadata
from pathlib import Path
from typing import Any

from jetson_ft import __version__
from jetson_ft.paths import write_atomic, write_json
from jetson_ft.runs import chart, sensed
from jetson_ft.runs.rundir import Run

SCHEMA = 1
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate")

# Key in before/after, English and Chinese name, format, which way is better (0: neither).
FIGURES = (
    ("loss", "Loss on the answers (nats per token)", "答案的损失（奈特/词元）", "{:.3f}", -1),
    ("bits_per_char", "Bits per character", "每字符比特数", "{:.3f}", -1),
    ("chinese_share", "Chinese share of the replies", "回答中的中文占比", "{:.0%}", 1),
    ("stop_rate", "Replies that end by themselves", "自行结束的回答", "{:.0%}", 1),
    ("repetition", "Repeated 4-grams", "重复的四字片段", "{:.0%}", -1),
    ("chrf", "chrF", "chrF", "{:.1f}", 1),
    ("bleu", "BLEU", "BLEU", "{:.1f}", 1),
)


def write(run: Run, facts: dict[str, Any]) -> dict[str, Any]:
    """Writes the three reports from the pipeline's facts and the run's events."""
    report = compose(run, facts)
    events = run.events()
    write_json(run.path / "report.json", report)
    write_atomic(run.path / "report.md", markdown(run.name, report))
    write_atomic(run.path / "report.html", html(run.name, report, events))
    return report


def compose(run: Run, facts: dict[str, Any]) -> dict[str, Any]:
    """`report.json` (docs/run-directory.md describes it). Bytes, seconds, tokens."""
    recipe, progress = run.recipe(), facts["progress"]
    events = run.events()
    steps = [event for event in events if event["kind"] == "step"]
    losses = [event["loss"] for event in steps if event["loss"] is not None]
    last = losses[-max(1, round(len(losses) / 10)) :]
    return {
        "schema": SCHEMA,
        "recipe_sha256": recipe.sha256(),
        "model": recipe.model,
        "versions": versions(),
        "precision": facts["precision"],
        "data_sha256": facts["data_sha256"],
        "seed": recipe.train.seed,
        "generation": facts["generation"],
        "device": facts["device"],
        "data": facts["data"],
        "train": {
            "steps": progress["step"],
            "best_step": progress["best_step"],
            "stopped_early": progress["stopped_early"],
            "seconds": round(progress["train_seconds"], 1),
            "rows": progress["rows"],
            "tokens": progress["tokens"],
            "supervised_tokens": progress["supervised_tokens"],
            "tokens_per_second": round(
                progress["tokens"] / max(1e-9, progress["train_seconds"]), 1
            ),
            "peak_memory_bytes": facts["peak_memory_bytes"],
            **_energy(progress),
            "final_loss": sum(last) / len(last) if last else None,
        },
        "sensors": sensed.summary(events),
        "plan": facts["plan"],
        "eval": facts["eval"],
    }


def _energy(progress: dict[str, Any]) -> dict[str, float | None]:
    joules, tokens = progress["energy_joules"], progress["tokens"]
    if joules is None or not tokens:
        return {"energy_joules": None, "joules_per_token": None}
    return {"energy_joules": round(joules, 1), "joules_per_token": round(joules / tokens, 6)}


def versions() -> dict[str, str]:
    """Of this program and of the packages that decide what it computes."""
    found = {"jetson-ft": __version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def rows_of_figures(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The before/after table: names, formatted values, and whether it got better."""
    before, after = report["eval"]["before"], report["eval"]["after"]
    return [
        {
            "key": key,
            "en": english,
            "zh": chinese,
            "before": form.format(before[key]),
            "after": form.format(after[key]),
            "verdict": _verdict(after[key] - before[key], better),
        }
        for key, english, chinese, form, better in FIGURES
    ]


def _verdict(change: float, better: int) -> str:
    if abs(change) < 1e-9 or not better:
        return "same"
    return "better" if change * better > 0 else "worse"


def pairs(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Replies side by side."""
    return [
        {
            "messages": before["messages"],
            "before": before["reply"],
            "after": after["reply"],
            "reference": before["reference"],
        }
        for before, after in zip(
            report["eval"]["before"]["samples"], report["eval"]["after"]["samples"], strict=True
        )
    ]


def markdown(name: str, report: dict[str, Any]) -> str:
    """The report as text for people."""
    train = report["train"]
    lines = [
        f"# {name}",
        "",
        f"{report['model']} ({report['precision']}), {train['steps']} steps, "
        f"{train['tokens']:,} tokens in {duration(train['seconds'])} "
        f"({train['tokens_per_second']:,.0f} tokens/s), "
        f"peak memory {train['peak_memory_bytes'] / 2**30:.2f} GiB, "
        f"{report['device']['board'] or report['device']['name']}{energy_in_words(report)}.",
        *(f"\n{english}" for english, _ in sensed.complaints(report["sensors"])),
        "",
        f"| {report['eval']['rows']} held-out rows | base | adapter |",
        "|---|---:|---:|",
        *(f"| {row['en']} | {row['before']} | {row['after']} |" for row in rows_of_figures(report)),
        "",
    ]
    for number, pair in enumerate(pairs(report), 1):
        lines += [f"## Pair {number}", ""]
        lines += [_quoted(message["role"], message["content"]) for message in pair["messages"]]
        lines += [_quoted("base", pair["before"]), _quoted("adapter", pair["after"])]
        lines += [_quoted("given answer", pair["reference"])]
    return "\n".join(lines) + "\n"


def energy_in_words(report: dict[str, Any]) -> str:
    """For the end of a sentence; empty where it wasn't measured."""
    train = report["train"]
    if train.get("energy_joules") is None:  # reports of older runs don't have it
        return ""
    return f", {train['energy_joules']:,.0f} J ({train['joules_per_token']:.3g} J/token)"


def _quoted(who: str, text: str) -> str:
    body = "\n".join(f"> {line}" for line in (text or "(nothing)").splitlines())
    return f"**{who}**\n\n{body}\n"


def html(name: str, report: dict[str, Any], events: list[dict[str, Any]]) -> str:
    """One self-contained page: no script from elsewhere, no font, no picture to fetch."""
    from jinja2 import Environment, FileSystemLoader, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(default=True, default_for_string=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        name=name,
        report=report,
        train=report["train"],
        figures=rows_of_figures(report),
        pairs=pairs(report),
        chart=chart.losses(_curve(events, "step", "loss"), _curve(events, "eval", "heldout_loss")),
        complaints=sensed.complaints(report["sensors"]),
        duration=duration,
        made=time.strftime("%Y-%m-%d %H:%M"),
    )


def _curve(events: list[dict[str, Any]], kind: str, key: str) -> list[tuple[float, float]]:
    """Values by step; null, which stands for an infinite one, is left out."""
    chosen = (event for event in events if event["kind"] == kind)
    return [(event["step"], event[key]) for event in chosen if event[key] is not None]


def duration(seconds: float) -> str:
    """`4 min 05 s`, `1 h 02 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
