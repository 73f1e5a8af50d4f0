"""Train tab, the right column: what the run will need, the command that starts it, and Start.

The plan is worked out by itself after each change (static/train_side.js waits for the last of them)
unless a run is training: then memory is in use, and a button asks for it.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from typing import Any

from jetson_ft import recipe as recipes
from jetson_ft.errors import UserError, _
from jetson_ft.recipe import Recipe
from jetson_ft.runs import manager, preview, queue, store
from jetson_ft.runs.recipe_fits import TIGHT
from jetson_ft.webui.gradio_import import gr
from jetson_ft.webui.limits import BusyError
from jetson_ft.webui.previews import PREVIEWS, ReplacedError
from jetson_ft.webui.render import Locale, render
from jetson_ft.webui.tabs.train_errors import complaint, is_settings, remedy_title
from jetson_ft.webui.tabs.train_form import HTML, Form, command_of, is_at_field

# The parts of the predicted memory, as people call them; those of the program itself are one.
PARTS = {
    "weights": _("Model"),
    "adapter": _("Adapter and optimizer"),
    "activations": _("Activations"),
    "transient": _("Temporary"),
    "process": _("Program"),
}


def build(t: Locale, form: Form, name: Any, fields: dict[str, Any], tabs: Any) -> None:
    """Add the column's components."""
    summary = Summary(t, form)
    plan = HTML(render("plan.jinja", t), elem_id="plan")
    outcome = HTML(elem_id="start-outcome")
    start = gr.Button(t(_("Start")), variant="primary", elem_id="start")
    initial = recipes.load_recipe(name.value)
    initial.output_dir = str(form.runs.absolute())
    command = HTML(summary.command_html(initial, name.value))
    # In the request, unlike a `gr.State`: the same request sent twice has the same ticket.
    ticket = gr.Textbox(lambda: uuid.uuid4().hex, visible="hidden")
    started = gr.Textbox(visible="hidden")
    by_itself = gr.Button(visible="hidden", elem_id="plan-by-itself")
    by_hand = gr.Button(visible="hidden", elem_id="plan-by-hand")

    inputs = [*fields.values()]
    # The ticket's too: the page has loaded, or a run has started.
    changes = [name.change, ticket.change, *(field.change for field in inputs)]
    quiet: dict[str, Any] = {"show_progress": "hidden"}
    gr.on(changes, None, js="() => window.jetsonFt.planSoon()", **quiet)
    gr.on(
        changes, summary.command, [name, *inputs], command, trigger_mode="always_last",
        concurrency_limit=4, **quiet,
    ).then(None, js="() => window.jetsonFt.commandDrawn()", **quiet)  # fmt: skip
    # What Start has reported is of the fields as they were.
    gr.on([field.change for field in inputs], None, None, outcome, js="() => ''", **quiet)
    for button, function in ((by_itself, summary.plan), (by_hand, summary.plan_now)):
        button.click(
            function, inputs, [plan, form.marks], trigger_mode="multiple",
            concurrency_limit=8, **quiet,
        ).then(None, js="() => window.jetsonFt.planned()")  # fmt: skip
    start.click(
        summary.start, [ticket, name, *inputs], [outcome, started, ticket, form.marks],
        concurrency_limit=4, show_progress="minimal", show_progress_on=outcome,
    ).then(
        lambda name: gr.Tabs(selected="runs") if name else gr.Tabs(), started, tabs, **quiet
    ).then(None, started, js="name => { if (name) window.jetsonFt.choose(name) }")  # fmt: skip


class Summary:
    """What the column's components do."""

    _start_lock = threading.Lock()  # of both languages' forms

    def __init__(self, t: Locale, form: Form) -> None:
        self.t, self.form = t, form

    # --- the plan ------------------------------------------------------------------------------

    def plan(self, request: gr.Request, *values: Any) -> list[Any]:
        """Return the plan's HTML unless a run is training, and the form's mistakes.

        Nothing is downloaded. Skips all where the page has asked again meanwhile.
        """
        return self._plan(request.session_hash or "", values, by_hand=False)

    def plan_now(self, request: gr.Request, *values: Any) -> list[Any]:
        """Do the same while a run is training too, and download what the plan needs."""
        return self._plan(request.session_hash or "", values, by_hand=True)

    def _plan(self, page: str, values: Sequence[Any], by_hand: bool) -> list[Any]:
        turn, skipped = PREVIEWS.next_turn(page), [gr.skip()] * 2
        mistakes = self.form.mistakes(None)
        try:
            html = self._plan_html(self.form.recipe(values), page, by_hand)
        except ReplacedError:
            return skipped
        except UserError as error:
            if is_at_field(error):
                html, mistakes = render("plan.jinja", self.t, wrong=True), self.form.mistakes(error)
            else:
                html = complaint(error, self.t, self.form.runs)
        return [html, *mistakes] if PREVIEWS.is_newest(page, turn) else skipped

    def _plan_html(self, recipe: Recipe, page: str, by_hand: bool) -> str:
        is_training = queue.running_run() is not None
        if is_training and not by_hand:
            return render("plan.jinja", self.t, is_training=True)
        facts = PREVIEWS.kept(recipe)
        missing = preview.missing_downloads(recipe, for_facts=True)
        if facts is None and missing and not by_hand:
            return render("plan.jinja", self.t, missing=missing)
        facts = facts or PREVIEWS.facts(recipe, page, download=by_hand)
        preview.check_rows(recipe, facts)
        plan = preview.plan_recipe(recipe, facts, PREVIEWS.machine())
        return self.plan_html(plan, preview.missing_downloads(recipe), is_training)

    def plan_html(
        self, plan: preview.RecipePlan, missing: Sequence[str] = (), is_training: bool = False
    ) -> str:
        """Return a plan as HTML."""
        result = plan.forecast
        parts: dict[str, int] = {}
        for part, size in (result.plan.parts if result.plan else {}).items():
            key = "process" if part == "context" else part
            parts[key] = parts.get(key, 0) + size
        others = (result.plan.other_seconds or 0) if result.plan else 0
        times = [
            ("load", _("Load"), plan.load_seconds),
            ("train", _("Train"), (result.plan.seconds or 0) if result.plan else 0),
            ("measure", _("Evaluate"), others - plan.load_seconds),
        ]
        return render(
            "plan.jinja", self.t, plan=plan, times=times, missing=missing, is_training=is_training,
            TIGHT=TIGHT,
            parts=[(PARTS.get(key, key), size) for key, size in parts.items() if size],
            remedies=[
                (entry["settings"], remedy_title(entry["settings"], self.t))
                for entry in result.would_fit
                if is_settings(entry["settings"])
            ],
        )  # fmt: skip

    # --- the command ---------------------------------------------------------------------------

    def command(self, name: str, *values: Any) -> str:
        """Return the HTML of the command, and of the recipe in YAML, that the form stands for."""
        try:
            return self.command_html(self.form.recipe(values), name)
        except UserError:
            return render("command.jinja", self.t)

    def command_html(self, recipe: Recipe, name: str) -> str:
        """Return the HTML of the command and of the recipe in YAML."""
        command = command_of(recipe, name)
        return render("command.jinja", self.t, command=command, yaml=recipe.to_yaml())

    # --- start ---------------------------------------------------------------------------------

    def start(self, request: gr.Request, ticket: str, name: str, *values: Any) -> list[Any]:
        """Start one run for each ticket, however often, and to whichever server, it is sent.

        Returns the outcome's HTML, the run's name (empty: none), the next ticket, and the form's
        mistakes.
        """
        mistakes = self.form.mistakes(None, focus=True)
        try:
            recipe = self.form.recipe(values)
            run = store.run_of_ticket(ticket, self.form.runs) if ticket else None
            if run is None:
                self._require_trainable(recipe, f"{request.session_hash}-start")
            with self._start_lock:
                run = store.run_of_ticket(ticket, self.form.runs) if ticket else None
                run = run or manager.launch(recipe, name, ticket=ticket)
        except UserError as error:
            if is_at_field(error):
                return ["", "", ticket, *self.form.mistakes(error, focus=True)]
            return [complaint(error, self.t, self.form.runs), "", ticket, *mistakes]
        queued = run.state().state == "queued" and queue.running_run() is not None
        text = _("{run} is queued: another run is training.") if queued else _("Started: {run}")
        html = f'<p role="status">{escape(self.t(text, run=run.name))}</p>'
        return [html, run.name, uuid.uuid4().hex, *mistakes]

    def _require_trainable(self, recipe: Recipe, page: str) -> None:
        """Raise the `UserError` with which the run would end before its first step.

        What is not on this machine yet is checked by the run. While another run trains, the memory
        that is free says nothing, and no process is started beside it.
        """
        is_training = queue.running_run() is not None
        facts = PREVIEWS.kept(recipe)
        with suppress(BusyError, ReplacedError):
            missing = preview.missing_downloads(recipe, for_facts=True)
            if facts is None and not is_training and not missing:
                facts = PREVIEWS.facts(recipe, page)
            if facts:
                preview.check_rows(recipe, facts)
            if facts and not is_training:
                preview.require_fit(recipe, facts, PREVIEWS.machine())
