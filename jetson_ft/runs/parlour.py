"""A chat whose model lives in a process of its own, started when somebody talks."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jetson_ft.errors import UserError
from jetson_ft.runs.supervisor import WORKER_ENVIRONMENT

Turns = list[dict[str, str]]

_LEFT = {
    "idle": "The model was unloaded, as nobody talked for a while.",
    "training": "The model was unloaded: a run has started that may need its memory.",
}


@dataclass(frozen=True)
class Question:
    """What the model is asked, and how it is to answer."""

    text: str
    turns: Turns
    sampling: dict[str, Any]  # as `inference.generate.Sampling`
    system: str = ""
    examples: Sequence[dict[str, str]] = ()
    adapter: bool = True


@dataclass(frozen=True)
class Answer:
    """An answer as far as it is written; the last one has the figures."""

    text: str
    tokens: int | None = None
    seconds: float | None = None
    stopped: bool = False


class Parlour:
    """One model for all visitors; whoever comes while it answers another is told so."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._process: subprocess.Popen[str] | None = None
        self._talking = threading.Lock()
        self._visitor = ""  # whose question is being answered
        self._opening = self._stopped = False
        self._numbers = itertools.count(1)

    def answer(self, name: str, question: Question, visitor: str = "") -> Iterator[Answer]:
        """Writes the answer of a run's adapter, an adapter folder, or `base`.

        Raises:
            UserError: another is being answered, or the model can't be loaded or had to leave.
        """
        if not self._talking.acquire(blocking=False):
            raise UserError("Busy: the model is answering somebody else.", fix="Try again soon.")
        self._visitor = visitor
        try:
            self._open(name)
            yield from self._converse(question)
        finally:
            self._talking.release()

    def stop(self, visitor: str = "") -> None:
        """Ends the answer that is being written, if it is this visitor's, or the loading for it.

        What was fetched until then is kept.
        """
        if visitor != self._visitor or not self._process or self._process.poll() is not None:
            return
        if self._opening:
            self._stopped = True
            self._process.kill()
        else:
            self._send({"do": "stop"})

    def close(self) -> None:
        """Unloads the model."""
        if self._process:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _open(self, name: str) -> None:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "jetson_ft.runs.chat_worker", str(self.root)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8",
                env={**WORKER_ENVIRONMENT, **os.environ},
            )  # fmt: skip
        self._opening, self._stopped = True, False
        try:
            self._send({"do": "open", "name": name})
            self._next("ready")
        finally:
            self._opening = False

    def _converse(self, question: Question) -> Iterator[Answer]:
        number = next(self._numbers)
        self._send({"do": "say", "id": number, **asdict(question)})
        written, done = "", False
        try:
            while not done:
                told = self._next("piece", "end")
                done = told["kind"] == "end"
                written += told.get("text", "")
                yield Answer(
                    written, told.get("tokens"), told.get("seconds"), told.get("stopped", False)
                )
        except GeneratorExit:  # the visitor left: the rest is no part of the next answer
            if not done:
                self.stop(self._visitor)
                self._skip_to_end(number)
            raise

    def _skip_to_end(self, number: int) -> None:
        try:
            told = self._next("piece", "end")
            while (told["kind"], told["id"]) != ("end", number):
                told = self._next("piece", "end")
        except UserError:
            pass

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process and self._process.stdin
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it said at its end is read next

    def _next(self, *kinds: str) -> dict[str, Any]:
        """The worker's next word, which must be one of those."""
        assert self._process and self._process.stdout
        for line in self._process.stdout:
            told: dict[str, Any] = json.loads(line)
            if told["kind"] in kinds:
                return told
            if told["kind"] == "error":
                raise UserError(told["what"], told["where"], told["fix"])
            if told["kind"] == "left":
                self.close()
                raise UserError(_LEFT[told["why"]], fix="Send the message again when it is over.")
        self.close()
        if self._stopped:
            raise UserError("Stopped before the model was loaded.")
        raise UserError("The chat's process ended; it may have run out of memory.")
