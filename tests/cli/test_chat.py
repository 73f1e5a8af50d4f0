"""`jetson-ft chat`: commands, replies, and Ctrl-C in a real terminal."""

from __future__ import annotations

import fcntl
import os
import re
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

from jetson_ft.chat.session import ChatSession
from jetson_ft.cli.chat import HELP, Terminal
from jetson_ft.inference.generate import Sampling


def open_tiny(folder: str, has_adapter: bool) -> ChatSession:
    """Return the tiny Phi with an adapter that changes its replies, or alone."""
    import torch

    from jetson_ft import adapter
    from jetson_ft.models import loading
    from jetson_ft.models.files import BaseModelFiles
    from jetson_ft.recipe import LoraRecipe

    torch.set_num_threads(1)
    base = BaseModelFiles(folder, Path(folder))
    model = loading.load_model(base, loading.WeightFormat("fp32"), "cpu")
    if has_adapter:
        model = adapter.attach_adapter(model, LoraRecipe(rank=2), 0).eval()
        for name, value in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value)
    return ChatSession(model, loading.load_tokenizer(base), has_adapter, 2048)


@pytest.fixture(scope="module")
def tuned(tiny_phi: Path) -> ChatSession:
    return open_tiny(str(tiny_phi), True)


@pytest.fixture
def converse(
    tuned: ChatSession, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Terminal, str]]:
    """Return a function that types lines into a new conversation; it returns the output too."""

    def type_in(*typed: str, chat: ChatSession | None = None) -> tuple[Terminal, str]:
        waiting = iter(typed)

        def answer(prompt: str) -> str:
            line = next(waiting, None)
            if line is None:
                raise EOFError
            if line == "^C":
                raise KeyboardInterrupt
            return line

        monkeypatch.setattr("builtins.input", answer)
        mine = chat or ChatSession(tuned.model, tuned.tokenizer, True, 2048)
        terminal = Terminal(mine, Sampling(max_new_tokens=5))
        terminal.loop()
        return terminal, capsys.readouterr().out

    return type_in


# --- replies -----------------------------------------------------------------------------------


def test_reply_is_shown_with_its_tokens_and_added_to_the_turns(converse: Any) -> None:
    terminal, shown = converse("你好", "再说")
    assert shown.count("adapter> ") == 2 and shown.count(" tokens/s)") == 2
    roles = [message["role"] for message in terminal.session.turns]
    assert roles == ["user", "assistant"] * 2


def test_compare_shows_both_replies_and_adds_the_adapters(
    converse: Any, tuned: ChatSession
) -> None:
    terminal, shown = converse("/compare", "你好")
    assert shown.index("base> ") < shown.index("adapter> ")
    reply = "".join(tuned.reply("你好", Sampling(max_new_tokens=5))).strip()
    assert terminal.session.turns[-1]["content"] == reply
    base = "".join(tuned.reply("你好", Sampling(max_new_tokens=5), use_adapter=False)).strip()
    assert base != reply


@pytest.mark.parametrize(
    ("typed", "on"),
    [
        (["/compare"], True), (["/compare", "/compare"], False), (["/compare on"], True),
        (["/compare on", "/compare on"], True), (["/compare off"], False),
    ],
)  # fmt: skip
def test_compare_sets_or_toggles(converse: Any, typed: list[str], on: bool) -> None:
    assert converse(*typed)[0].compare is on


@pytest.mark.parametrize("mode", ["on", "off"])
def test_compare_with_a_question_answers_it_and_keeps_the_mode(converse: Any, mode: str) -> None:
    terminal, shown = converse(f"/compare {mode}", "/compare 天空 为什么是蓝色的？", "再说")
    assert shown.index("base> ") < shown.index("adapter> ")
    assert terminal.compare is (mode == "on")
    assert shown.count("base> ") == (2 if mode == "on" else 1)
    questions = [turn["content"] for turn in terminal.session.turns if turn["role"] == "user"]
    assert questions == ["天空 为什么是蓝色的？", "再说"]


def test_compare_without_an_adapter_is_refused(converse: Any, tuned: ChatSession) -> None:
    alone = ChatSession(tuned.model, tuned.tokenizer, False, 2048)
    terminal, shown = converse("/compare", "你好", chat=alone)
    assert "No adapter to compare with." in shown and "model> " in shown
    assert not terminal.compare


def test_conversation_over_the_limit_is_refused_and_the_loop_continues(
    converse: Any, tuned: ChatSession
) -> None:
    small = ChatSession(tuned.model, tuned.tokenizer, True, 60)
    terminal, shown = converse("长" * 40, "你好", chat=small)
    assert "the model reads 60 at most" in shown and "/reset" in shown
    assert len(terminal.session.turns) == 2, "the question that failed is not added"


def test_empty_reply_is_not_added_to_the_turns(
    converse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChatSession, "reply", lambda *_: iter(()))
    assert converse("你好")[0].session.turns == []


def test_control_characters_in_a_reply_are_escaped(
    converse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChatSession, "reply", lambda *_: iter(["\x1b[2J", "[red]x"]))
    assert "\\x1b[2J[red]x" in converse("你好")[1]


# --- commands ----------------------------------------------------------------------------------


def test_system_is_set_and_cleared(converse: Any) -> None:
    assert converse("/system be brief")[0].session.system == "be brief"
    assert converse("/system x", "/system")[0].session.system == ""


def test_reset_removes_the_turns(converse: Any) -> None:
    assert converse("你好", "/reset")[0].session.turns == []


def test_examples_are_read_from_a_file_and_cleared(converse: Any, tmp_path: Path) -> None:
    path = tmp_path / "it's few.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "c", "output": "d"}\n')
    terminal, shown = converse(f"/examples {path}")
    assert "2 examples" in shown
    assert [m["content"] for m in terminal.session.examples] == ["a", "b", "c", "d"]
    assert len(converse(f'/examples "{path}"')[0].session.examples) == 4
    assert converse(f"/examples {path}", "/examples")[0].session.examples == []


def test_missing_examples_file_is_named(converse: Any, tmp_path: Path) -> None:
    assert str(tmp_path / "none") in converse(f"/examples {tmp_path / 'none'}")[1]


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("/set temperature 0.7", "temperature", 0.7),
        ("/set top_k 10", "top_k", 10),
        ("/set seed 3", "seed", 3),
        ("/set max_new_tokens  9", "max_new_tokens", 9),
    ],
)
def test_settings_are_set(converse: Any, line: str, name: str, value: float) -> None:
    terminal, shown = converse(line)
    assert getattr(terminal.sampling, name) == value and f"{name} = {value}" in shown


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set", "Unknown setting ''"),
        ("/set warmth 1", "Unknown setting 'warmth'"),
        ("/set temperature hot", "temperature needs a number, not 'hot'"),
        ("/set top_k 1.5", "top_k needs a whole number, not '1.5'"),
        ("/set top_p 2", "top_p can't be 2"),
        ("/set seed 99999999999999999999", "seed can't be 1e+20"),
        ("/sing", "Unknown command /sing"),
        ("/examples /etc/shadow-or-so/[x]", "[x]"),
    ],
)
def test_mistakes_are_refused_and_change_nothing(converse: Any, line: str, message: str) -> None:
    terminal, shown = converse(line)
    assert message in shown
    assert terminal.sampling == Sampling(max_new_tokens=5)


def test_help_lists_every_command(converse: Any) -> None:
    shown = converse("/help")[1]
    for name in ("/compare", "/system", "/examples", "/set", "/reset", "/help", "/quit"):
        assert name in shown


def test_every_command_in_the_help_is_known(converse: Any) -> None:
    names = dict.fromkeys(re.findall(r"/[a-z]+", HELP))
    assert len(names) == 7
    assert "Unknown command" not in converse(*names)[1]


@pytest.mark.parametrize("way", ["/quit", "/exit"])
def test_quit_ends_the_loop(converse: Any, way: str) -> None:
    assert converse(way, "你好")[0].session.turns == []


def test_ctrl_c_at_the_prompt_shows_how_to_quit(converse: Any) -> None:
    terminal, shown = converse("^C", "你好")
    assert "/quit quits" in shown and len(terminal.session.turns) == 2


def test_out_of_memory_ends_the_reply_and_not_the_program(
    converse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Iterator[str]:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        yield

    monkeypatch.setattr(ChatSession, "reply", full)
    shown = converse("你好", "/help")[1]
    assert "Out of memory." in shown and "/reset" in shown and "few-shot" in shown


def test_interrupt_after_the_reply_continues_the_loop(
    converse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ChatSession, "add_turn", interrupted)
    assert "few-shot" in converse("你好", "/help")[1]


def test_interrupt_handler_is_restored(converse: Any) -> None:
    before = signal.getsignal(signal.SIGINT)
    converse("你好")
    assert signal.getsignal(signal.SIGINT) is before


# --- a real terminal ---------------------------------------------------------------------------


def own_terminal() -> None:
    """Make standard input the child's controlling terminal, as a shell does."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Screen:
    """The other end of the pseudo-terminal: types, and reads what is shown."""

    def __init__(self, master: int) -> None:
        self.master, self.shown = master, ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait(self, text: str, seconds: float = 40.0) -> str:
        """Return the output since the last wait, up to the text."""
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
    screen.wait("/quit quits")
    screen.type("/set max_new_tokens 4\n")
    screen.wait("max_new_tokens = 4")
    screen.type("再来\n")
    screen.wait(" tokens/s)")
    assert process.poll() is None
    screen.type("\x04")
    assert process.wait(20) == 0
