"""Talking in a terminal: commands, replies, and Ctrl-C in a real one."""

from __future__ import annotations

import fcntl
import io
import os
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jetson_ft import chat_terminal, console
from jetson_ft.chat_terminal import Terminal
from jetson_ft.inference.chat import Chat
from jetson_ft.inference.generate import Sampling


def open_tiny(folder: str, has_adapter: bool) -> Chat:
    """The tiny Phi with an adapter that changes its replies, or alone."""
    import torch

    from jetson_ft.models import adapter, load
    from jetson_ft.models.resolve import Base
    from jetson_ft.recipe import LoraRecipe

    torch.set_num_threads(1)
    base = Base(folder, Path(folder))
    model = load.load_model(base, load.Weights("fp32"), "cpu")
    if has_adapter:
        model = adapter.attach(model, LoraRecipe(rank=2), 0).eval()
        for name, value in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value)
    return Chat(model, load.load_tokenizer(base), has_adapter, 2048)


@pytest.fixture(scope="module")
def tuned(tiny_phi: Path) -> Chat:
    return open_tiny(str(tiny_phi), True)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    written = io.StringIO()
    plain = Console(file=written, highlight=False, soft_wrap=True, width=200)
    monkeypatch.setattr(console, "out", plain)
    monkeypatch.setattr(chat_terminal, "out", plain)
    yield written


@pytest.fixture
def talk(
    tuned: Chat, screen: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Terminal, str]]:
    """Types lines into a fresh conversation; returns the terminal and all that it showed."""

    def type_in(*typed: str, chat: Chat | None = None) -> tuple[Terminal, str]:
        waiting = iter(typed)

        def answer(prompt: str) -> str:
            line = next(waiting, None)
            if line is None:
                raise EOFError
            if line == "^C":
                raise KeyboardInterrupt
            return line

        monkeypatch.setattr("builtins.input", answer)
        mine = chat or Chat(tuned.model, tuned.tokenizer, True, 2048)
        terminal = Terminal(mine, Sampling(max_new_tokens=5), "tiny")
        terminal.loop()
        return terminal, screen.getvalue()

    return type_in


# --- replies -----------------------------------------------------------------------------------


def test_a_reply_is_shown_counted_and_remembered(talk: Any) -> None:
    terminal, shown = talk("你好", "再说")
    assert shown.count("adapter> ") == 2 and shown.count(" tokens/s)") == 2
    roles = [message["role"] for message in terminal.chat.turns]
    assert roles == ["user", "assistant"] * 2


def test_comparing_shows_both_and_remembers_the_adapters(talk: Any, tuned: Chat) -> None:
    terminal, shown = talk("/compare", "你好")
    assert shown.index("base> ") < shown.index("adapter> ")
    said = "".join(tuned.reply("你好", Sampling(max_new_tokens=5))).strip()
    assert terminal.chat.turns[-1]["content"] == said
    base = "".join(tuned.reply("你好", Sampling(max_new_tokens=5), use_adapter=False)).strip()
    assert base != said


@pytest.mark.parametrize(
    ("typed", "on"),
    [
        (["/compare"], True), (["/compare", "/compare"], False), (["/compare on"], True),
        (["/compare on", "/compare on"], True), (["/compare off"], False),
    ],
)  # fmt: skip
def test_compare_is_a_switch(talk: Any, typed: list[str], on: bool) -> None:
    assert talk(*typed)[0].compare is on


def test_without_an_adapter_there_is_nothing_to_compare(talk: Any, tuned: Chat) -> None:
    alone = Chat(tuned.model, tuned.tokenizer, False, 2048)
    terminal, shown = talk("/compare", "你好", chat=alone)
    assert "There is no adapter to compare with." in shown and "model> " in shown
    assert not terminal.compare


def test_an_overflowing_conversation_is_said_and_the_loop_goes_on(talk: Any, tuned: Chat) -> None:
    small = Chat(tuned.model, tuned.tokenizer, True, 60)
    terminal, shown = talk("长" * 40, "你好", chat=small)
    assert "more than the model's 60" in shown and "/reset" in shown
    assert len(terminal.chat.turns) == 2, "the question that failed is not kept"


def test_an_empty_reply_is_not_remembered(talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Chat, "reply", lambda *_: iter(()))
    assert talk("你好")[0].chat.turns == []


def test_escapes_in_a_reply_cannot_steer_the_terminal(
    talk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Chat, "reply", lambda *_: iter(["\x1b[2J", "[red]x"]))
    assert "\\x1b[2J[red]x" in talk("你好")[1]


# --- commands ----------------------------------------------------------------------------------


def test_system_is_set_and_cleared(talk: Any) -> None:
    assert talk("/system be brief")[0].chat.system == "be brief"
    assert talk("/system x", "/system")[0].chat.system == ""


def test_reset_forgets_turns(talk: Any) -> None:
    assert talk("你好", "/reset")[0].chat.turns == []


def test_examples_come_from_a_file_and_go_again(talk: Any, tmp_path: Path) -> None:
    path = tmp_path / "it's few.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "c", "output": "d"}\n')
    terminal, shown = talk(f"/examples {path}")
    assert "2 examples" in shown
    assert [m["content"] for m in terminal.chat.examples] == ["a", "b", "c", "d"]
    assert len(talk(f'/examples "{path}"')[0].chat.examples) == 4
    assert talk(f"/examples {path}", "/examples")[0].chat.examples == []


def test_a_missing_examples_file_is_named(talk: Any, tmp_path: Path) -> None:
    assert str(tmp_path / "none") in talk(f"/examples {tmp_path / 'none'}")[1]


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("/set temperature 0.7", "temperature", 0.7),
        ("/set top_k 10", "top_k", 10),
        ("/set seed 3", "seed", 3),
        ("/set max_new_tokens  9", "max_new_tokens", 9),
    ],
)
def test_settings_are_set(talk: Any, line: str, name: str, value: float) -> None:
    terminal, shown = talk(line)
    assert getattr(terminal.sampling, name) == value and f"{name} = {value}" in shown


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set", "There is no setting ''"),
        ("/set warmth 1", "There is no setting 'warmth'"),
        ("/set temperature hot", "temperature needs a number, not 'hot'"),
        ("/set top_k 1.5", "top_k needs a whole number, not '1.5'"),
        ("/set top_p 2", "top_p can't be 2"),
        ("/set seed 99999999999999999999", "seed can't be 1e+20"),
        ("/sing", "There is no command /sing"),
        ("/examples /etc/shadow-or-so/[x]", "[x]"),
    ],
)
def test_mistakes_are_explained_and_change_nothing(talk: Any, line: str, message: str) -> None:
    terminal, shown = talk(line)
    assert message in shown
    assert terminal.sampling == Sampling(max_new_tokens=5)


def test_help_names_every_command(talk: Any) -> None:
    terminal, shown = talk("/help")
    for name in [*terminal._commands, "/quit"]:
        assert name in shown


@pytest.mark.parametrize("way", ["/quit", "/exit"])
def test_quit_leaves(talk: Any, way: str) -> None:
    assert talk(way, "你好")[0].chat.turns == []


def test_interrupting_an_empty_line_tells_the_way_out(talk: Any) -> None:
    terminal, shown = talk("^C", "你好")
    assert "/quit leaves" in shown and len(terminal.chat.turns) == 2


def test_too_little_memory_ends_the_reply_and_not_the_program(
    talk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Iterator[str]:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        yield

    monkeypatch.setattr(Chat, "reply", full)
    shown = talk("你好", "/help")[1]
    assert "Out of memory." in shown and "/reset" in shown and "few-shot" in shown


def test_an_interrupt_after_the_reply_is_over_does_no_harm(
    talk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Chat, "keep", interrupted)
    assert "few-shot" in talk("你好", "/help")[1]


def test_the_interrupt_handler_is_given_back(talk: Any) -> None:
    before = signal.getsignal(signal.SIGINT)
    talk("你好")
    assert signal.getsignal(signal.SIGINT) is before


# --- a real terminal ---------------------------------------------------------------------------


def own_terminal() -> None:
    """In the child: makes its standard input its controlling terminal, as a shell would."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Screen:
    """The other end of the pseudo-terminal: types, and reads what is shown."""

    def __init__(self, master: int) -> None:
        self.master, self.shown = master, ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait(self, text: str, seconds: float = 40.0) -> str:
        """Everything shown since the last wait, up to the text."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            left = deadline - time.monotonic()
            if left < 0 or not select.select([self.master], [], [], left)[0]:
                raise AssertionError(f"{text!r} was not shown: {self.shown[-2000:]!r}")
            self.shown += os.read(self.master, 65536).decode(errors="replace")
        before, _, self.shown = self.shown.partition(text)
        return before


@pytest.fixture
def tty(tiny_phi: Path) -> Iterator[tuple[Screen, Any]]:
    """`jetson-ft chat` on a terminal of its own."""
    master, slave = os.openpty()
    command = [sys.executable, "-m", "jetson_ft.cli", "chat", "base", "--model", str(tiny_phi)]
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "1500"],
        stdin=slave, stdout=slave, stderr=slave, preexec_fn=own_terminal,
    )  # fmt: skip
    yield Screen(master), process
    process.kill()
    process.wait()
    os.close(master)
    os.close(slave)


@pytest.mark.slow
def test_ctrl_c_stops_the_reply_and_not_the_program(tty: tuple[Screen, Any]) -> None:
    screen, process = tty
    screen.wait("you> ")
    screen.type("你好\n")
    screen.wait("model> ")
    time.sleep(0.3)
    screen.type("\x03\x03")
    screen.wait("stopped)", 5.0)
    screen.wait("you> ")
    time.sleep(1.0)  # a key in the moment between prompt and read would wait for the next one
    screen.type("\x03")
    screen.wait("/quit leaves")
    screen.type("/set max_new_tokens 4\n")
    screen.wait("max_new_tokens = 4")
    screen.type("再来\n")
    screen.wait(" tokens/s)")
    assert process.poll() is None
    screen.type("\x04")
    assert process.wait(20) == 0
