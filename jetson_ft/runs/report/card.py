"""The model card of a run's adapter or of an export: `README.md` in the Hub's format.

It is markdown after a block of YAML metadata. Texts from rows, names and replies are escaped or
stand in code blocks, so that they are neither markup nor HTML. It names no folder of this machine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from jetson_ft import hub
from jetson_ft.adapter import BASE_FILE
from jetson_ft.data.sources import BUNDLED
from jetson_ft.errors import Message, UserError
from jetson_ft.files import printable, printable_value, read_json, write_atomic
from jetson_ft.i18n import duration
from jetson_ft.inference.metrics import chinese_share
from jetson_ft.models import embedded
from jetson_ft.models.catalog import MODELS
from jetson_ft.recipe import Recipe
from jetson_ft.runs.report import figures, summary
from jetson_ft.runs.store import Run

FILE = "README.md"
_MAX_NAME = 200  # characters of a name or a message in a line
_SAMPLES, _MAX_SAMPLE = 3, 2000  # of each text of a sample, in characters
_MIN_HELDOUT = 100  # rows, below which the card says that the figures rest on few
_METRICS = ("loss", "bits_per_char", "chrf", "bleu")  # in the metadata
_BUNDLED_LICENCE = "CC0 1.0"  # data/bundled/README.md
_MARKUP = re.compile(r"[\\`*_{}\[\]()#+!|~$@:]")
_PATH = re.compile(r"(?<![\w./:])[~/](?:[^\s/'\"`]+/)+(?=[^\s/'\"`])")  # all but the last name
# Frequent English words without an equal in the other languages of the Latin alphabet.
_ENGLISH = re.compile(r"\b(?:the|and|of|is|are|what|how|with|for|you|this|that)\b", re.IGNORECASE)
_KANA_OR_HANGUL = re.compile("[\u3040-\u30ff\uac00-\ud7af]")


def write_card(
    run: Run,
    folder: Path,
    export: dict[str, Any] | None = None,
    check: dict[str, Any] | None = None,
) -> None:
    """Write the card of a finished run's adapter, or of an export, into its folder.

    Args:
        export: the content of `export.json`; None: the folder has the adapter.
        check: the content of `check.json`.

    Raises:
        DamagedRun: one of the run's files is missing or can't be used.
    """
    write_atomic(folder / FILE, model_card(run, export, check))


def model_card(
    run: Run, export: dict[str, Any] | None = None, check: dict[str, Any] | None = None
) -> str:
    """Return the text of the card; the arguments are those of `write_card`."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # noqa: S701 - markdown; every text passes one of the two filters
        finalize=printable_value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"inline": inline, "fenced": fenced}
    recipe, report, data = run.recipe(), run.report(), run.last_data() or {}
    sources = _sources(report, data)
    licence = _base_licence(recipe.model, run)
    text = environment.get_template("card.md.jinja").render(
        metadata=_metadata(run, recipe, report, sources, licence, export),
        title=run.title(),
        run=run.name,
        kind=export["kind"] if export else "adapter",
        export=export,
        check=check,
        base=public_base(recipe.model),
        base_on_hub=base_on_hub(recipe.model),
        is_embedded=recipe.model == "embedded",
        fingerprint=(data.get("base") or {}).get("fingerprint"),
        licence=licence,
        recipe=recipe,
        recipe_yaml=_public_recipe(recipe).to_yaml(),
        report=report,
        train=report["train"],
        device=report["device"],
        sources=sources,
        rows=report["data"]["train"],
        heldout=report["data"]["heldout"],
        metrics=[{**row, "interval": _interval(report, row["key"])}
                 for row in figures.metric_rows(report)],
        verdicts={"unclear": "no clear difference", "unknown": ""},
        probes=(report["eval"] or {}).get("probes"),
        pairs=summary.sample_pairs(report)[:_SAMPLES],
        sample_limit=_MAX_SAMPLE,
        commands="\n".join(_commands(export)),
        limits=list(_limits(recipe, report, sources)),
        duration=duration,
    )  # fmt: skip
    return text.rstrip() + "\n"


def inline(value: Any) -> str:
    """Return a text for a line or a table's cell: without line breaks, markup or HTML."""
    text = " ".join(str(value).split())
    text = text if len(text) <= _MAX_NAME else f"{text[:_MAX_NAME]}…"
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return _MARKUP.sub(r"\\\g<0>", text)


def fenced(text: str | None, language: str = "text") -> str:
    """Return a text as a block of code, whose fence is longer than any row of backticks in it."""
    text = (text or "").rstrip()
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def base_on_hub(model: str) -> str | None:
    """Return the Hub's id of a recipe's base model, or None: it is a file or folder."""
    if model == "embedded":
        return embedded.HUB_ID
    return model if hub.REPO_ID.fullmatch(model) else None


def public_base(model: str) -> str:
    """Return the base model's name without the folders of this machine."""
    return base_on_hub(model) or public_name(model)


def public_name(name: str) -> str:
    """Return the last part of a path; another name unchanged."""
    return Path(name).name if name.startswith(("/", "~", ".")) else name


def _public_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe with the names of files only."""
    public = recipe.model_copy(deep=True)
    public.rename_paths(public_name)
    public.output_dir = "runs"
    return public


def _metadata(
    run: Run,
    recipe: Recipe,
    report: dict[str, Any],
    sources: list[dict[str, Any]],
    licence: str | None,
    export: dict[str, Any] | None,
) -> str:
    """Return the YAML block without its lines of dashes; what isn't known is left out."""
    from huggingface_hub import EvalResult, ModelCardData

    kind = export["kind"] if export else "adapter"
    relation = "adapter" if kind in ("adapter", "lora") else "finetune"
    if export and kind == "gguf" and export["name"] != "gguf-f16":
        relation = "quantized"
    base = base_on_hub(recipe.model)
    after = (report["eval"] or {}).get("after", {})
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="heldout",
            dataset_name="held-out rows",
            metric_type=key,
            metric_value=round(after[key], 4),
        )
        for key in _METRICS
        if math.isfinite(after.get(key, math.nan))
    ]
    card = ModelCardData(
        base_model=base,
        base_model_relation=relation if base else None,
        language=_languages(report) or None,
        license=_hub_licence(licence),
        library_name={"merged": "transformers"}.get(kind, "gguf" if export else "peft"),
        pipeline_tag="text-generation",
        tags=["jetson-ft", "lora" if recipe.quantize == "none" else "qlora", "sft",
              *(["gguf"] if kind in ("gguf", "lora") else [])],
        datasets=[source["on_hub"] for source in sources if source["on_hub"]] or None,
        model_name=printable(run.name) if results else None,
        eval_results=results or None,
    )  # fmt: skip
    return card.to_yaml()


def _hub_licence(licence: str | None) -> str | None:
    """Return the Hub's identifier of a licence: `Apache-2.0` is `apache-2.0` there."""
    return licence.lower().replace(" ", "") if licence else None


def _base_licence(model: str, run: Run) -> str | None:
    """Return the base's licence as its own card gives it, else the catalogue; None: unknown."""
    with suppress(UserError, OSError, ValueError, TypeError, AttributeError, yaml.YAMLError):
        from huggingface_hub.repocard import metadata_load

        folder = Path(read_json(run.adapter / BASE_FILE)["folder"])
        own = (metadata_load(folder / FILE) or {}).get("license")
        if isinstance(own, str) and re.fullmatch(r"[\w. -]{1,60}", own):
            return own
    return MODELS[model].licence if model in MODELS else None


def _sources(report: dict[str, Any], data: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each training source's name, counts, hash and licence, as far as known."""
    read = {item["name"]: item["read"] for item in data.get("read", {}).get("sources", [])}
    sources = []
    for source in report["data"].get("sources", []):  # not in older runs
        name = source["name"]
        repo = "/".join(name.split("/")[:2])
        is_hub_id = hub.REPO_ID.fullmatch(repo) is not None
        sources.append(
            {
                **source,
                "name": public_name(name),
                "sha256": read.get(name, {}).get("sha256"),
                "licence": _BUNDLED_LICENCE if name in BUNDLED else None,
                "on_hub": repo if is_hub_id else None,
                "is_bundled": name in BUNDLED,
            }
        )
    return sources


def _languages(report: dict[str, Any]) -> list[str]:
    """Return `zh` and `en` where the sampled held-out rows are written in them."""
    pairs = summary.sample_pairs(report)
    texts = [pair["reference"] for pair in pairs]
    texts += [message["content"] for pair in pairs for message in pair["messages"]]
    text = "\n".join(texts)
    is_chinese = chinese_share(text) > 0.1 and not _KANA_OR_HANGUL.search(text)
    words = re.findall(r"[A-Za-z]+", text)
    is_english = len(words) > 10 and len(_ENGLISH.findall(text)) > len(words) / 20
    return [tag for tag, is_it in (("zh", is_chinese), ("en", is_english)) if is_it]


def _interval(report: dict[str, Any], key: str) -> tuple[float, float] | None:
    """Return the interval of a metric's difference, where the report has one."""
    difference = (report["eval"] or {}).get("differences", {}).get(key)
    return (difference["low"], difference["high"]) if difference else None


def _commands(export: dict[str, Any] | None) -> Iterator[str]:
    """Yield the commands that made the files."""
    yield "jetson-ft train recipe.yaml  # the recipe above"
    if export:
        kind, options = export["kind"], ""
        if kind == "gguf":
            options = f" --quantize {export['name'].removeprefix('gguf-')}"
        elif kind == "merged":
            options = f" --dtype {export['merge']['dtype']}"
        yield f"jetson-ft export RUN --format {kind}{options}"


def _limits(recipe: Recipe, report: dict[str, Any], sources: list[dict[str, Any]]) -> Iterator[str]:
    """Yield what a user of the model should know, as markdown."""
    train, rows, evaluated = report["train"], report["data"]["train"], report["eval"]
    yield "Safety, bias and facts were not evaluated."
    if any(source["is_bundled"] for source in sources):
        yield ("It was trained on rows that a language model drafted and a second pass corrected: "
               "they teach it to answer in Chinese, and no facts.")  # fmt: skip
    if evaluated is None:
        yield "It was not compared with its base: there are no figures."
    else:
        if evaluated["rows"] < _MIN_HELDOUT:
            yield f"The figures rest on {evaluated['rows']:,} held-out rows only."
        worse = [row["name"] for row in figures.metric_rows(report) if row["verdict"] == "worse"]
        if worse:
            yield f"Worse than the base in: {inline(', '.join(worse))}."
        probes = evaluated.get("probes")
        if probes and probes["lost"]:
            lost, gained, difference = probes["lost"], probes["gained"], probes["difference"]
            noise = "" if difference and difference["clear"] else ", no clear difference"
            yield (f"Of {probes['count']:,} short questions on general knowledge and instructions "
                   f"it lost {len(lost):,} that the base answers, and gained {len(gained):,}"
                   f"{noise}.")  # fmt: skip
        stop_rate, limit = evaluated["after"]["stop_rate"], recipe.eval.max_new_tokens
        if stop_rate < 1:
            yield (f"{1 - stop_rate:.0%} of its replies to held-out rows did not end within "
                   f"{limit:,} tokens.")  # fmt: skip
    if rows.get("truncated"):
        share = rows["truncated"] / max(1, rows["rows"])
        yield f"{share:.1%} of the training rows were cut at {recipe.data.max_length:,} tokens."
    if left_out := sum(rows.get("dropped", {}).values()):
        yield f"{left_out:,} rows of its data were left out."
    passes = train.get("rows", 0) / max(1, rows["rows"])
    if passes < 1:
        yield f"It saw {passes:.0%} of the training rows."
    if recipe.model == "embedded":
        yield ("It was trained beside weights of 4 bits (Q4_1); beside the base's own weights its "
               "answers can differ.")  # fmt: skip
    if recipe.quantize != "none":
        yield (f"It was trained beside a base in {inline(recipe.quantize)}; beside the base in "
               "full precision its answers can differ.")  # fmt: skip
    for warning in report["warnings"]:
        text = str(Message.from_json(warning["text"]))
        yield inline(_PATH.sub("", text))
