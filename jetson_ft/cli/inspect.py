"""`jetson-ft inspect`: what a model does inside, in the terminal, as JSON, or as one HTML page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from jetson_ft.cli import inspect_text
from jetson_ft.cli.output import (
    RUNS,
    SAMPLING_OPTIONS,
    BaseOption,
    JsonOption,
    QuantizeOption,
    RunsOption,
    SystemOption,
    TargetArgument,
    json_errors,
    print_json,
    show,
)
from jetson_ft.files import expand_user
from jetson_ft.inference.generate import Sampling
from jetson_ft.inside.examples import CAPITALS, CAPITALS_QUESTION, QUESTION, SAMPLING, SENTENCE

app = typer.Typer(
    help="Show what a model does inside: tokens, attention, the next token, sizes, the adapter.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

TextArgument = Annotated[str, Argument(metavar="TEXT")]
AnswerOption = Annotated[str | None, Option(help="The answer to the text.")]
HtmlOption = Annotated[
    Path | None, Option("--html", metavar="FILE", help="Write a page that loads nothing else.")
]
Options = dict[str, Any]  # of a view


@app.command()
def tokens(
    model: TargetArgument = "latest",
    text: TextArgument = SENTENCE,
    answer: AnswerOption = None,
    system: SystemOption = "",
    as_json: JsonOption = False,
    html: HtmlOption = None,
    base: BaseOption = None,
    runs: RunsOption = RUNS,
) -> None:
    """A text as tokens, with their numbers and bytes; with --answer, what is trained on."""
    options = {"text": text, "answer": answer, "system": system}
    _inspect({"tokens": options}, model, base, None, runs, as_json, html)


@app.command()
def attention(
    model: TargetArgument = "latest",
    text: TextArgument = SENTENCE,
    layer: Annotated[int | None, Option(min=0, help="One layer; by default all.")] = None,
    head: Annotated[int, Option(min=0, help="Head of the example by numbers.")] = 0,
    as_json: JsonOption = False,
    html: HtmlOption = None,
    base: BaseOption = None,
    quantize: QuantizeOption = None,
    runs: RunsOption = RUNS,
) -> None:
    """How much each token attends to each other, by layer and head; one head by numbers."""
    views: dict[str, Options] = {
        "attention": {"text": text, "layers": None if layer is None else [layer]},
        "attention_example": {"text": text, "layer": layer, "head": head},
    }
    _inspect(views, model, base, quantize, runs, as_json, html)


@app.command("next")
def next_token(
    model: TargetArgument = "latest",
    text: TextArgument = QUESTION,
    reply: Annotated[str, Option(help="The start of the reply.")] = "",
    system: SystemOption = "",
    plain: Annotated[bool, Option("--plain", help="Continue the text; no chat template.")] = False,
    top: Annotated[int, Option(min=1, max=100, help="Number of tokens to show.")] = 20,
    temperature: Annotated[float, SAMPLING_OPTIONS["temperature"]] = SAMPLING.temperature,
    top_k: Annotated[int, SAMPLING_OPTIONS["top_k"]] = SAMPLING.top_k,
    top_p: Annotated[float, SAMPLING_OPTIONS["top_p"]] = SAMPLING.top_p,
    repetition_penalty: Annotated[
        float, SAMPLING_OPTIONS["repetition_penalty"]
    ] = SAMPLING.repetition_penalty,
    as_json: JsonOption = False,
    html: HtmlOption = None,
    base: BaseOption = None,
    quantize: QuantizeOption = None,
    runs: RunsOption = RUNS,
) -> None:
    """The likeliest next tokens, and what temperature, top-k and top-p make of them."""
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty
    )
    options = {"text": text, "reply": reply, "system": system, "use_template": not plain}
    options |= {"top": top, "sampling": sampling}
    _inspect({"next_token": options}, model, base, quantize, runs, as_json, html)


@app.command()
def reply(
    model: TargetArgument = "latest",
    text: TextArgument = QUESTION,
    answer: AnswerOption = None,
    system: SystemOption = "",
    max_new_tokens: Annotated[int, Option(min=1, max=128, help="Longest reply.")] = 32,
    as_json: JsonOption = False,
    html: HtmlOption = None,
    base: BaseOption = None,
    quantize: QuantizeOption = None,
    runs: RunsOption = RUNS,
) -> None:
    """A reply token by token: how likely base and adapter find each, where they differ most."""
    options = {"text": text, "answer": answer, "system": system, "max_new_tokens": max_new_tokens}
    _inspect({"reply": options}, model, base, quantize, runs, as_json, html)


@app.command("in-context")
def in_context(
    model: TargetArgument = "latest",
    text: TextArgument = CAPITALS_QUESTION,
    examples: Annotated[
        Path | None, Option(help="Few-shot examples, a JSON file; by default three capitals.")
    ] = None,
    answer: AnswerOption = None,
    system: SystemOption = "",
    max_new_tokens: Annotated[int, Option(min=1, max=128, help="Longest reply.")] = 24,
    as_json: JsonOption = False,
    html: HtmlOption = None,
    base: BaseOption = None,
    quantize: QuantizeOption = None,
    runs: RunsOption = RUNS,
) -> None:
    """The reply with no, one and several examples before the question, of base and adapter."""
    from jetson_ft.chat.session import read_examples

    pairs = CAPITALS
    if examples:
        with json_errors(as_json):
            texts = [turn["content"] for turn in read_examples(expand_user(str(examples)))]
        pairs = list(zip(texts[::2], texts[1::2], strict=True))
    options: Options = {"text": text, "examples": pairs, "answer": answer, "system": system}
    options |= {"max_new_tokens": max_new_tokens}
    _inspect({"in_context": options}, model, base, quantize, runs, as_json, html)


@app.command()
def numbers(
    model: TargetArgument = "latest",
    matrix: Annotated[str, Option(help="Weight matrix to quantize; by default one midway.")] = "",
    as_json: JsonOption = False,
    html: HtmlOption = None,
    base: BaseOption = None,
    runs: RunsOption = RUNS,
) -> None:
    """Parameters and bytes by part and format, memory of training, one matrix quantized."""
    from jetson_ft.chat.target import resolve_target
    from jetson_ft.hardware.detect import detect_device
    from jetson_ft.inside.numbers import compute_numbers
    from jetson_ft.inside.quantization import compute_quantization
    from jetson_ft.models import catalog, files

    def compute() -> tuple[dict[str, Any], str]:
        recipe = resolve_target(model, runs, base).recipe
        views = {"numbers": compute_numbers(recipe, detect_device()).to_json()}
        # Of a model on the Hub, what isn't here is downloaded only where a matrix is named.
        here = files.has_weights_here(recipe.model)
        weights = files.resolve_model(recipe.model) if matrix or here else None
        if weights and (matrix or not weights.gguf_file):  # one of a GGUF can't be read alone
            dims = catalog.model_dims(weights)
            views["quantization"] = compute_quantization(weights, dims, matrix).to_json()
        return views, recipe.model

    _show(compute, as_json, html)


@app.command()
def adapter(
    model: TargetArgument = "latest",
    as_json: JsonOption = False,
    html: HtmlOption = None,
    base: BaseOption = None,
    quantize: QuantizeOption = None,
    runs: RunsOption = RUNS,
) -> None:
    """Which layers the adapter changed most, and how many directions each change needs."""
    _inspect({"adapter": {}}, model, base, quantize, runs, as_json, html)


def _inspect(
    views: Mapping[str, Options],
    model: str,
    base: str | None,
    quantize: str | None,
    runs: Path,
    as_json: bool,
    html: Path | None,
) -> None:
    """Load a model, compute views of it with their options, and show them."""

    def compute() -> tuple[dict[str, Any], str]:
        from jetson_ft.chat.target import open_session, resolve_target
        from jetson_ft.inside.views import compute_view

        target = resolve_target(model, runs, base, quantize)
        session = open_session(target)
        results = {name: compute_view(session, name, options) for name, options in views.items()}
        if not target.adapter_dir:
            return results, target.recipe.model
        folder = target.adapter_dir.resolve()  # a run's is RUN/adapter
        label = folder.parent.name if folder.name == "adapter" else folder.name
        return results, f"{target.recipe.model} with {label}"

    _show(compute, as_json, html)


def _show(
    compute: Callable[[], tuple[dict[str, Any], str]], as_json: bool, html: Path | None
) -> None:
    """Print the views that `compute` returns, with the model's title, or write them to a page."""
    with json_errors(as_json):
        views, title = compute()
        if html:
            from jetson_ft.inside.page import write_page

            write_page(expand_user(str(html)), views, title)
    if as_json:
        print_json({"schema": 1, "model": title, "views": views})
        return
    show(title, style="bold")
    for name, data in views.items():
        inspect_text.PRINTERS[name](data)
    if html:
        show(f"written: {html}")
