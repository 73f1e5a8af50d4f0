"""The form: a recipe's fields, what would happen, and Start."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import gradio as gr

from jetson_ft import recipe as recipes
from jetson_ft import strict_yaml
from jetson_ft.errors import RecipeError, UserError
from jetson_ft.paths import disk_errors
from jetson_ft.recipe import Recipe
from jetson_ft.runs import jobs
from jetson_ft.webui.words import Words

ESSENTIAL = (
    "model", "quantize", "data.train", "train.max_minutes", "train.epochs", "lora.rank",
    "train.learning_rate",
)  # fmt: skip
# Decided by where the page runs, and not in it.
_LEFT_OUT = ("version", "output")
_FIELDS = {key: field for key, field in recipes.fields() if key not in _LEFT_OUT}
_ORDER = [*ESSENTIAL, *(key for key in _FIELDS if key not in ESSENTIAL)]


def build(words: Words, runs: Path, tabs: Any) -> None:
    """Puts the form into the page."""
    form = _Form(words, runs)
    start_with = "quickstart-zh"
    shown = _values(recipes.load(start_with))
    name = gr.Dropdown(
        list(recipes.shipped()), value=start_with, label=words("train.recipe"),
        info=words("train.recipe.help"),
    )  # fmt: skip
    upload = gr.File(
        label=words("train.upload"), type="filepath", height=110,
        file_types=[".json", ".jsonl", ".csv", ".parquet"],
    )  # fmt: skip
    fields = {}
    with gr.Row(elem_classes="fields"):
        for key in ESSENTIAL:
            fields[key] = _component(key, shown[key], words)
    with gr.Accordion(words("train.more"), open=False), gr.Row(elem_classes="fields"):
        for key in _ORDER[len(ESSENTIAL) :]:
            fields[key] = _component(key, shown[key], words)
    with gr.Row():
        check = gr.Button(words("train.check"))
        start = gr.Button(words("train.start"), variant="primary")
    outcome = gr.HTML()
    with gr.Accordion(words("train.yaml"), open=False):
        yaml = gr.Code(language="yaml", interactive=False)
    ticket = gr.State(lambda: uuid.uuid4().hex)
    started = gr.Textbox(visible="hidden")
    inputs = [name, *fields.values()]
    name.input(form.fill, name, [*fields.values()])
    upload.upload(form.take_rows, upload, fields["data.train"])
    check.click(form.check, inputs, [outcome, yaml, *fields.values()], concurrency_limit=2)
    start.click(form.start, [ticket, *inputs], [outcome, started, ticket, *fields.values()]).then(
        lambda name: gr.Tabs(selected="runs") if name else gr.Tabs(), started, tabs
    ).then(None, started, js="name => { if (name) window.jetsonFt.choose(name) }")


class _Form:
    """What the form's buttons do; holds nothing but the tickets of forms that were sent."""

    def __init__(self, words: Words, runs: Path) -> None:
        self.words, self.runs = words, runs
        self._sent: dict[str, str] = {}
        self._lock = threading.Lock()

    def fill(self, name: str) -> list[Any]:
        """A shipped recipe's values."""
        shown = _values(recipes.load(name))
        return [gr.update(value=shown[key], **_help(key, self.words)) for key in _ORDER]

    def take_rows(self, path: str) -> str:
        """Keeps an uploaded file beside the runs, where a resumed run finds it again."""
        source = Path(path)
        folder = self.runs.absolute() / "uploads" / uuid.uuid4().hex[:8]
        try:
            with disk_errors(folder):
                folder.mkdir(parents=True)
                shutil.move(source, folder / source.name)
        except UserError as error:
            raise gr.Error(self.words.error_text(error)) from error
        return str(folder / source.name)

    def check(self, name: str, *values: Any) -> list[Any]:
        """What would happen, found out by the command that says so in a terminal."""
        recipe, marks = self._recipe(values)
        if recipe is None:
            return [self._complaint(self.words("train.mistakes")), None, *marks]
        return [self._plan(recipe), recipe.to_yaml(), *marks]

    def start(self, ticket: str, name: str, *values: Any) -> list[Any]:
        """One run for each ticket, however often the form is sent."""
        recipe, marks = self._recipe(values)
        if recipe is None:
            return [self._complaint(self.words("train.mistakes")), "", ticket, *marks]
        with self._lock:
            try:
                if ticket not in self._sent:
                    self._sent[ticket] = jobs.launch(recipe, name).name
            except UserError as error:
                return [self._complaint(self.words.error_text(error)), "", ticket, *marks]
            run = self._sent[ticket]
        told = escape(self.words("train.started", name=run))
        return [f"<p>{told}</p>", run, uuid.uuid4().hex, *marks]

    def _recipe(self, values: Sequence[Any]) -> tuple[Recipe | None, list[Any]]:
        """The recipe, and what to change at each field: its help, or what is wrong with it."""
        sets = [f"{key}={_text(value)}" for key, value in zip(_ORDER, values, strict=True)]
        wrong: dict[str, str] = {}
        recipe = None
        try:
            recipe = recipes.parse("version: 1\n", "", [*sets, f"output={self.runs.absolute()}"])
        except RecipeError as error:
            wrong = {problem.key: self.words.said(problem.message) for problem in error.problems}
        marks = [
            gr.update(info=f"⚠ {wrong[key]}", elem_classes=["mistake"])
            if key in wrong
            else gr.update(**_help(key, self.words))
            for key in _ORDER
        ]
        return recipe, marks

    def _plan(self, recipe: Recipe) -> str:
        """The dry run's figures, from a process of its own: this one loads no torch."""
        command = [sys.executable, "-m", "jetson_ft.cli", "train", "--dry-run", "--json"]
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
            file.write(recipe.to_yaml())
            file.flush()
            done = subprocess.run([*command, file.name], capture_output=True, text=True)
        if done.returncode:
            return self._complaint(self.words.error_text(_failure(done)))
        return plan_html(json.loads(done.stdout), self.words)

    @staticmethod
    def _complaint(text: str) -> str:
        return f'<div class="complaint" role="alert">{escape(text)}</div>'


def _failure(done: subprocess.CompletedProcess[str]) -> UserError:
    """What a dry run couldn't do; its last words where it came to no more."""
    try:
        return UserError(**json.loads(done.stdout)["error"])
    except (ValueError, LookupError, TypeError):
        return UserError(done.stderr.strip())


def plan_html(found: dict[str, Any], words: Words) -> str:
    """A dry run in words, and its memory as a bar against what is free."""
    device, rows = found["forecast"], found["rows"]
    plan = device["plan"]
    lines = [
        words("plan.rows", rows=f"{rows['train']['rows']:,}", heldout=rows["heldout"]["rows"]),
        words("plan.tokens", tokens=f"{found['tokens']:,}", steps=f"{found['steps']:,}"),
    ]
    if plan:
        lines.append(words("plan.time", time=words.duration(plan["seconds"])))
    elif device["would_fit"]:
        settings = "; ".join(f"{one['settings']}" for one in device["would_fit"])
        lines.append(words("plan.would", settings=settings))
    peak = plan["peak_memory_bytes"] if plan else device["least_memory_bytes"]
    share = peak / device["memory_bytes"]
    verdict = "fits" if plan and share < 0.85 else "tight" if plan else "no"
    memory = words(
        "plan.memory", peak=f"{peak / 2**30:.2f}", free=f"{device['memory_bytes'] / 2**30:.1f}"
    )
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return (
        f'<ul class="plan">{items}</ul><div class="bar large memory {verdict}">'
        f'<i style="width: {min(100, 100 * share):.1f}%"></i></div>'
        f'<p class="small">{escape(memory)} · <b>{words("plan." + verdict)}</b></p>'
    )


def _values(recipe: Recipe) -> dict[str, Any]:
    """What the form shows of a recipe."""
    found = {}
    for key, field in _FIELDS.items():
        value: Any = recipe
        for part in key.split("."):
            value = getattr(value, part)
        plain = isinstance(value, bool) or get_origin(field.annotation) is Literal
        found[key] = value if plain else _text(value)
    return found


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return f"[{', '.join(value)}]"
    return strict_yaml.dump({"x": value}).partition(":")[2].strip()


def _component(key: str, value: Any, words: Words) -> Any:
    """The input that suits a field's type; text where anything may be written."""
    annotation = _FIELDS[key].annotation
    common = {"value": value, "label": key, "min_width": 220, **_help(key, words)}
    if annotation is bool:
        return gr.Checkbox(**common)
    if get_origin(annotation) is Literal:
        return gr.Dropdown([*get_args(annotation)], **common)
    return gr.Textbox(**common)


def _help(key: str, words: Words) -> dict[str, Any]:
    return {"info": words.help(key), "elem_classes": []}
