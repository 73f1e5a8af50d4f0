"""Chat templates from outside: what they reach, how long they take, how much memory they get."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import chat_templates
import forked
import program
import psutil
import pytest
import whole_worker
from hypothesis import given, settings
from hypothesis import strategies as st
from workbench import Workbench, wait_for

from jetson_ft.chat.session import ChatSession
from jetson_ft.data import render_process, render_template
from jetson_ft.data.chat_template import encode
from jetson_ft.data.formats import ChatMessage
from jetson_ft.data.render_template import Request, TemplateError, TemplateLimitError
from jetson_ft.data.templates import TEMPLATES
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.models.loading import load_tokenizer
from jetson_ft.runs.exit_status import EXIT_STOPPED

TURN = [ChatMessage(role="user", content="q"), ChatMessage(role="assistant", content="a")]
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
# Nothing is wrong with it until it meets an answer.
LATE_LOOPS = f"{{% if messages | length > 1 %}}{LOOPS}{{% endif %}}x"
OPENS = "{{ cycler.__init__.__globals__.os.popen(x.t) }}"
ESCAPES = [
    "{{ cycler.__init__.__globals__.os.popen('touch hacked') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ lipsum.__globals__['os'].system('touch hacked') }}",
    "{{ ('{0.__class__}'|attr('format'))('') }}",
    "{{ '{0.__class__.__base__}'.format('') }}",
    "{{ self._TemplateReference__context.name.__globals__ }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ namespace.__init__.__globals__ }}",
    "{% set _ = messages.append(1) %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
]
# Too much memory or text, when it is compiled or when it is rendered.
BOMBS = {
    "constant": "{{ 'a' * 10**10 }}",
    "padding": "{{ messages[0].role.center(10**10) }}",
    "doubling": "{% set n = namespace(t='aaaa') %}{% for i in range(60) %}"
    "{% set n.t = n.t.replace('a', 'aaaa') %}{% endfor %}{{ n.t }}",
    "digits": "{{ '%10000000000d' % 1 }}",
    "text": "{% for i in range(9000) %}{{ 'abcdefghij' * 99 }}{% endfor %}",
    "length": "x" * (1 << 21),
}
# Refused by Python, without harm.
DEEP = {
    "macro": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(1) }}",
    "brackets": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "blocks": "{% if true %}" * 20_000 + "{% endif %}" * 20_000,
    "lists": "{% set n = namespace(a=1) %}{% for i in range(99999) %}{% set n.a = [n.a] %}"
    "{% endfor %}{{ raise_exception(n.a) }}",
}


def render(template: str, messages: Any = (TURN[0],), **variables: Any) -> str | TemplateError:
    """Return what a template from outside makes of messages."""
    request = Request(
        template, list(messages), [(len(messages), False)], None, variables, "origin.jinja"
    )
    ((answer,),) = render_template.render([request])
    return answer


@pytest.fixture
def chat(tiny_llama: Path) -> Any:
    return load_tokenizer(BaseModelFiles("tiny", tiny_llama))


@pytest.fixture
def model_with(tiny_llama: Path, tmp_path: Path) -> Any:
    """Return a function that makes a model whose own template is the given one."""

    def make(template: str) -> Path:
        folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
        (folder / "chat_template.jinja").write_text(template)
        return folder

    return make


def render_processes(process: int | None = None) -> list[psutil.Process]:
    """Return the rendering processes below a process, this one by default."""
    running = []
    for child in psutil.Process(process).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if render_process.__name__ in child.cmdline():
                running.append(child)
    return running


def is_rendering(process: int) -> bool:
    """Return whether a process below this one has rendered for a while."""
    with contextlib.suppress(psutil.Error):
        return any(child.cpu_times().user > 1.2 for child in render_processes(process))
    return False


class Command:
    """`jetson-ft` in a process that is forked from one with the imports done."""

    def __init__(self, output: Path, *arguments: str) -> None:
        self.output = output
        self.process = forked.context().Process(
            target=program.main_in_fork, args=(list(arguments), str(output))
        )
        self.process.start()

    def refused(self, *words: str) -> None:
        """Wait for its end, which must be an error with these words."""
        self.process.join(60)
        text = self.output.read_text()
        text = text[text.index("error: ") :]
        code = self.process.exitcode
        program.assert_refused(subprocess.CompletedProcess([], code, "", text), *words)


# What a template reaches


@pytest.mark.promise(28)
def test_template_that_reaches_for_python_gets_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    render_template._process.close()  # the next one has this folder
    for escape in ESCAPES:
        text = render(escape)
        assert isinstance(text, TemplateError) or text in ("", "None"), escape
    assert not (tmp_path / "hacked").exists()


@pytest.mark.promise(28)
def test_template_of_a_model_runs_nothing_through_the_command(
    model_with: Any, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_with(f"{{% set x = namespace(t='touch {tmp_path}/hacked') %}}{OPENS}")
    command = ["data", "inspect", str(rows_file), "--model", str(model)]
    Command(tmp_path / "out", *command).refused("refused: 40", "unsafe")
    assert not (tmp_path / "hacked").exists()


# Its bounds


@pytest.mark.promise(48)
@pytest.mark.parametrize("name", BOMBS)
def test_template_that_fills_the_memory_is_refused_with_its_origin(name: str) -> None:
    with pytest.raises(TemplateLimitError, match=r"more than \d+ MB") as caught:
        render(BOMBS[name])
    assert str(caught.value.where) == "origin.jinja"
    assert "data.chat_template" in str(caught.value.fix)
    assert render("{{ messages[0].content }}") == "q"  # the next one is rendered


@pytest.mark.promise(48)
@pytest.mark.parametrize("name", DEEP)
def test_template_that_is_nested_too_deeply_is_refused(name: str) -> None:
    assert isinstance(render(DEEP[name]), TemplateError)


@pytest.mark.slow(minutes=0.2)
@pytest.mark.promise(48)
def test_template_that_never_ends_is_refused_by_the_command(
    rows_file: Path, model_with: Any, tmp_path: Path
) -> None:
    model = model_with(LATE_LOOPS)
    command = Command(tmp_path / "out", "data", "inspect", str(rows_file), "--model", str(model))
    command.refused(f"more than {render_process.CPU_SECONDS} seconds", str(model))


@pytest.mark.promise(48)
def test_template_file_that_fills_the_memory_is_refused_before_a_run_is_made(
    rows_file: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    bomb, runs = tmp_path / "bomb.jinja", tmp_path / "runs"
    bomb.write_text("{{ messages[0].role }}" + BOMBS["constant"])
    values = [f"model={tiny_llama}", f"data.train={rows_file}", f"data.chat_template={bomb}"]
    settings = [part for value in values for part in ("--set", value)]
    command = Command(tmp_path / "out", "train", *settings, "--set", f"output_dir={runs}")
    command.refused("MB of memory", str(bomb))
    assert not list(runs.glob("*/state.json"))


@pytest.mark.promise(48)
def test_kernel_ends_a_rendering_whose_parent_is_gone() -> None:
    assert render("{{ messages[0].content }}") == "q"
    (process,) = render_processes()
    soft, _hard = resource.prlimit(process.pid, resource.RLIMIT_CPU)
    used = process.cpu_times()
    assert 0 < soft <= used.user + used.system + render_process.CPU_SECONDS + 1
    assert 0 < resource.prlimit(process.pid, resource.RLIMIT_AS)[0] < 2 << 30


# Stop meanwhile


@pytest.mark.promise(48)
def test_run_is_stopped_while_a_template_is_rendered(workbench: Workbench, tmp_path: Path) -> None:
    (tmp_path / "late.jinja").write_text(LATE_LOOPS)
    run = workbench.run("late-template")
    recipe = run.recipe()
    recipe.data.chat_template = str(tmp_path / "late.jinja")
    (run.path / "recipe.yaml").write_text(recipe.to_yaml())
    worker = workbench.context.Process(target=whole_worker.work, args=(str(run.path), ""))
    worker.start()
    wait_for(lambda: is_rendering(worker.pid), 40)
    run.request_stop()
    worker.join(40)
    assert worker.exitcode == EXIT_STOPPED, (run.path / "log.txt").read_text()


@pytest.mark.promise(48)
def test_reply_is_stopped_while_a_template_is_rendered(chat: Any) -> None:
    chat.chat_template = LOOPS
    session = ChatSession(None, chat, False, 1000)
    render("x")  # the process has started
    started = time.monotonic()
    stopped = [False, False, True]
    assert list(session.reply("q", should_stop=lambda: stopped.pop(0))) == []
    assert time.monotonic() - started < render_process.CPU_SECONDS
    assert not render_processes()


@pytest.mark.promise(48)
def test_interrupt_ends_the_command_and_the_rendering(
    rows_file: Path, model_with: Any, tmp_path: Path
) -> None:
    model = str(model_with(LATE_LOOPS))
    command = Command(tmp_path / "out", "data", "inspect", str(rows_file), "--model", model)
    pid = command.process.pid
    wait_for(lambda: is_rendering(pid), 40)
    (rendering,) = render_processes(pid)
    os.kill(pid, signal.SIGINT)
    command.process.join(20)
    assert command.process.exitcode
    assert "Traceback" not in command.output.read_text()
    wait_for(lambda: not rendering.is_running(), 5)


# Signals from outside


@pytest.mark.promise(48)
def test_signals_to_the_whole_service_leave_the_rendering_to_its_parent() -> None:
    assert render("x") == "x"
    (process,) = render_processes()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        process.send_signal(number)
    assert render("y") == "y"
    assert render_processes() == [process]


@pytest.mark.promise(48)
def test_rendering_that_is_killed_from_outside_passes_no_bound() -> None:
    def kill_after(calls: int) -> Iterator[None]:
        yield from [None] * calls
        (process,) = render_processes()
        process.kill()
        yield
        raise KeyboardInterrupt

    render("x")
    kills = kill_after(2)
    with pytest.raises(RuntimeError, match="code -9"), render_template.stop_check(lambda: None):
        threading.Timer(0.5, lambda: render_processes()[0].kill()).start()
        render(LOOPS)
    render("x")
    with pytest.raises(KeyboardInterrupt), render_template.stop_check(lambda: next(kills)):
        render(LOOPS)


def test_threads_that_need_a_process_at_once_start_one(monkeypatch: pytest.MonkeyPatch) -> None:
    render_template._process.close()
    popen, started = subprocess.Popen, []

    def slow_popen(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.1)
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", slow_popen)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(render_template.prepare, ["x"] * 4))
    for process in started[1:]:
        process.kill()
    assert len(started) == 1


# The same text as without bounds


@pytest.mark.parametrize("name", [name for name in dir(chat_templates) if name.isupper()])
def test_text_is_the_one_that_transformers_renders(chat: Any, name: str) -> None:
    template = getattr(chat_templates, name)
    chat.bos_token = "<|endoftext|>"
    messages = [{"role": "system", "content": "s"}, *TURN, {"role": "user", "content": " b\n"}]
    for conversation in (messages, messages[1:]):
        try:
            expected = chat.apply_chat_template(
                conversation, chat_template=template, tokenize=False
            )
        except Exception:
            expected = None
        if "strftime_now" in template:  # the date is fixed
            continue
        text = render(template, conversation, **chat.special_tokens_map)
        assert text == expected or (expected is None and isinstance(text, TemplateError))


@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(exclude_categories=())))
def test_any_text_passes_unchanged(text: str) -> None:
    assert render("{{ messages[0].content }}", [{"role": "user", "content": text}]) == text


def test_own_templates_need_no_process(chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render_template._RenderProcess, "start", None)
    for template in TEMPLATES.values():
        chat.chat_template = template
        assert encode(chat, TURN).ids
    chat.chat_template = TEMPLATES["chatml"] + "{{ '' }}"
    with pytest.raises(TypeError):
        encode(chat, TURN)


def test_idle_process_is_started_again() -> None:
    render("x")
    (process,) = render_processes()
    render_template._process._process.stdin.close()  # type: ignore[union-attr]
    process.wait(5)
    assert render("y") == "y"
