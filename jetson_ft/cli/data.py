"""`jetson-ft data …`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

from jetson_ft.cli.output import JsonOption, json_errors, out, print_json, show
from jetson_ft.errors import Message

app = typer.Typer(help="Look at training data.", no_args_is_help=True)


@app.command()
def inspect(
    paths: Annotated[
        list[str],
        Argument(help="A file, a hub data set id, `bundled` or `bundled-short`; several together."),
    ],
    model: Annotated[str, Option(help="Model whose tokenizer is used.")] = "embedded",
    max_length: Annotated[int, Option(min=16, help="Longest row in tokens.")] = 1024,
    samples: Annotated[int, Option(min=0, help="Rows shown as tokenized.")] = 3,
    layout: Annotated[
        Literal["auto", "alpaca", "sharegpt", "messages", "text"],
        Option("--format", help="Row layout."),
    ] = "auto",
    encoding: Annotated[str, Option(help="auto, utf-8, gb18030, …")] = "auto",
    column: Annotated[
        list[str], Option(help="As in data.columns, such as question=title; several times.")
    ] = [],  # noqa: B006 - typer copies it
    chat_template: Annotated[
        str | None, Option(help="Chat template, as `data.chat_template` in a recipe.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Format, invalid rows and lengths of the data, and rows as tokenized."""
    from jetson_ft.recipe import parse_recipe
    from jetson_ft.runs.inspection import inspect_data

    quoted = (name if name[:1] == "{" else json.dumps(name, ensure_ascii=False) for name in paths)
    settings = [
        f"train=[{', '.join(quoted)}]", f"max_length={max_length}", f"format={layout}",
        f"encoding={encoding}", *(f"columns.{text}" for text in column),
    ]  # fmt: skip
    with json_errors(as_json):
        data = parse_recipe("", overrides=[f"data.{text}" for text in settings]).data
        data.chat_template = chat_template
        inspection = inspect_data(data, model, samples)
    if as_json:
        print_json(asdict(inspection))
        return
    for part in inspection.sources:
        print_source(part["read"])
    print_parts(inspection.sources)
    tokens = inspection.tokens
    show(
        f"tokens:    {tokens['tokens']:,} with the tokenizer of {inspection.model} "
        f"({tokens['tokens_per_character']} a character), "
        f"{tokens['supervised_tokens']:,} supervised"
    )
    show("lengths:   " + ", ".join(f"{key} {value:,}" for key, value in tokens["lengths"].items()))
    print_cut(tokens)
    for number, row in enumerate(inspection.previews, 1):
        out.rule(f"row {number}; what is trained on is marked", align="left")
        for text, trained in row:
            print_segment(text, trained)
        out.print()


def print_segment(text: str, trained: bool) -> None:
    """Print a part of a row; what is trained on has a colour, or brackets without a terminal."""
    if trained and not out.is_terminal:
        text = f"⟦{text}⟧"
    show(text, style="bold green" if trained else "dim", end="")


def print_rows(rows: dict[str, Any], notes: bool = True) -> None:
    """Print the report of a run's rows: those trained on, then the held-out ones.

    Args:
        notes: print the notes on the rows; a run has them as warnings too.
    """
    train, heldout, read = rows["train"], rows["heldout"], rows["read"]
    for part in read["sources"]:
        print_source(part["read"], 5)
    print_parts(read["sources"])
    counts = "{rows:,} rows, {tokens:,} tokens, {supervised_tokens:,} supervised"
    show(f"train on:  {counts.format(**train)}")
    if read["left_out"]:
        show(f"left out:  {read['left_out']:,} that are also in the held-out set")
    print_cut(train, notes)
    for part in read["heldout"]:
        print_source(part["read"], 5)
    show(f"held out:  {counts.format(**heldout)} (from {read['heldout_from']})")
    print_cut(heldout, notes)


def print_parts(parts: list[dict[str, Any]]) -> None:
    """Print how much of the rows each of several sources gives."""
    for part in parts if len(parts) > 1 else []:
        repeated = f", {part['repeated']:,} also in an earlier one" if part["repeated"] else ""
        show(
            f"source:    {part['name']}: {part['read']['rows_read']:,} rows read{repeated}, "
            f"{part['rows']:,} used, {part['tokens']:,} tokens"
        )


def print_source(read: dict[str, Any], places: int | None = None) -> None:
    """Print what a source contains, and how many of its rows can be used.

    Args:
        places: number of unusable rows to name for each fault; None: all that are listed.
    """
    for file in read["files"]:
        show(f"file:      {file['path']}")
    show(f"format:    {read['container']}, {read['layout']}, {read['encoding'] or 'binary'}")
    show(
        f"rows:      {read['rows_read']:,} read, {read['rows_kept']:,} usable, "
        f"{read['duplicates']:,} duplicates"
    )
    if read["unread"]:
        names = ", ".join(f"{name} ({count:,})" for name, count in read["unread"].items())
        show(f"not read:  {names}")
    for reason, entry in read["dropped"].items():
        listed = entry["where"][:places]
        more = ["…"] if entry["count"] > len(listed) else []
        show(f"unusable:  {entry['count']:,} {reason} ({', '.join(listed + more)})")


def print_cut(tokens: dict[str, Any], notes: bool = True) -> None:
    """Print how many rows were cut at `max_length`, the rows dropped, and the notes on the rows."""
    share = tokens["truncated"] / max(1, tokens["rows"])
    show(f"cut:       {tokens['truncated']:,} rows ({share:.1%}) at max_length")
    if tokens.get("split"):
        show(f"split:     {tokens['split']:,} documents, into rows of at most max_length")
    for reason, count in tokens["dropped"].items():
        show(f"dropped:   {count:,} {reason}")
    for notice in tokens.get("notices", []) if notes else []:
        show(f"note:      {Message.from_json(notice)}")
