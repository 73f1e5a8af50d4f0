"""The process of a page's chat: `python -m jetson_ft.chat.server RUNS_ROOT`.

Each line of standard input is a JSON object: `{"action": "load", "name": …}`,
`{"action": "generate", …}` with the fields of `client.ChatRequest`, `{"action": "view", …}` with
the arguments of `inside.views.compute_view`, `{"action": "examples", "name": …}`, or
`{"action": "stop"}`. Each line of standard output is one with a `kind`: `ready`, `delta` (`text`),
`end` (`tokens`, `seconds`, `ended`, `stopped`), `view` (`result`), `examples` (`pairs`), `error` or
`unloaded` (both as `UserError.as_json`).

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
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jetson_ft.chat import memory_guard
from jetson_ft.errors import Message, UserError, _
from jetson_ft.inference.generate import Sampling
from jetson_ft.runs.processes import explain_error, silence_libraries

if TYPE_CHECKING:
    from jetson_ft.chat.gguf_session import GgufSession
    from jetson_ft.chat.session import ChatSession
    from jetson_ft.chat.target import ChatTarget
    from jetson_ft.inference.generate import Reply

logger = logging.getLogger(__name__)

IDLE_SECONDS = 600.0
_WATCH_SECONDS = 1.0
_MAX_CHATS = 3  # of one base in memory: two adapters that are compared, and the base itself
_output = sys.stdout


class ChatServer:
    """One base in memory, perhaps with several adapters, or one GGUF file; one reply at a time."""

    def __init__(self, runs_root: Path) -> None:
        self.root = runs_root
        self.chat: ChatSession | GgufSession | None = None
        self._chats: list[tuple[ChatTarget, ChatSession | GgufSession]] = []  # of one base
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
                actions: dict[str, Callable[..., None]] = {
                    "load": self.load, "generate": self._generate, "examples": self._examples,
                    "view": self._view,
                }  # fmt: skip
                actions[request.pop("action")](**request)
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
        """Load the model that `target.resolve_target` returns, unless it is loaded already.

        An adapter of the base in memory is loaded beside the adapters of other chats.
        """
        from jetson_ft.chat import target
        from jetson_ft.chat.gguf_session import GgufSession

        resolved = target.with_weight_times(target.resolve_target(name, self.root))
        if isinstance(self.chat, GgufSession) and not self.chat.server.is_alive:
            self._unload()  # the kernel can end llama.cpp for lack of memory
        self.chat = next((chat for known, chat in self._chats if known == resolved), None)
        if self.chat is None:
            if not all(target.shares_base(resolved, known) for known, _chat in self._chats):
                self._unload()
            self.chat = self._open(resolved)
            self._chats.append((resolved, self.chat))
        send("ready")

    def _open(self, resolved: ChatTarget) -> ChatSession | GgufSession:
        from jetson_ft.chat import target
        from jetson_ft.chat.gguf_session import open_gguf

        if file := resolved.gguf_file:
            return open_gguf(file)
        others: list[Any] = [chat for _target, chat in self._chats]
        try:
            chat = target.open_session(resolved, others[0].model if others else None)
        except BaseException:  # it may have changed the base, as an adapter is loaded in place
            self._unload()
            raise
        for other in others:  # a first adapter wraps the base
            other.model = chat.model
        if len(others) == _MAX_CHATS:
            del self._chats[0]
            if others[0].has_adapter:
                if chat.has_adapter:  # PEFT warns where an active adapter is deleted
                    chat.model.set_adapter(chat.adapter_name)
                chat.model.delete_adapter(others[0].adapter_name)
        return chat

    def _unload(self) -> None:
        """Free the memory, so that the next model can have it."""
        from jetson_ft.chat.gguf_session import GgufSession

        is_torch = False
        self.chat = None
        while self._chats:
            chat = self._chats.pop()[1]
            if isinstance(chat, GgufSession):
                chat.close()
            else:
                is_torch = True
            del chat
        if is_torch:
            import torch

            gc.collect()
            torch.cuda.empty_cache()

    def _generate(
        self, text: str, turns: Any, sampling: Any, system: str, examples: Any, use_adapter: bool,
        prefill: str,
    ) -> None:  # fmt: skip
        assert self.chat
        self._stop.clear()
        chat = self.chat
        chat.system, chat.examples, chat.turns = system, examples, turns
        started = time.monotonic()
        settings = Sampling(**sampling)
        stream = chat.reply(text, settings, use_adapter, self._stop.is_set, prefill)
        try:
            while True:
                send("delta", text=next(stream))
        except StopIteration as stop:
            reply: Reply = stop.value
        send(
            "end", tokens=reply.tokens, ended=reply.ended, stopped=self._stop.is_set(),
            seconds=time.monotonic() - started,
        )  # fmt: skip

    def _examples(self, name: str) -> None:
        from jetson_ft.chat.training_rows import training_pairs

        send("examples", pairs=training_pairs(name, self.root))

    def _view(self, view: str, options: dict[str, Any]) -> None:
        from jetson_ft.chat.gguf_session import GgufSession
        from jetson_ft.inside.views import compute_view

        assert self.chat
        if isinstance(self.chat, GgufSession):
            raise UserError(
                _("llama.cpp computes this model, and shows nothing of its inside."),
                fix=_("Choose the base or the run that the file was made of."),
            )
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
