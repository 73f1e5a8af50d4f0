"""The form: a recipe's fields, what would happen, and Start."""

from __future__ import annotations

import shlex
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from jetson_ft import recipe as recipes
from jetson_ft import strict_yaml
from jetson_ft.errors import RecipeError, UserError
from jetson_ft.paths import disk_errors
from jetson_ft.recipe import Recipe
from jetson_ft.runs import jobs, live, rundir, slot
from jetson_ft.webui.commands import ask
from jetson_ft.webui.library import gr
from jetson_ft.webui.outlook import inspection_html, plan_html
from jetson_ft.webui.words import Words

ESSENTIAL = (
    "model", "quantize", "data.train", "train.max_minutes", "train.epochs", "lora.rank",
    "train.learning_rate",
)  # fmt: skip
# Decided by where the page runs, and not in it.
_LEFT_OUT = ("version", "output")
_FIELDS = {key: field for key, field in recipes.fields() if key not in _LEFT_OUT}
_ORDER = [*ESSENTIAL, *(key for key in _FIELDS if key not in ESSENTIAL)]


def build(words: Words, runs: Path, page: Any, tabs: Any) -> None:
    """Puts the form into the page."""
    form = _Form(words, runs)
    start_with = "quickstart-zh"
    shown = _values(recipes.load(start_with))
    with gr.Row(elem_classes="sources"):
        with gr.Column(min_width=280):
            name = gr.Dropdown(
                list(recipes.shipped()), value=start_with, label=words("train.recipe"),
                info=words("train.recipe.help"),
            )  # fmt: skip
            own_recipe = gr.UploadButton(
                words("train.recipe.upload"), file_types=[".yaml", ".yml"], size="sm"
            )
        upload = gr.File(
            label=words("train.upload"), type="filepath", elem_id="upload", height=130,
            min_width=280, file_types=[".json", ".jsonl", ".csv", ".parquet"],
        )  # fmt: skip
    fields = {}
    with gr.Row(elem_classes="fields"):
        for key in ESSENTIAL:
            fields[key] = _component(key, shown[key], words)
    with gr.Accordion(words("train.more"), open=False), gr.Row(elem_classes="fields"):
        for key in _ORDER[len(ESSENTIAL) :]:
            fields[key] = _component(key, shown[key], words)
    with gr.Row():
        look = gr.Button(words("train.look"))
        check = gr.Button(words("train.check"))
        start = gr.Button(words("train.start"), variant="primary")
    outcome = gr.HTML()
    with gr.Accordion(words("train.same"), open=False) as same:
        command = gr.Code(language="shell", interactive=False, label=words("train.command"))
        yaml = gr.Code(language="yaml", interactive=False, label=words("train.yaml"))
    ticket = gr.State(lambda: uuid.uuid4().hex)
    started = gr.Textbox(visible="hidden")
    inputs = [name, *fields.values()]
    name.input(form.fill, name, [*fields.values()])
    own_recipe.upload(form.take_recipe, own_recipe, [outcome, *fields.values()])
    upload.upload(form.take_rows, upload, fields["data.train"])
    look.click(form.look, inputs, [outcome, *fields.values()], concurrency_limit=2)
    check.click(form.check, inputs, [outcome, *fields.values()], concurrency_limit=2)
    same.expand(form.same, inputs, [command, yaml])
    page.load(form.arrive, None, [outcome, tabs, *fields.values()])
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
        return self._filled(recipes.load(name))

    def _filled(self, recipe: Recipe) -> list[Any]:
        shown = _values(recipe)
        return [gr.update(value=shown[key], **_help(key, self.words)) for key in _ORDER]

    def take_recipe(self, path: str) -> list[Any]:
        """Fills the form from a recipe file, or says what is wrong with it."""
        try:
            return ["", *self._filled(recipes.load(Path(path)))]
        except UserError as error:
            return [self._complaint(self.words.error_text(error)), *([gr.skip()] * len(_ORDER))]

    def arrive(self, request: gr.Request) -> list[Any]:
        """Where the address leads: `?copy=RUN` into the form, `?run=RUN` to the runs."""
        name = request.query_params.get("copy")
        stay: list[Any] = [gr.skip()] * len(_ORDER)
        if not name:
            asked = "runs" if request.query_params.get("run") else None
            return [gr.skip(), gr.Tabs(selected=asked) if asked else gr.skip(), *stay]
        try:
            run = rundir.named(name, self.runs)
            told = self.words("train.copied", name=live.title(run))
            return [
                f"<p>{escape(told)}</p>",
                gr.Tabs(selected="train"),
                *self._filled(run.recipe()),
            ]
        except UserError as error:
            return [self._complaint(self.words.error_text(error)), gr.Tabs(selected="train"), *stay]

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
        return self._shown(values, self._plan)

    def look(self, name: str, *values: Any) -> list[Any]:
        """What is in the rows, and how the model would read them."""
        return self._shown(values, self._inspection)

    def _shown(self, values: Sequence[Any], make: Callable[[Recipe], str]) -> list[Any]:
        recipe, marks = self._recipe(values)
        if recipe is None:
            return [self._complaint(self.words("train.mistakes")), *marks]
        return [make(recipe), *marks]

    def same(self, name: str, *values: Any) -> tuple[str, str]:
        """The form as a command and as a recipe."""
        recipe, _ = self._recipe(values)
        if recipe is None:
            return (self.words("train.mistakes"),) * 2
        return command_of(recipe, name), recipe.to_yaml()

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
        state = rundir.named(run, self.runs).state().state
        queued = state == "queued" and slot.holder() is not None
        told = escape(self.words("train.queued" if queued else "train.started", name=run))
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
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
            file.write(recipe.to_yaml())
            file.flush()
            return self._asked(plan_html, "train", "--dry-run", "--json", file.name)

    def _inspection(self, recipe: Recipe) -> str:
        data = recipe.data
        return self._asked(
            inspection_html, "data", "inspect", data.train, "--json", "--model", recipe.model,
            "--max-length", str(data.max_length), "--format", data.format,
            "--encoding", data.encoding,
        )  # fmt: skip

    def _asked(self, show: Callable[[dict[str, Any], Words], str], *arguments: str) -> str:
        try:
            return show(ask(*arguments), self.words)
        except UserError as error:
            return self._complaint(self.words.error_text(error))

    @staticmethod
    def _complaint(text: str) -> str:
        return f'<div class="complaint" role="alert">{escape(text)}</div>'


def command_of(recipe: Recipe, name: str) -> str:
    """The command that trains the same, beginning with a shipped recipe."""
    sets: list[str] = []
    # Once more, as some defaults follow from what the first round sets (alpha from the rank).
    for _ in range(2):
        changes = recipe.diff(recipes.load(name, sets))
        sets += [f"{key}={_text(mine)}" for key, (mine, _) in changes.items()]
    if Path(recipe.output) == Path("runs").absolute():
        sets.remove(f"output={recipe.output}")  # where the command would write anyway
    return " \\\n  ".join(
        [f"jetson-ft train {name}", *(f"--set {shlex.quote(text)}" for text in sets)]
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
    common = {
        "value": value, "label": key, "min_width": 220, "elem_id": f"field-{key.replace('.', '-')}",
        **_help(key, words),
    }  # fmt: skip
    if annotation is bool:
        return gr.Checkbox(**common)
    if get_origin(annotation) is Literal:
        return gr.Dropdown([*get_args(annotation)], **common)
    return gr.Textbox(**common)


def _help(key: str, words: Words) -> dict[str, Any]:
    return {"info": words.help(key), "elem_classes": []}
