"""Talking with a model in a terminal. Ctrl-C stops the reply, not the program."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rich.markup import escape

from jetson_ft.console import out
from jetson_ft.errors import UserError
from jetson_ft.inference.chat import Chat, read_examples
from jetson_ft.inference.generate import Sampling
from jetson_ft.paths import printable
from jetson_ft.training.memory import is_out_of_memory

HELP = """\
/compare [on|off]    base and adapter side by side from one prompt
/system [TEXT]       set or clear the system message
/examples [FILE]     few-shot examples before the conversation (none: clear)
/set NAME VALUE      max_new_tokens, temperature (0: greedy), top_k, top_p,
                     repetition_penalty, seed
/reset               begin a new conversation
/help  /quit         (Ctrl-D quits too; Ctrl-C stops a reply)"""


class Terminal:
    """The loop of reading lines and writing replies."""

    def __init__(self, chat: Chat, sampling: Sampling, title: str) -> None:
        self.chat, self.sampling, self.title = chat, sampling, title
        self.compare = False
        self._stop = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/compare": self._set_compare,
            "/system": self._set_system,
            "/examples": self._set_examples,
            "/set": self._set_sampling,
            "/reset": self._reset,
            "/help": lambda _: out.print(HELP, markup=False),
        }

    def loop(self) -> None:
        """Until /quit or the end of input."""
        out.print(f"{self.title}\n/help lists the commands.", markup=False)
        while True:
            try:
                line = input("\nyou> ").strip()
            except EOFError:
                out.print()
                return
            except KeyboardInterrupt:
                out.print("\n(Ctrl-D or /quit leaves)")
                continue
            if line in ("/quit", "/exit"):
                return
            if line:
                self._handle(line)

    def _handle(self, line: str) -> None:
        try:
            if line.startswith("/"):
                name, _, rest = line.partition(" ")
                command = self._commands.get(name)
                if command is None:
                    raise UserError(f"There is no command {name}.", fix="/help lists them.")
                command(rest.strip())
            else:
                self._answer(line)
        except UserError as error:
            out.print(escape(printable(str(error))))
        except KeyboardInterrupt:
            out.print()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            out.print("Out of memory.\n  fix:   /reset, or /set max_new_tokens to fewer.")

    # --- replies -----------------------------------------------------------------------

    def _answer(self, text: str) -> None:
        if self.compare:
            self._write("base", text, use_adapter=False)
        answer = self._write("adapter" if self.chat.has_adapter else "model", text)
        if answer.strip():  # else it was stopped before it began
            self.chat.keep(text, answer)

    def _write(self, who: str, text: str, use_adapter: bool = True) -> str:
        """Streams one reply to the screen; what was written before a Ctrl-C stays."""
        self._stop, written = False, ""
        before = signal.signal(signal.SIGINT, self._on_interrupt)
        started = time.monotonic()
        out.print(f"{who}> ", end="", style="bold")
        try:
            for piece in self.chat.reply(text, self.sampling, use_adapter, lambda: self._stop):
                written += piece
                out.print(printable(piece), end="", markup=False)
        finally:
            signal.signal(signal.SIGINT, before)
        count = len(self.chat.tokenizer(written, add_special_tokens=False)["input_ids"])
        speed = count / max(1e-9, time.monotonic() - started)
        stopped = ", stopped" if self._stop else ""
        out.print(f"\n({count} tokens, {speed:.1f} tokens/s{stopped})", style="dim", markup=False)
        return written

    def _on_interrupt(self, *_: Any) -> None:
        self._stop = True

    # --- commands ----------------------------------------------------------------------

    def _set_compare(self, rest: str) -> None:
        if not self.chat.has_adapter:
            raise UserError("There is no adapter to compare with.", fix="Start with a run's name.")
        self.compare = rest != "off" if rest in ("on", "off") else not self.compare
        out.print(f"compare: {'on' if self.compare else 'off'}")

    def _set_system(self, rest: str) -> None:
        self.chat.system = rest
        out.print("system message " + ("set" if rest else "cleared"))

    def _set_examples(self, rest: str) -> None:
        path = rest.strip("'\"")
        self.chat.examples = read_examples(Path(path).expanduser()) if path else []
        out.print(f"{len(self.chat.examples) // 2} examples")

    def _set_sampling(self, rest: str) -> None:
        known = {f.name: f for f in fields(Sampling)}
        name, _, value = rest.partition(" ")
        if name not in known:
            raise UserError(f"There is no setting {name!r}.", fix=f"One of {', '.join(known)}.")
        kind = float if name in ("temperature", "top_p", "repetition_penalty") else int
        try:
            changed: dict[str, Any] = {name: kind(value)}
        except ValueError:
            wanted = "a number" if kind is float else "a whole number"
            raise UserError(f"{name} needs {wanted}, not {value!r}.") from None
        self.sampling = replace(self.sampling, **changed)
        out.print(f"{name} = {getattr(self.sampling, name)}")

    def _reset(self, _: str) -> None:
        self.chat.reset()
        out.print("new conversation")
