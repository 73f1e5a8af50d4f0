"""The Train tab: a form of a recipe's fields, previews, and Start."""

from __future__ import annotations

import os
import re
import tempfile
import threading
import uuid
from collections.abc import Callable, Sequence
from html import escape
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from jetson_ft import recipe as recipes
from jetson_ft.data.readers import SUFFIXES
from jetson_ft.errors import RecipeError, UserError, _
from jetson_ft.files import quoted
from jetson_ft.recipe import Recipe, SourceRecipe, strict_yaml
from jetson_ft.runs import manager, queue, store
from jetson_ft.webui import uploads
from jetson_ft.webui.allowed_paths import EVERY_PATH, AllowedPaths
from jetson_ft.webui.cli_json import run_cli_json
from jetson_ft.webui.gradio_import import gr
from jetson_ft.webui.render import Locale, error_html, render

ESSENTIAL = (
    "model", "quantize", "data.train", "train.max_minutes", "train.epochs", "lora.rank",
    "train.learning_rate",
)  # fmt: skip
# Without `output_dir`: the page's own folder of runs is used.
_FIELDS = {
    key: field for key, field in recipes.fields().items() if key not in ("version", "output_dir")
}
_ORDER = [*ESSENTIAL, *(key for key in _FIELDS if key not in ESSENTIAL)]
_UNCHANGED = [gr.skip()] * len(_ORDER)
_MISTAKES = _("Fix the marked fields.")


def build(t: Locale, runs: Path, page: Any, tabs: Any, allowed: AllowedPaths) -> None:
    """Add the tab's components."""
    form = Form(t, runs, allowed)
    initial = "quickstart-zh"
    values = _form_values(recipes.load_recipe(initial))
    with gr.Row(elem_classes="sources"):
        with gr.Column(min_width=280):
            name = gr.Dropdown(
                list(recipes.shipped()), value=initial, label=t(_("Start from")),
                info=t(_("A bundled recipe; every field below can be changed.")),
            )  # fmt: skip
            own_recipe = gr.UploadButton(
                t(_("Upload a recipe file …")), file_types=[".yaml", ".yml"], size="sm"
            )
        upload = gr.File(
            label=t(_("Your data")), type="filepath", elem_id="upload", height=130,
            min_width=280, file_types=list(SUFFIXES),
        )  # fmt: skip
    with gr.Row(elem_classes="fields"):
        fields = {key: _component(key, values[key], t) for key in ESSENTIAL}
    with gr.Accordion(t(_("All settings")), open=False), gr.Row(elem_classes="fields"):
        fields |= {key: _component(key, values[key], t) for key in _ORDER[len(ESSENTIAL) :]}
    with gr.Row():
        inspect = gr.Button(t(_("Look at the data")))
        plan = gr.Button(t(_("What will happen?")))
        start = gr.Button(t(_("Start")), variant="primary")
    outcome = gr.HTML()
    with gr.Accordion(t(_("The same as a command and as a recipe")), open=False) as export:
        command = gr.Code(language="shell", interactive=False, label=t(_("Command")))
        yaml = gr.Code(language="yaml", interactive=False, label=t(_("Recipe")))
    # In the request, unlike a `gr.State`: the same request sent twice has the same ticket.
    ticket = gr.Textbox(visible="hidden")
    started = gr.Textbox(visible="hidden")
    inputs = [*fields.values()]
    outputs = [outcome, *inputs]
    name.input(form.load, name, outputs)
    own_recipe.upload(form.load, own_recipe, outputs)
    upload.upload(form.store_upload, upload, fields["data.train"])
    inspect.click(form.inspect, inputs, outputs, concurrency_limit=2)
    plan.click(form.plan, inputs, outputs, concurrency_limit=2)
    export.expand(form.export, [name, *inputs], [command, yaml])
    page.load(lambda: uuid.uuid4().hex, None, ticket)
    page.load(form.open_address, None, [outcome, tabs, *inputs])
    start.click(form.start, [ticket, name, *inputs], [outcome, started, ticket, *inputs]).then(
        lambda name: gr.Tabs(selected="runs") if name else gr.Tabs(), started, tabs
    ).then(None, started, js="name => { if (name) window.jetsonFt.choose(name) }")


class Form:
    """What the form's buttons do."""

    _start_lock = threading.Lock()  # of both languages' forms

    def __init__(self, t: Locale, runs: Path, allowed: AllowedPaths = EVERY_PATH) -> None:
        self.t, self.runs, self.allowed = t, runs, allowed

    def load(self, source: str) -> list[Any]:
        """Return an error's HTML, and updates of all fields for a shipped recipe or a file."""
        try:
            return ["", *self._updates(recipes.load_recipe(source))]
        except UserError as error:
            return [error_html(error, self.t), *_UNCHANGED]

    def open_address(self, request: gr.Request) -> list[Any]:
        """Handle the query of the page's address.

        `?copy=RUN` loads that run's settings into the form, `?run=RUN` opens the Runs tab.
        """
        query = request.query_params
        if name := query.get("copy"):
            tabs = gr.Tabs(selected="train")
            try:
                run = store.run_by_name(name, self.runs)
                text = self.t(_("The form has the settings of {run}."), run=run.title())
                return [f"<p>{escape(text)}</p>", tabs, *self._updates(run.recipe())]
            except UserError as error:
                return [error_html(error, self.t), tabs, *_UNCHANGED]
        return [gr.skip(), gr.Tabs(selected="runs") if query.get("run") else gr.skip(), *_UNCHANGED]

    def store_upload(self, path: str) -> str:
        """Move an uploaded file to the folder of runs, for later resumes; return its path."""
        try:
            return str(uploads.store(self.runs, Path(path)))
        except UserError as error:
            raise gr.Error(escape(self.t(error))) from error  # shown as HTML

    def plan(self, *values: Any) -> list[Any]:
        """Return the dry run's HTML, and updates of all fields."""

        def html(recipe: Recipe) -> str:
            with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
                file.write(recipe.to_yaml())
                file.flush()
                result = run_cli_json("train", "--dry-run", "--json", file.name)
            return render("plan.jinja", self.t, **result)

        return self._outcome(values, html)

    def inspect(self, *values: Any) -> list[Any]:
        """Return the HTML of the data's inspection, and updates of all fields."""

        def html(recipe: Recipe) -> str:
            data = recipe.data
            result = run_cli_json(
                "data", "inspect", "--json", f"--model={recipe.model}",
                f"--max-length={data.max_length}", f"--format={data.format}",
                f"--encoding={data.encoding}",
                *(f"--column={part}={name}" for part, name in data.columns.chosen().items()),
                *([f"--chat-template={data.chat_template}"] if data.chat_template else []),
                "--", *(_inspected(item) for item in data.sources()),
            )  # fmt: skip
            return render("inspection.jinja", self.t, **result)

        return self._outcome(values, html)

    def start(self, ticket: str, name: str, *values: Any) -> list[Any]:
        """Start one run for each ticket, however often, and to whichever server, it is sent.

        Returns the outcome's HTML, the run's name (empty: none), the next ticket, and updates of
        all fields.
        """
        run = ""

        def html(recipe: Recipe) -> str:
            nonlocal run
            with self._start_lock:
                started = store.run_of_ticket(ticket, self.runs) if ticket else None
                started = started or manager.launch(recipe, name, ticket=ticket)
            run, state = started.name, started.state().state
            queued = state == "queued" and queue.running_run() is not None
            text = _("{run} is queued: another run is training.") if queued else _("Started: {run}")
            return f"<p>{escape(self.t(text, run=run))}</p>"

        outcome, *updates = self._outcome(values, html)
        return [outcome, run, uuid.uuid4().hex if run else ticket, *updates]

    def export(self, name: str, *values: Any) -> tuple[str, str]:
        """Return the form as a command and as a recipe in YAML."""
        try:
            recipe = self._recipe(values)
        except UserError:
            return (self.t(_MISTAKES),) * 2
        return command_of(recipe, name), recipe.to_yaml()

    def _outcome(self, values: Sequence[Any], html: Callable[[Recipe], str]) -> list[Any]:
        """Return the HTML for the form's recipe or for its error, and updates of all fields.

        Each field shows its help, or its mistake.
        """
        mistakes: dict[str, str] = {}
        try:
            outcome = html(self.allowed.require_recipe(self._recipe(values)))
        except RecipeError as error:
            outcome = error_html(_MISTAKES, self.t)
            mistakes = {
                problem.key.partition("[")[0]: self.t(problem.message) for problem in error.problems
            }
        except UserError as error:
            outcome = error_html(error, self.t)
        return [outcome, *(gr.update(**_info(key, self.t, mistakes.get(key))) for key in _ORDER)]

    def _recipe(self, values: Sequence[Any]) -> Recipe:
        texts = {key: _text(value) for key, value in zip(_ORDER, values, strict=True)}
        texts["data.train"] = _as_list(texts["data.train"])
        sets = [f"{key}={text}" for key, text in texts.items()]
        sets.append(f"output_dir={self.runs.absolute()}")
        return recipes.parse_recipe("version: 1\n", "", sets)

    def _updates(self, recipe: Recipe) -> list[Any]:
        values = _form_values(recipe)
        return [gr.update(value=values[key], **_info(key, self.t)) for key in _ORDER]


def command_of(recipe: Recipe, name: str) -> str:
    """Return the command that trains this recipe, based on a shipped one."""
    sets: list[str] = []
    # Twice, as some defaults follow from what the first round sets (alpha from the rank).
    for _round in range(2):
        changes = recipe.diff(recipes.load_recipe(name, sets))
        sets += [f"{key}={_text(value)}" for key, (value, _default) in changes.items()]
    if Path(recipe.output_dir) == Path("runs").absolute():
        sets.remove(f"output_dir={recipe.output_dir}")  # the command's default
    options = [f"--set {quoted(text)}" for text in sets]
    name = f"./{name}" if name.startswith("-") else name  # else an option
    return " \\\n  ".join([f"jetson-ft train {quoted(name)}", *options])


def _form_values(recipe: Recipe) -> dict[str, Any]:
    """Return the values of the form's components by key."""
    values = {}
    for key, field in _FIELDS.items():
        value = attrgetter(key)(recipe)
        plain = isinstance(value, bool) or get_origin(field.annotation) is Literal
        values[key] = value if plain else _text(value)
    return values


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        plain = [item if isinstance(item, str) else item.model_dump() for item in value]
        return strict_yaml.dump_flow(plain)
    return strict_yaml.dump_yaml({"x": value}).partition(":")[2].strip()


def _as_list(text: str) -> str:
    """Return names that are separated by commas or line breaks as a YAML list, other text as is."""
    names = [name.strip() for name in re.split("[,，\n]", text) if name.strip()]
    if len(names) < 2 or text.lstrip().startswith("["):
        return text
    path = os.path.expanduser(text)  # noqa: PTH111 - no error for an unknown user
    if os.path.lexists(path):  # no error for what can't be a path, such as a long list
        return text
    return strict_yaml.dump_flow(names)


def _inspected(item: SourceRecipe) -> str:
    """Return a source as `data inspect` takes it: a name, or a mapping as YAML."""
    keys = item.model_dump()
    return item.source if len(keys) == 1 else strict_yaml.dump_flow(keys)


def _component(key: str, value: Any, t: Locale) -> Any:
    """Return the component for a field's type; a text box where several types are possible."""
    annotation = _FIELDS[key].annotation
    options = {
        "value": value, "label": key, "min_width": 220, "elem_id": f"field-{key.replace('.', '-')}",
        **_info(key, t),
    }  # fmt: skip
    if annotation is bool:
        return gr.Checkbox(**options)
    if get_origin(annotation) is Literal:
        return gr.Dropdown([*get_args(annotation)], **options)
    return gr.Textbox(**options)


def _info(key: str, t: Locale, mistake: str | None = None) -> dict[str, Any]:
    """Return the options of a component that show the key's help, or the mistake."""
    if mistake:
        return {"info": f"⚠ {mistake}", "elem_classes": ["mistake"]}
    return {"info": t(_FIELDS[key].description), "elem_classes": []}
