"""The models of the Chat tab: their names for people, questions to begin with, what is allowed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson

from jetson_ft import hub
from jetson_ft.chat import target
from jetson_ft.data.sources import BUNDLED
from jetson_ft.errors import UserError, _
from jetson_ft.files import expand_user, printable
from jetson_ft.models import embedded, files
from jetson_ft.runs import exports, store
from jetson_ft.runs.store import Run
from jetson_ft.webui import after_training, run_texts
from jetson_ft.webui.allowed_paths import EVERY_PATH, AllowedPaths
from jetson_ft.webui.render import Locale

BASE = "base"
OWN_BASE = "own-base"  # the base of the model that it is compared with, in the same format
NONE = ""  # no comparison
_STARTERS, _STARTER_CHARACTERS = 3, 200
_BASE_TITLE = _("{model} (base)")
_WHOLE_MODELS = ("merged", "gguf")  # kinds of exports


class ChatModels:
    """The models of a page, in its language."""

    def __init__(self, t: Locale, runs: Path, allowed: AllowedPaths = EVERY_PATH) -> None:
        self.t, self.runs, self.allowed = t, runs, allowed

    def choices(self) -> list[tuple[str, str]]:
        """Return (label, name) of each adapter, each export of a run, and each base on the disk."""
        choices = []
        for run in store.runs_with_adapter(self.runs):
            title = self._run_title(run)
            choices.append((title, run.name))
            choices += [(label, str(path)) for label, path in self._exports(run, title)]
        choices.append((self.title(BASE), BASE))
        return choices + [(self._base_title(name), name) for name in hub.downloaded_models()]

    def compared_choices(
        self, first: str, choices: Sequence[tuple[str, str]]
    ) -> list[tuple[str, str]]:
        """Return (label, name) of those choices that a model can be compared with."""
        choices = [choice for choice in choices if choice[1] != first]
        if not self.is_base(first):
            own = self.title(OWN_BASE, first)  # in the adapter's format, so that one copy is loaded
            choices = [(own, OWN_BASE), *(choice for choice in choices if choice[0] != own)]
        return [(self.t(_("no comparison")), NONE), *choices]

    def title(self, name: str, first: str = "") -> str:
        """Return a model's name for people.

        Args:
            first: the model that it is compared with.
        """
        if name == OWN_BASE:
            try:
                resolved = target.resolve_target(self.require(first), self.runs)
            except UserError:
                return self.t(_("Its base model"))
            model = resolved.recipe.model
            is_path = not (model == "embedded" or files.is_hub_id(model))
            return self._base_title(Path(model).name) if is_path else self.title(model)
        if name in (BASE, "embedded"):
            return self._base_title(embedded.NAME)
        if run := self._run(name):
            title = self._run_title(run)
            labels = {str(path): label for label, path in self._exports(run, title)}
            return labels.get(str(expand_user(name))) or title
        if files.is_hub_id(name):
            return self._base_title(name)
        return printable(expand_user(name).name) if "/" in name else printable(name)

    def starters(self, name: str) -> list[str]:
        """Return questions to begin with: held-out rows of the run, else bundled ones."""
        questions: Iterable[str] = ()
        if run := self._run(name):
            with suppress(UserError, KeyError, TypeError):
                samples = run.report()["eval"]["after"]["samples"]
                lists = (sample["messages"] for sample in samples)
                questions = [each[0]["content"] for each in lists if _is_question(each)]
        picked = list(itertools.islice(filter(_is_short, questions), _STARTERS))
        return picked or list(itertools.islice(_bundled_questions(), _STARTERS))

    def newest(self) -> str:
        """Return the newest run with an adapter, else the embedded model."""
        return next((run.name for run in store.runs_with_adapter(self.runs)), BASE)

    def require(self, name: str) -> str:
        """Return the name unchanged; raise `UserError` for a path that may not be named."""
        if self.allowed.folders is None or name in ("latest", BASE):
            return name
        if name not in [run.name for run in store.list_runs(self.runs)]:
            resolved = target.resolve_target(self.allowed.require(name), self.runs)
            if resolved.named_in:  # the folder of an adapter, whose files may be uploads
                self.allowed.require(resolved.recipe.model)
        return name

    def require_data(self, name: str) -> str:
        """Return the name unchanged; raise `UserError` if its run's data may not be named."""
        if run := self._run(self.require(name)):
            self.allowed.require_recipe(run.recipe())
        return name

    def are_alternating(self, first: str, second: str) -> bool:
        """Return whether two models don't fit into the chat's process at once: two bases."""
        if second in (NONE, OWN_BASE, first):
            return False
        with suppress(UserError):
            pair = [
                target.resolve_target(self.require(name), self.runs) for name in (first, second)
            ]
            return not target.shares_base(*pair)
        return False

    def is_base(self, name: str) -> bool:
        """Return whether a name means a model without an adapter."""
        with suppress(UserError):
            return files.is_base_model(self.require(name))
        return False

    def _base_title(self, model: str) -> str:
        return self.t(_BASE_TITLE, model=model)

    def _run_title(self, run: Run) -> str:
        """Return a run's title as the list of runs has it, and when the run was started.

        Of another day it is the date with the time: runs of one day have the same label.
        """
        (title,) = store.short_titles([run])
        created = 0.0
        with suppress(UserError):
            created = run.state().created
        if not created:
            return printable(title)
        when = run_texts.started(created, self.t)
        clock = f"{datetime.fromtimestamp(created):%H:%M}"
        return f"{printable(title)} · {when if when == clock else f'{when} {clock}'}"

    def _run(self, name: str) -> Run | None:
        """Return the run of a name, or of an export's file or folder."""
        if name in (BASE, NONE):
            return None
        with suppress(UserError, OSError, ValueError):
            if name not in [run.name for run in store.list_runs(self.runs)]:
                path = expand_user(self.require(name))
                return exports.exported_run(path) or exports.exported_run(path.parent)
            return store.run_by_name(name, self.runs)
        return None

    def _exports(self, run: Run, title: str) -> list[tuple[str, Path]]:
        """Return the label and the path of each export of a run that is a whole model."""
        models: list[tuple[str, Path]] = []
        with suppress(OSError):
            for export in exports.list_exports(run):
                if export["kind"] in _WHOLE_MODELS:
                    folder = Path(export["path"])
                    path = next(iter(sorted(folder.glob("*.gguf"))), folder)
                    kind = printable(self.t(after_training.describe_name(export)))
                    models.append((f"{title} · {kind}", path))
        return models


def _is_question(messages: list[dict[str, Any]]) -> bool:
    return [message["role"] for message in messages] == ["user"]


def _is_short(question: str) -> bool:
    return 0 < len(question) <= _STARTER_CHARACTERS


def _bundled_questions() -> Iterable[str]:
    """Yield the questions of bundled held-out rows."""
    with open(BUNDLED["bundled-short"].heldout, "rb") as file:
        for line in file:
            if _is_question((row := orjson.loads(line))["messages"][:-1]):
                yield row["messages"][0]["content"]
