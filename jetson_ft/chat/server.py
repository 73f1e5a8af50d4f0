"""The process of a page's chat: `python -m jetson_ft.chat.server RUNS_ROOT`.

Each line of standard input is a JSON object: `{"action": "load", "name": …}`,
`{"action": "generate", …}` with the fields of `client.ChatRequest`, `{"action": "view", …}` with
the arguments of `inside.views.compute_view`, or `{"action": "stop"}`. Each line of standard output
is one with a `kind`: `ready`, `delta` (`text`), `end` (`tokens`, `seconds`, `stopped`), `view`
(`result`), `error` or `unloaded` (both as `UserError.as_json`).

The process exits when its input ends (the page has exited), when no request has come for
`IDLE_SECONDS`, and when a run starts that may need its memory.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import queue
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jetson_ft.chat import memory_guard
from jetson_ft.errors import Message, UserError, _
from jetson_ft.inference.generate import Sampling
from jetson_ft.runs.processes import explain_error, silence_libraries

if TYPE_CHECKING:
    from jetson_ft.chat.session import ChatSession
    from jetson_ft.chat.target import ChatTarget

logger = logging.getLogger(__name__)

IDLE_SECONDS = 600.0
_WATCH_SECONDS = 1.0
_output = sys.stdout


class ChatServer:
    """One model in memory, one reply at a time."""

    def __init__(self, runs_root: Path) -> None:
        self.root = runs_root
        self.chat: ChatSession | None = None
        self._target: ChatTarget | None = None
        self._requests: queue.Queue[dict[str, Any]] = queue.Queue()
        self._stop = threading.Event()
        self._idle_since = time.monotonic()  # infinite while a request is handled

    def run(self) -> None:
        """Handle requests until the process exits."""
        # Before heavy imports: from the start a reply can be stopped and the process can exit.
        threading.Thread(target=self._read_input, daemon=True).start()
        threading.Thread(target=self._watch, daemon=True).start()
        while True:
            request = self._requests.get()
            self._idle_since = math.inf
            try:
                match request.pop("action"):
                    case "load":
                        self.load(request["name"])
                    case "view":
                        self._view(**request)
                    case _:
                        self._generate(**request)
            except Exception as error:
                fix = _("Send the message again; if it fails again, report it.")
                send("error", **explain_error(error, Message(fix)).as_json())
            self._idle_since = time.monotonic()

    def _read_input(self) -> None:
        for line in sys.stdin:
            request = json.loads(line)
            if request["action"] == "stop":
                self._stop.set()
            else:
                self._requests.put(request)
        os._exit(0)

    def _watch(self) -> None:
        while True:
            time.sleep(_WATCH_SECONDS)
            try:
                if time.monotonic() - self._idle_since > IDLE_SECONDS:
                    idle = _("The model was unloaded because it was not used for a while.")
                    exit_process(idle, _("Send the message again."))
                if self.chat and memory_guard.is_memory_short():
                    busy = _("The model was unloaded: a run has started that may need its memory.")
                    exit_process(busy, _("Send the message again when it is over."))
            except Exception:  # the next round may succeed, as where a run was being deleted
                logger.exception("the chat's memory can't be watched")

    def load(self, name: str) -> None:
        """Load the model that `target.resolve_target` returns, unless it is loaded already."""
        from jetson_ft.chat import target

        resolved = target.resolve_target(name, self.root)
        if resolved != self._target:
            if self.chat:  # free its memory first, so that the next model can have it
                import torch

                self.chat = self._target = None
                gc.collect()
                torch.cuda.empty_cache()
            self.chat, self._target = target.open_session(resolved), resolved
        send("ready")

    def _generate(
        self, text: str, turns: Any, sampling: Any, system: str, examples: Any, use_adapter: bool
    ) -> None:
        assert self.chat
        self._stop.clear()
        chat = self.chat
        chat.system, chat.examples, chat.turns = system, examples, turns
        started, reply = time.monotonic(), ""
        for delta in chat.reply(text, Sampling(**sampling), use_adapter, self._stop.is_set):
            reply += delta
            send("delta", text=delta)
        tokens = len(chat.tokenizer(reply, add_special_tokens=False)["input_ids"])
        seconds = time.monotonic() - started
        send("end", tokens=tokens, seconds=seconds, stopped=self._stop.is_set())

    def _view(self, view: str, options: dict[str, Any]) -> None:
        from jetson_ft.inside.views import compute_view

        assert self.chat
        send("view", result=compute_view(self.chat, view, options))


def send(kind: str, **fields: Any) -> None:
    """Write one line to the client."""
    line = json.dumps({"kind": kind, **fields}, ensure_ascii=False, default=str)
    _output.write(f"{line}\n")  # in one call, as two threads send
    _output.flush()


def exit_process(what: str, fix: str) -> None:
    """Report why the model is unloaded, and exit at once, from any thread."""
    send("unloaded", **UserError(what, fix=fix).as_json())
    os._exit(0)


if __name__ == "__main__":
    # Libraries may print to standard output: send that to standard error, and keep the protocol's
    # lines apart.
    _output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    silence_libraries()
    ChatServer(Path(sys.argv[1])).run()
