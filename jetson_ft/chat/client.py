"""A chat whose model is loaded in a separate process (`chat.server`), started on first use."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jetson_ft.child_process import python_module
from jetson_ft.data.formats import ChatMessage
from jetson_ft.errors import UserError, _
from jetson_ft.inference.generate import Sampling
from jetson_ft.runs.processes import WORKER_ENVIRONMENT

ChatTurns = list[dict[str, str]]


@dataclass(frozen=True)
class ChatRequest:
    """A message for the model, its conversation so far, and how to generate the reply."""

    text: str
    turns: ChatTurns
    sampling: Sampling
    system: str = ""
    examples: Sequence[ChatMessage] = ()
    use_adapter: bool = True
    prefill: str = ""  # the beginning of the reply, which is continued


@dataclass(frozen=True)
class ChatReply:
    """The whole text of a reply so far; only the last one has `tokens` and `seconds`.

    `ended` is False of a reply that is cut off, by `stop` or by the most tokens.
    """

    text: str
    tokens: int | None = None
    seconds: float | None = None
    stopped: bool = False
    ended: bool = False


class ChatClient:
    """One model for all clients of a page; it computes one reply or view at a time.

    Args:
        loading: returns a context that is held while a model is loaded; entering it can raise a
            `UserError`.
    """

    def __init__(
        self, runs_root: Path, loading: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self.root = runs_root
        self._load_limit = loading
        self._loaded = ""  # the name of what the process has loaded
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()  # held while a reply or a view is computed
        self._client_id = ""  # of that reply or view
        self._loading = self._stopped = False

    def generate(self, name: str, request: ChatRequest, client_id: str = "") -> Iterator[ChatReply]:
        """Yield the reply as it grows; load the model first if it isn't loaded.

        Args:
            name: as in `target.resolve_target`.
            client_id: `stop` with the same one ends the reply.

        Raises:
            UserError: another reply is being generated, or the model can't be loaded.
        """
        with self._process_with(name, client_id):
            self._send({"action": "generate", **asdict(request)})
            text, kind = request.prefill, ""
            try:
                while kind != "end":
                    message = self._read("delta", "end")
                    kind = message.pop("kind")
                    text += message.pop("text", "")
                    yield ChatReply(text, **message)
            except GeneratorExit:  # reading the next "ready" skips the rest of the reply
                self.stop(client_id)
                raise

    def view(
        self, name: str, view: str, options: dict[str, Any], client_id: str = ""
    ) -> dict[str, Any]:
        """Return what `inside.views.compute_view` returns; load the model first if it isn't loaded.

        Args:
            name: as in `target.resolve_target`.
            client_id: `stop` with the same one ends the loading.

        Raises:
            UserError: a reply is being generated, the model can't be loaded, or the options don't
                fit the view.
        """
        with self._process_with(name, client_id):
            self._send({"action": "view", "view": view, "options": options})
            result: dict[str, Any] = self._read("view")["result"]
            return result

    def training_pairs(self, name: str) -> list[tuple[str, str]]:
        """Return questions with answers from the data of a run; see `training_rows`."""
        with self._process_with(None):
            self._send({"action": "examples", "name": name})
            return [(pair[0], pair[1]) for pair in self._read("examples")["pairs"]]

    @contextmanager
    def _process_with(self, name: str | None, client_id: str = "") -> Iterator[None]:
        """Hold the process within the context, with this model loaded (None: whatever it has)."""
        if not self._lock.acquire(blocking=False):
            busy = _("Busy: the model is working for another client.")
            raise UserError(busy, fix=_("Try again soon."))
        self._client_id = client_id
        try:
            is_ready = self._lives() and name in (None, self._loaded)
            with nullcontext() if is_ready else self._load_limit():
                if name is None:
                    self._start()
                else:
                    self._load(name)
            yield
        finally:
            self._lock.release()

    def stop(self, client_id: str = "") -> None:
        """End the reply that is being generated for this client, or the loading for it.

        Files that were downloaded until then stay.
        """
        if client_id != self._client_id or not self._process or not self._lives():
            return
        if self._loading:
            self._stopped = True
            self._process.kill()
        else:
            self._send({"action": "stop"})

    def close(self) -> None:
        """End the process, which unloads the model."""
        if self._process:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _lives(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _start(self) -> None:
        """Start the process, unless it lives."""
        if not self._lives():
            self.close()
            self._process = subprocess.Popen(
                python_module("jetson_ft.chat.server", str(self.root)),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8",
                env={**WORKER_ENVIRONMENT, **os.environ},
            )  # fmt: skip

    def _load(self, name: str) -> None:
        self._start()
        self._loading, self._stopped = True, False
        try:
            self._send({"action": "load", "name": name})
            self._loaded = ""
            self._read("ready")
            self._loaded = name
        finally:
            self._loading = False

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process and self._process.stdin
        with suppress(BrokenPipeError):  # the process has exited; its last messages are read next
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def _read(self, *kinds: str) -> dict[str, Any]:
        """Return the server's next message of these kinds; raise the error that it reports."""
        assert self._process and self._process.stdout
        for line in self._process.stdout:
            message: dict[str, Any] = json.loads(line)
            if message["kind"] in kinds:
                return message
            if message["kind"] == "unloaded":
                self.close()
            if message["kind"] in ("error", "unloaded"):
                raise UserError.from_json(message)
        self.close()
        if self._stopped:
            raise UserError(_("Stopped before the model was loaded."))
        raise UserError(_("The chat's process ended; it may have run out of memory."))
