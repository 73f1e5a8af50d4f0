"""The facts of recipes and of this machine for the page, from child processes; results are kept.

A page has one such process at a time: a newer question ends the one of an older question.
"""

from __future__ import annotations

import subprocess
import threading
from collections import OrderedDict
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from jetson_ft.errors import UserError
from jetson_ft.files import expand_user
from jetson_ft.recipe import Recipe
from jetson_ft.runs import preview
from jetson_ft.runs.preview import Machine, RecipeFacts
from jetson_ft.webui.cli_json import run_json

_MODULE = "jetson_ft.runs.preview"
_MAX_KEPT, _MAX_SOURCES = 8, 100  # facts of recipes; what was read of a source
_MAX_PAGES = 64  # whose questions are counted


class ReplacedError(UserError):
    """The page has asked for something else since."""


@dataclass
class _Question:
    key: str
    answer: Future[RecipeFacts] = field(default_factory=Future)
    process: subprocess.Popen[str] | None = None
    is_replaced: bool = False

    def start(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        if self.is_replaced:
            process.kill()

    def replace(self) -> None:
        self.is_replaced = True
        if self.process:
            self.process.kill()


class Previews:
    """Facts of recipes and of this machine."""

    def __init__(self) -> None:
        self._lock, self._machine_lock = threading.Lock(), threading.Lock()
        self._kept: OrderedDict[str, RecipeFacts] = OrderedDict()
        self._open: dict[str, _Question] = {}
        self._newest: OrderedDict[str, str] = OrderedDict()  # key, by page
        self._turns: OrderedDict[str, int] = OrderedDict()
        self.sources: dict[str, dict[str, Any]] = {}  # what was read last, by source
        self._machine: Machine | None = None

    def kept(self, recipe: Recipe, with_rows: bool = False) -> RecipeFacts | None:
        """Return what is known of a recipe without a process."""
        with self._lock:
            facts = self._kept.get(_key(recipe))
        return facts or (None if with_rows else preview.known_facts(recipe))

    def facts(
        self, recipe: Recipe, page: str, with_rows: bool = False, download: bool = False
    ) -> RecipeFacts:
        """Return the facts of a recipe; read its rows in a process where they are not known.

        Args:
            page: names the open page.
            with_rows: the facts of rows that were read; else built-in ones are enough.
            download: what is not on this machine; else without a request to the Hub.

        Raises:
            ReplacedError: the page asked for another recipe meanwhile.
            UserError: as `preview.read_facts`.
        """
        key = _key(recipe) + ("download" if download else "")
        with self._lock:
            _set_newest(self._newest, page, key)
        while True:
            facts = self.kept(recipe, with_rows)
            if facts and not (download and facts.is_estimate):
                return facts
            question, is_new = self._join(key, page)
            if is_new:
                self._answer(question, recipe, page, download)
                return question.answer.result()
            with suppress(ReplacedError):  # by another page: ask again
                return question.answer.result()

    def _join(self, key: str, page: str) -> tuple[_Question, bool]:
        """Return the open question for the key, and whether it is a new one of this page.

        Raises:
            ReplacedError: the page has asked for another key since.
        """
        with self._lock:
            if self._newest.get(page, key) != key:
                raise ReplacedError("Replaced.")
            own = self._open.get(page)
            if own and own.key != key:
                own.replace()
            for question in self._open.values():
                if question.key == key and not question.is_replaced:
                    return question, False
            self._open[page] = _Question(key)
            return self._open[page], True

    def next_turn(self, page: str) -> int:
        """Return the number of a page's question; `is_newest` compares it later."""
        with self._lock:
            turn = self._turns.get(page, 0) + 1
            _set_newest(self._turns, page, turn)
            return turn

    def is_newest(self, page: str, turn: int) -> bool:
        """Return whether the page has asked nothing since."""
        return self._turns.get(page, turn) == turn

    def machine(self) -> Machine:
        """Return this machine; it is measured once, in a process."""
        with self._machine_lock:
            if self._machine is None:
                self._machine = preview.remembered_machine()
            if self._machine is None:
                result = run_json(_MODULE, "machine")
                self._machine = TypeAdapter(Machine).validate_python(result)
            return self._machine

    def _answer(self, question: _Question, recipe: Recipe, page: str, download: bool) -> None:
        settings = {} if download else {"HF_HUB_OFFLINE": "1"}
        key = _key(recipe)
        try:
            result = run_json(
                _MODULE, text=recipe.to_yaml(), started=question.start, environment=settings
            )
            facts = TypeAdapter(RecipeFacts).validate_python(result)
            with self._lock:
                self._kept[key] = facts
                parts = facts.inspection["sources"] if facts.inspection else []
                newest = {part["name"]: part["read"] for part in parts}
                self.sources = dict([*self.sources.items()][-_MAX_SOURCES:]) | newest
                if len(self._kept) > _MAX_KEPT:
                    self._kept.popitem(last=False)
            question.answer.set_result(facts)
        except BaseException as error:  # of any kind: others wait for the answer
            question.answer.set_exception(
                ReplacedError("Replaced.") if question.is_replaced else error
            )
        finally:
            with self._lock:
                if self._open.get(page) is question:
                    del self._open[page]


def _set_newest(values: OrderedDict[str, Any], page: str, value: Any) -> None:
    """Set a page's value; of too many pages, forget the one that was set first."""
    values[page] = value
    values.move_to_end(page)
    if len(values) > _MAX_PAGES:
        values.popitem(last=False)


def _key(recipe: Recipe) -> str:
    """Return what the facts depend on: model, data, and the state of local files."""
    states: list[Any] = []
    for item in recipe.data.sources():
        with suppress(OSError, UserError):  # the reading reports what can't be read
            status = expand_user(item.source).stat()
            states.append((status.st_mtime_ns, status.st_size))
    data = recipe.data.model_dump(exclude={"on_invalid", "heldout"})
    return repr((recipe.model, data, states))


PREVIEWS = Previews()  # of both languages' pages
