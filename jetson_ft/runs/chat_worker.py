"""The process that a page's chat runs in: `python -m jetson_ft.runs.chat_worker RUNS`.

Reads one JSON object a line: `{"do": "open", "name": …}`, `{"do": "say", "id": …, "text": …, …}`
and `{"do": "stop"}`; writes one a line: `ready`, `piece`, `end`, `error`, `left`. It ends with
whoever started it (its input ends then), when nobody has talked for a while, and when a run
starts that may need its memory.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any

from jetson_ft.runs import beside
from jetson_ft.runs.worker import explain, quieten

IDLE_SECONDS = 600.0
_LOOK_SECONDS = 1.0
_OUT = sys.stdout


class Worker:
    """One model in memory, one reply at a time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.chat: Any = None
        self._partner: Any = None
        self._asked: queue.Queue[dict[str, Any]] = queue.Queue()
        self._stop = threading.Event()
        self._talked_at = time.monotonic()
        self._busy = False

    def run(self) -> None:
        """Serves until it has to leave."""
        # Before anything heavy: an answer must be stoppable, and an orphan must leave.
        threading.Thread(target=self._listen, daemon=True).start()
        threading.Thread(target=self._look_around, daemon=True).start()
        while True:
            request = self._asked.get()
            self._busy = True
            try:
                self._obey(request)
            except Exception as error:
                plain = explain(error)
                tell("error", request.get("id"), what=plain.what, where=plain.where, fix=plain.fix)
            self._busy, self._talked_at = False, time.monotonic()

    def _listen(self) -> None:
        for line in sys.stdin:
            request = json.loads(line)
            if request["do"] == "stop":
                self._stop.set()
            else:
                self._asked.put(request)
        os._exit(0)

    def _look_around(self) -> None:
        while True:
            time.sleep(_LOOK_SECONDS)
            idle = time.monotonic() - self._talked_at
            if not self._busy and idle > IDLE_SECONDS:
                leave("idle")
            if self.chat and is_scarce():
                leave("training")

    def _obey(self, request: dict[str, Any]) -> None:
        if request["do"] == "open":
            self._open(request["name"])
        else:
            self._say(request)

    def _open(self, name: str) -> None:
        from jetson_ft.runs import talk

        partner = talk.find(name, self.root)
        if partner != self._partner:
            self._let_go()
            self.chat, _ = talk.begin(partner)
            self._partner = partner
        tell("ready", None)

    def _let_go(self) -> None:
        """Frees the model's memory, so that it counts for the next one."""
        import torch

        self.chat = self._partner = None
        gc.collect()
        torch.cuda.empty_cache()

    def _say(self, request: dict[str, Any]) -> None:
        from jetson_ft.inference.generate import Sampling

        self._stop.clear()
        chat = self.chat
        chat.system, chat.examples = request["system"], request["examples"]
        chat.turns = request["turns"]
        started, written = time.monotonic(), ""
        sampling = Sampling(**request["sampling"])
        for piece in chat.reply(request["text"], sampling, request["adapter"], self._stop.is_set):
            written += piece
            tell("piece", request["id"], text=piece)
        count = len(chat.tokenizer(written, add_special_tokens=False)["input_ids"])
        seconds = time.monotonic() - started
        tell("end", request["id"], tokens=count, seconds=seconds, stopped=self._stop.is_set())


def tell(kind: str, number: Any, **fields: Any) -> None:
    """One line to whoever started this process."""
    line = json.dumps({"kind": kind, "id": number, **fields}, ensure_ascii=False)
    print(line, file=_OUT, flush=True)


def leave(why: str) -> None:
    """Ends the process, whatever it is doing."""
    tell("left", None, why=why)
    os._exit(0)


def is_scarce() -> bool:
    """Whether a run needs more memory than there is beside the chat."""
    from jetson_ft.device import probe

    return beside.is_scarce(probe.probe())


if __name__ == "__main__":
    # Libraries print what they like; our lines go where they can't.
    _OUT = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    quieten()
    Worker(Path(sys.argv[1])).run()
