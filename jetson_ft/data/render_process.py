"""The process that renders chat templates from outside: `python -m jetson_ft.data.render_process`.

Each line of standard input is a JSON list of objects with the fields of `render_template.Request`,
where a null template is that of the object before it. The line of standard output for it is a JSON
list with a list for each of them, of `{"text": …}` or `{"error": …, "line": …}` for each rendering.
The kernel ends a process that computes for too long; one that needs too much memory or
writes too much text exits with `MEMORY_EXIT` or `TEXT_EXIT`. This module imports no torch.
"""

from __future__ import annotations

import json
import math
import os
import resource
import select
import signal
import sys
from typing import Any

CPU_SECONDS = 5  # for each rendering; the kernel counts whole seconds
MEMORY_BYTES = 1 << 29  # more than the process needs by itself
MEMORY_PER_BYTE = 32  # of a request, on top: Python holds a text with 4 bytes a character
TEXT_BYTES = 1 << 22  # of one rendering
TEXT_PER_BYTE = 16
MEMORY_EXIT, TEXT_EXIT = 10, 11
IDLE_SECONDS = 300  # after which the process ends; another one is started when it is needed


def render_messages(
    template: str,
    messages: list[dict[str, Any]],
    tools: list[Any] | None,
    variables: dict[str, Any],
    prompt: bool,
) -> str:
    """Return the text that a template makes of a conversation, as `apply_chat_template` does.

    Args:
        variables: special tokens, and settings that templates read.
        prompt: an answer is to follow.

    Raises:
        Exception: whatever the template raises, or Jinja about it.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    if not messages:
        raise ValueError("the conversation is empty")
    texts, _indices = render_jinja_template(
        [messages], tools, chat_template=template, add_generation_prompt=prompt, **variables
    )
    return str(texts[0])


def _answer(line: bytes, own_memory: int) -> list[list[dict[str, Any]]]:
    _lower(resource.RLIMIT_AS, own_memory + MEMORY_BYTES + MEMORY_PER_BYTE * len(line))
    answers: list[list[dict[str, Any]]] = []
    template = ""
    for request in json.loads(line):
        template = request["template"] or template
        answers.append([])
        for count, prompt in request["renderings"]:
            _lower(resource.RLIMIT_CPU, math.ceil(sum(os.times()[:2])) + CPU_SECONDS)
            messages = request["messages"][:count]
            try:
                text = render_messages(
                    template, messages, request["tools"], request["variables"], prompt
                )
            except MemoryError:
                os._exit(MEMORY_EXIT)
            except Exception as error:  # whatever a template raises is about this conversation
                number = getattr(error, "lineno", None)
                answers[-1].append({"error": _text(error), "line": number})
                continue
            if len(text) > TEXT_BYTES + TEXT_PER_BYTE * len(line):
                os._exit(TEXT_EXIT)
            answers[-1].append({"text": text})
    return answers


def _text(error: Exception) -> str:
    """Return the beginning of an error's text, which a template may have made."""
    try:
        return str(error)[:1000]
    except RecursionError:
        return type(error).__name__


def _lower(kind: int, limit: int) -> None:
    """Set a soft limit of the kernel, within the hard one."""
    _soft, hard = resource.getrlimit(kind)
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(kind, (limit, hard))


def _address_space() -> int:
    """Return the bytes of address space in use; 0 where the system doesn't report them."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def main() -> None:
    """Answer requests until standard input ends, or none has come for `IDLE_SECONDS`."""
    # A stop of the whole service reaches this process too. It ends with its standard input.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # Imports what rendering needs, which is no part of the bound.
    render_messages("{{ messages | tojson }}", [{"role": "user"}], None, {}, False)
    own_memory = _address_space()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while select.select([sys.stdin], [], [], IDLE_SECONDS)[0]:
        if not (line := sys.stdin.buffer.readline()):
            return
        try:
            answer = json.dumps(_answer(line, own_memory), ensure_ascii=False)
            # Texts may have halves of surrogate pairs, see `conversation.BREAK`.
            sys.stdout.buffer.write(answer.encode("utf-8", "surrogatepass") + b"\n")
        except MemoryError:
            os._exit(MEMORY_EXIT)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
