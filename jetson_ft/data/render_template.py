"""Render chat templates: those from outside in a process of their own, with bounds on it.

A model's template is a program. Jinja's sandbox keeps it from Python, but not from computing
without end or filling the memory (`{{ 'a' * 10**10 }}`). Shipped templates and that of the embedded
model are rendered in this process, all others in `render_process`.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jetson_ft.child_process import python_module
from jetson_ft.data import render_process
from jetson_ft.data.templates import CHOOSE_TEMPLATE, TEMPLATES, with_fixed_date
from jetson_ft.errors import UserError, _

# Of the embedded model's template.
_EMBEDDED_SHA256 = "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788"
_BEGINNING = "{{ bos_token }}"  # that `loading.load_tokenizer` puts before a shipped template
_POLL_SECONDS = 0.1
MAX_TEMPLATE_BYTES = 1 << 20  # a hundred times the longest of well-known models

_check_stop: ContextVar[Callable[[], None]] = ContextVar("check_stop", default=lambda: None)


class TemplateError(Exception):
    """A template refuses a conversation, or is not valid Jinja (then `line` is a number)."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line


class TemplateLimitError(UserError):
    """A template passes a bound of time, memory or text: no other conversation is tried."""


@dataclass(frozen=True)
class Request:
    """Renderings of one conversation.

    Args:
        variables: special tokens, and settings that templates read.
        renderings: how many messages each has, and whether a prompt for an answer follows.
        origin: file or folder that the template is from, for errors.
    """

    template: str
    messages: list[dict[str, Any]]
    renderings: Sequence[tuple[int, bool]]
    tools: list[Any] | None
    variables: dict[str, Any]
    origin: str


@contextmanager
def stop_check(check: Callable[[], None]) -> Iterator[None]:
    """Call `check` several times a second while templates are rendered in this context.

    An exception that it raises ends the rendering.
    """
    token = _check_stop.set(check)
    try:
        yield
    finally:
        _check_stop.reset(token)


def render(requests: Sequence[Request]) -> list[list[str | TemplateError]]:
    """Return, for each request, the text of each rendering, or why the template refuses it.

    Raises:
        TemplateLimitError: a template is too long, or passes a bound of time, memory or text.
    """
    _check_stop.get()()
    if not all(is_trusted(request.template) for request in requests):
        return _process.render(requests)
    answers: list[list[str | TemplateError]] = []
    for request in requests:
        template = with_fixed_date(request.template)
        answers.append([])
        for count, prompt in request.renderings:
            messages = request.messages[:count]
            try:
                text = render_process.render_messages(
                    template, messages, request.tools, request.variables, prompt
                )
                answers[-1].append(text)
            except Exception as error:  # whatever a template raises is about this conversation
                answers[-1].append(TemplateError(str(error)))
    return answers


def prepare(template: str) -> None:
    """Start the process if the template needs it, so that it starts while other work is done."""
    if not is_trusted(template):
        _process.start()


def check_size(size: int, origin: str) -> None:
    """Raise a TemplateLimitError if a template of so many bytes or characters is too long."""
    if size > MAX_TEMPLATE_BYTES:
        raise TemplateLimitError(
            _("The chat template has more than {megabytes} MB."),
            origin,
            CHOOSE_TEMPLATE,
            megabytes=MAX_TEMPLATE_BYTES >> 20,
        )


@lru_cache(maxsize=4)
def is_trusted(template: str) -> bool:
    """Return whether the template is one of this program's."""
    if template.removeprefix(_BEGINNING) in TEMPLATES.values():
        return True
    data = template.encode("utf-8", "surrogatepass")
    return hashlib.sha256(data).hexdigest() == _EMBEDDED_SHA256


def _exchange(process: subprocess.Popen[bytes], line: bytes) -> bytes | None:
    """Return the line that answers a line; None if the process ends without one."""
    assert process.stdin and process.stdout
    with suppress(BrokenPipeError):
        rest = memoryview(line)
        while rest:
            rest = rest[process.stdin.write(rest) :]
    poll, parts = select.poll(), list[bytes]()
    poll.register(process.stdout, select.POLLIN | select.POLLHUP)
    while not parts or not parts[-1].endswith(b"\n"):
        if poll.poll(_POLL_SECONDS * 1000):
            part = os.read(process.stdout.fileno(), 1 << 20)
            if not part:
                return None
            parts.append(part)
        else:
            _check_stop.get()()
    return b"".join(parts)


def _limit_error(code: int, origin: str) -> Exception:
    """Return the error for a process that ended with this code."""
    if code == -signal.SIGXCPU:
        what = _("The chat template needs more than {seconds} seconds for a conversation.")
    elif code == render_process.TEXT_EXIT:
        what = _("The chat template writes more than {text} MB of text for a conversation.")
    elif code in (-signal.SIGSEGV, -signal.SIGABRT, render_process.MEMORY_EXIT):
        what = _("The chat template needs more than {memory} MB of memory for a conversation.")
    else:
        return RuntimeError(f"the process for chat templates ended with code {code}")
    return TemplateLimitError(
        what,
        origin,
        CHOOSE_TEMPLATE,
        seconds=render_process.CPU_SECONDS,
        memory=render_process.MEMORY_BYTES >> 20,
        text=render_process.TEXT_BYTES >> 20,
    )


class _RenderProcess:
    """The process for templates from outside, started by the first of them."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # the process that started it; one that is forked from it starts its own
        self._lock = threading.RLock()

    def start(self) -> subprocess.Popen[bytes]:
        """Return the process; start it if it does not run."""
        with self._lock:
            process = self._process
            if process is None or self._owner != os.getpid() or process.poll() is not None:
                process = subprocess.Popen(
                    python_module(render_process.__name__),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    bufsize=0,
                    start_new_session=True,  # a terminal's Ctrl-C is for this process alone
                    env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                )
                self._process, self._owner = process, os.getpid()
            return process

    def render(self, requests: Sequence[Request]) -> list[list[str | TemplateError]]:
        """Return the text of each rendering, or why the template refuses it."""
        items, template = [], ""
        for request in requests:
            check_size(len(request.template), request.origin)
            is_same = request.template == template
            template = request.template
            items.append(
                {**vars(request), "template": None if is_same else with_fixed_date(template)}
            )
        line = json.dumps(items, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        with self._lock:
            try:
                # An idle process may have ended as the line was written to it.
                while (answer := _exchange(process := self.start(), line)) is None:
                    if code := process.wait():
                        _check_stop.get()()  # what ends this run may have ended the process too
                        raise _limit_error(code, requests[0].origin)
            except BaseException:  # the process is in the middle of an answer
                self.close()
                raise
        return [
            [TemplateError(p["error"], p["line"]) if "error" in p else p["text"] for p in parts]
            for parts in json.loads(answer)
        ]

    def close(self) -> None:
        """End the process."""
        if self._process and self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe
                pipe.close()
        self._process = None


_process = _RenderProcess()
