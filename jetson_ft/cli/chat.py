"""`jetson-ft chat`: the command and its loop. Ctrl-C stops the reply, not the program."""

from __future__ import annotations

import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from jetson_ft.cli.output import (
    RUNS,
    SAMPLING_OPTIONS,
    BaseOption,
    QuantizeOption,
    RunsOption,
    SystemOption,
    TargetArgument,
    out,
    show,
)
from jetson_ft.errors import UserError
from jetson_ft.files import expand_user
from jetson_ft.inference.generate import Sampling

if TYPE_CHECKING:
    from jetson_ft.chat.session import ChatSession

HELP = """\
/compare [on|off]    base and adapter side by side from one prompt
/compare QUESTION    the same for this question alone
/system [TEXT]       set or clear the system message
/examples [FILE]     few-shot examples before the conversation (none: clear)
/set NAME VALUE      max_new_tokens, temperature (0: greedy), top_k, top_p,
                     repetition_penalty, seed
/reset               begin a new conversation
/help  /quit         (Ctrl-D quits too; Ctrl-C stops a reply)"""


def chat(
    target: TargetArgument = "latest",
    model: BaseOption = None,
    quantize: QuantizeOption = None,
    max_new_tokens: Annotated[int, SAMPLING_OPTIONS["max_new_tokens"]] = Sampling.max_new_tokens,
    temperature: Annotated[float, SAMPLING_OPTIONS["temperature"]] = Sampling.temperature,
    top_k: Annotated[int, SAMPLING_OPTIONS["top_k"]] = Sampling.top_k,
    top_p: Annotated[float, SAMPLING_OPTIONS["top_p"]] = Sampling.top_p,
    repetition_penalty: Annotated[
        float, SAMPLING_OPTIONS["repetition_penalty"]
    ] = Sampling.repetition_penalty,
    seed: Annotated[int | None, SAMPLING_OPTIONS["seed"]] = Sampling.seed,
    system: SystemOption = "",
    examples: Annotated[Path | None, Option(help="Few-shot examples, a JSON file.")] = None,
    runs: RunsOption = RUNS,
) -> None:
    """Chat with a model in the terminal."""
    from jetson_ft.chat.session import read_examples
    from jetson_ft.chat.target import open_session, resolve_target

    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
    session = open_session(resolve_target(target, runs, model, quantize))
    session.system = system
    session.examples = read_examples(examples) if examples else []
    Terminal(session, sampling).loop()


class Terminal:
    """The loop of reading lines and writing replies."""

    def __init__(self, session: ChatSession, sampling: Sampling) -> None:
        self.session, self.sampling = session, sampling
        self.compare = False

    def loop(self) -> None:
        """Read and answer lines until /quit or the end of input."""
        show(f"{self.session.title}\n/help lists the commands.")
        if self.session.warning:
            show(str(self.session.warning))
        while True:
            try:
                line = input("\nyou> ").strip()
            except EOFError:
                out.print()
                return
            except KeyboardInterrupt:
                show("\n(Ctrl-D or /quit quits)")
                continue
            if line in ("/quit", "/exit"):
                return
            if line:
                self._handle(line)

    def _handle(self, line: str) -> None:
        """Run a command, or reply; show what goes wrong."""
        from jetson_ft.training.memory import is_out_of_memory

        try:
            if line.startswith("/"):
                self._run_command(line)
            else:
                self._answer(line, self.compare)
        except UserError as error:
            show(str(error))
        except KeyboardInterrupt:
            out.print()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            show("Out of memory.\n  fix:   /reset, or /set max_new_tokens to fewer.")

    def _answer(self, question: str, compare: bool) -> None:
        """Write the reply and add the turn; with `compare`, write the base's reply first."""
        if compare:
            self._write_reply("base", question, use_adapter=False)
        answer = self._write_reply("adapter" if self.session.has_adapter else "model", question)
        if answer.strip():  # else it was stopped before its first token
            self.session.add_turn(question, answer)

    def _write_reply(self, speaker: str, text: str, use_adapter: bool = True) -> str:
        """Stream one reply to the screen; return it, a part of it after Ctrl-C."""
        stop, written, started = threading.Event(), "", time.monotonic()
        before = signal.signal(signal.SIGINT, lambda *_: stop.set())
        show(f"{speaker}> ", end="", style="bold")
        try:
            for part in self.session.reply(text, self.sampling, use_adapter, stop.is_set):
                written += part
                show(part, end="")
        finally:
            signal.signal(signal.SIGINT, before)
        count = len(self.session.tokenizer(written, add_special_tokens=False)["input_ids"])
        speed = count / max(1e-9, time.monotonic() - started)
        stopped = ", stopped" if stop.is_set() else ""
        show(f"\n({count} tokens, {speed:.1f} tokens/s{stopped})", style="dim")
        return written

    def _run_command(self, line: str) -> None:
        """Run one of the commands in `HELP`."""
        from jetson_ft.chat.session import read_examples

        command, _, argument = line.partition(" ")
        argument = argument.strip()
        match command:
            case "/compare":
                if not self.session.has_adapter:
                    raise UserError("No adapter to compare with.", fix="Start with a run's name.")
                if argument in ("", "on", "off"):
                    self.compare = argument == "on" or (not argument and not self.compare)
                    show(f"compare: {'on' if self.compare else 'off'}")
                else:
                    self._answer(argument, compare=True)
            case "/system":
                self.session.system = argument
                show("system message " + ("set" if argument else "cleared"))
            case "/examples":
                path = argument.strip("'\"")
                self.session.examples = read_examples(expand_user(path)) if path else []
                show(f"{len(self.session.examples) // 2} examples")
            case "/set":
                self._set_sampling(*argument.partition(" ")[::2])
            case "/reset":
                self.session.turns.clear()
                show("new conversation")
            case "/help":
                show(HELP)
            case _:
                raise UserError("Unknown command {name}.", fix="/help lists them.", name=command)

    def _set_sampling(self, name: str, value: str) -> None:
        if name not in SAMPLING_OPTIONS:
            fix = f"One of {', '.join(SAMPLING_OPTIONS)}."
            raise UserError("Unknown setting {name!r}.", fix=fix, name=name)
        is_float = isinstance(getattr(Sampling, name), float)
        try:
            number: Any = float(value) if is_float else int(value)
        except ValueError:
            kind = "number" if is_float else "whole number"
            what = "{name} needs a {kind}, not {value!r}."
            raise UserError(what, name=name, kind=kind, value=value.strip()) from None
        self.sampling = replace(self.sampling, **{name: number})
        show(f"{name} = {getattr(self.sampling, name)}")
