"""Train tab, decision 3: the rows. What is chosen is in the hidden field `data.train` alone.

The switch, the list of sources and the upload box are drawn from its value; what a person does with
them changes that value.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

from jetson_ft import recipe as recipes
from jetson_ft.data.lengths import KNOWN_LENGTHS
from jetson_ft.data.readers import SUFFIXES
from jetson_ft.data.sources import BUNDLED
from jetson_ft.errors import RecipeError, UserError, _
from jetson_ft.files import expand_user
from jetson_ft.recipe import SourceRecipe
from jetson_ft.runs.preview import missing_downloads
from jetson_ft.webui import uploads
from jetson_ft.webui.gradio_import import gr
from jetson_ft.webui.previews import PREVIEWS, ReplacedError
from jetson_ft.webui.render import Locale, error_html, render
from jetson_ft.webui.tabs.train_errors import complaint
from jetson_ft.webui.tabs.train_form import DATA, FIRST, HTML, Form, as_list, text_of

# What people call the bundled sets.
NAMES = {
    "bundled-short": _("Chinese, short answers"),
    "bundled": _("Chinese, long answers"),
}


def build(t: Locale, runs: Path, form: Form, fields: dict[str, Any]) -> None:
    """Add the widgets that choose the rows, and `fields["data.train"]`."""
    data = Data(t, runs, form)
    value = text_of(DATA, recipes.load_recipe(FIRST).data.train)
    kind, bundled, chips = data.draw(value)
    fields[DATA] = gr.Textbox(value, visible="hidden", elem_id="field-data-train")
    switch = gr.Radio(
        [(t(text), name) for name, text in _KINDS.items()], value=kind, show_label=False,
        label=t(_("Where the rows come from")), elem_id="data-kind", elem_classes="segmented",
    )  # fmt: skip
    with gr.Column(visible=kind == "bundled") as bundled_part:
        sets = gr.Radio(
            [(data.title(name), name) for name in NAMES], value=bundled, show_label=False,
            label=t(_("Bundled rows")), elem_id="data-bundled",
        )  # fmt: skip
    with gr.Column(visible=kind == "files") as files_part:
        upload = gr.File(
            label=t(_("Your files")), type="filepath", file_count="multiple", elem_id="upload",
            height=130, file_types=list(SUFFIXES),
        )  # fmt: skip
    with gr.Column(visible=kind == "name") as name_part, gr.Row():
        source = gr.Textbox(
            label=t(_("Hub data set or file on this machine")), elem_id="data-name", scale=4,
            placeholder="owner/name, /home/me/rows.jsonl", max_lines=1,
        )  # fmt: skip
        add = gr.Button(t(_("Add")), scale=1, min_width=96, elem_id="data-add")
    listed = HTML(chips, elem_id="data-sources")
    look = gr.Button(t(_("Look at the rows")), size="sm", elem_id="data-look")
    rows = HTML(elem_id="data-rows")
    sent = gr.Textbox(visible="hidden")  # its value comes from static/train_side.js
    action = gr.Button(visible="hidden", elem_id="data-action")
    parts = [bundled_part, files_part, name_part]

    value, js = fields[DATA], "(...values) => window.jetsonFt.withSent(...values)"
    quiet: dict[str, Any] = {"show_progress": "hidden"}
    value.change(data.redraw, value, [switch, sets, listed, *parts], **quiet)
    switch.input(data.show_part, switch, parts, **quiet)
    # Multiple: Gradio ignores clicks while one is under way; static/train_side.js waits itself.
    acted = action.click(data.act, [sent, value], value, js=js, trigger_mode="multiple", **quiet)
    acted.then(None, js="() => window.jetsonFt.sourcesChanged()", **quiet)
    chosen = (
        sets.input(lambda name: name, sets, value, **quiet),
        upload.upload(data.add_files, [upload, value], [value, upload]),
        gr.on([add.click, source.submit], data.add_name, [source, value], [value, source], **quiet),
        acted,
    )
    inputs, shown = [*fields.values()], [rows, listed]
    # A newer reading ends the older one.
    reading: dict[str, Any] = {**quiet, "concurrency_limit": 8, "trigger_mode": "multiple"}
    for event in chosen:
        event.then(data.show_rows, inputs, shown, **reading)
    look.click(data.fetch_rows, inputs, shown, **reading)


_KINDS = {"bundled": _("Bundled"), "files": _("My files"), "name": _("Hub or path")}


class Data:
    """What the widgets do."""

    def __init__(self, t: Locale, runs: Path, form: Form) -> None:
        self.t, self.runs, self.form = t, runs, form

    def title(self, name: str) -> str:
        """Return what people call a bundled set, with its number of rows."""
        rows = self.t(_("{count:,} rows"), count=KNOWN_LENGTHS[name, "embedded"].rows)
        return f"{self.t(NAMES[name])} · {rows}"

    # --- what is shown -------------------------------------------------------------------------

    def draw(self, text: str) -> tuple[str, str | None, str]:
        """Return the kind of the last source, the bundled set among them, and the list's HTML."""
        try:
            items = sources_of(text)
        except UserError as error:
            return "name", None, error_html(error, self.t)
        last = items[-1].source
        kind = "bundled" if last in BUNDLED else "files" if self._is_upload(last) else "name"
        bundled = items[0].source if len(items) == 1 and items[0].source in BUNDLED else None
        return kind, bundled, self._list(items)

    def redraw(self, text: str) -> list[Any]:
        """Return updates of the switch, the bundled sets, the list and the three parts."""
        kind, bundled, chips = self.draw(text)
        return [kind, bundled, chips, *self.show_part(kind)]

    def show_part(self, kind: str) -> list[Any]:
        """Return updates of the parts: that of the kind is visible."""
        return [gr.update(visible=kind == name) for name in _KINDS]

    def _list(self, items: Sequence[SourceRecipe]) -> str:
        chips = []
        for item in items:
            name, read = item.source, PREVIEWS.sources.get(item.source)
            notes = []
            if name in NAMES:
                title = self.t(NAMES[name])
                notes.append(
                    self.t(_("{count:,} rows"), count=KNOWN_LENGTHS[name, "embedded"].rows)
                )
            else:
                title = Path(name).name if self._is_upload(name) else name
                if read:
                    notes += [self.t(_("{count:,} rows"), count=read["rows_kept"]), read["layout"]]
            chips.append({
                "title": title, "notes": notes, "name": name, "rows": item.rows,
                "percent": None if item.share is None else round(100 * item.share, 3),
                "is_own": name not in NAMES,
            })  # fmt: skip
        return render("sources.jinja", self.t, chips=chips)

    def _is_upload(self, name: str) -> bool:
        with suppress(UserError):
            return (self.runs.absolute() / "uploads") in expand_user(name).parents
        return False

    # --- what changes the sources --------------------------------------------------------------

    def add_files(self, paths: Sequence[str], text: str) -> list[Any]:
        """Move uploaded files to the folder of runs, for later resumes, and add them."""
        try:
            stored = [str(uploads.store(self.runs, Path(path))) for path in paths]
        except UserError as error:
            raise gr.Error(escape(self.t(error))) from error  # shown as HTML
        return [self._added(text, stored), None]

    def add_name(self, name: str, text: str) -> list[Any]:
        """Add a data set or a file by its name."""
        return [self._added(text, [name.strip()]), ""] if name.strip() else [gr.skip(), gr.skip()]

    def _added(self, text: str, names: Sequence[str]) -> str:
        """Return the sources with more of them, which take the place of bundled rows alone."""
        try:
            items = sources_of(text)
        except UserError:
            items = []
        own = items if any(item.source not in BUNDLED for item in items) else []
        present = {item.source for item in own}
        return as_text([*own, *(SourceRecipe(source=n) for n in names if n not in present)])

    def act(self, action: str, text: str) -> Any:
        """Remove a source, or set the share of its rows, as the list asks for in JSON."""
        try:
            items, asked = sources_of(text), json.loads(action)
            number = [item.source for item in items].index(asked["source"])
            if asked["do"] == "remove":
                del items[number]
                return as_text(items) if items else recipes.load_recipe(FIRST).data.train
            share = min(100.0, max(0.001, float(asked["percent"] or 100))) / 100
            share_or_all = share if share < 1 else None
            items[number] = SourceRecipe(source=asked["source"], share=share_or_all)
        except (UserError, ValueError, LookupError, TypeError):  # made by hand, or too old
            return gr.skip()
        return as_text(items)

    # --- the rows themselves -------------------------------------------------------------------

    def show_rows(self, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        """Yield what is going on, then the rows' HTML and the list with what was read.

        Nothing is downloaded. Nothing more is shown once the page has asked again.
        """
        yield from self._show_newest(request, values, download=False)

    def fetch_rows(self, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        """Do the same; download data sets and a tokenizer that are not here."""
        yield from self._show_newest(request, values, download=True)

    def _show_newest(
        self, request: gr.Request, values: Sequence[Any], download: bool
    ) -> Iterator[list[Any]]:
        page = f"{request.session_hash}-rows"
        turn = PREVIEWS.next_turn(page)
        for shown in self._show_rows(page, values, download):
            if not PREVIEWS.is_newest(page, turn):
                yield [gr.skip(), gr.skip()]  # Gradio would empty both after no yield at all
                return
            yield shown

    def _show_rows(self, page: str, values: Sequence[Any], download: bool) -> Iterator[list[Any]]:
        try:
            recipe = self.form.recipe(values)
            missing = missing_downloads(recipe, for_facts=True)
            if missing and not download:
                yield [render("rows.jinja", self.t, missing=missing), gr.skip()]
                return
            yield [render("rows.jinja", self.t, names=missing), gr.skip()]
            facts = PREVIEWS.facts(recipe, page, with_rows=True, download=download)
            html = render(
                "rows.jinja", self.t, report=facts.inspection, on_invalid=recipe.data.on_invalid
            )
            yield [html, self._list(recipe.data.sources())]
        except ReplacedError:
            return
        except RecipeError:
            yield ["", gr.skip()]  # the form marks the fields
        except UserError as error:
            yield [complaint(error, self.t, self.runs), gr.skip()]


def sources_of(text: str) -> list[SourceRecipe]:
    """Return the sources that a value of `data.train` names.

    Raises:
        RecipeError: it is no source and no list of them.
    """
    return recipes.parse_recipe("", overrides=[f"data.train={as_list(text)}"]).data.sources()


def as_text(items: Sequence[SourceRecipe]) -> str:
    """Return the value of `data.train` for these sources; of one without a limit its name."""
    names = [item.source if len(item.model_dump()) == 1 else item for item in items]
    if len(names) == 1 and isinstance(names[0], str):
        with suppress(RecipeError):  # a name that YAML reads as something else, such as a number
            if sources_of(names[0]) == items:
                return names[0]
    return text_of(DATA, names)
