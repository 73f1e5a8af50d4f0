"""The conversation of one pane: as the page shows it, and as questions with answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jetson_ft.chat.client import ChatTurns
from jetson_ft.errors import _
from jetson_ft.webui.render import Locale

Messages = list[dict[str, Any]]  # of Gradio's Chatbot
CONTINUE = "continue"  # the option under an answer that can go on, or that is missing


@dataclass
class Turn:
    """A question and its answer."""

    question: str
    answer: str = ""  # empty: not answered
    note: str = ""  # shown under the answer
    is_cut: bool = False  # the answer can be continued


def read_turns(messages: Messages | None) -> list[Turn]:
    """Return the turns of a pane's messages; messages before the first question are left out."""
    turns: list[Turn] = []
    for message in messages or []:
        if message["role"] == "user":
            turns.append(Turn(_text(message)))
        elif turns and message["role"] == "assistant":
            details = message.get("metadata") or {}
            turn = turns[-1]
            turn.answer, turn.note = _text(message), str(details.get("log") or "")
            turn.is_cut = details.get("status") == "pending"
    return turns


def _text(message: dict[str, Any]) -> str:
    """Return the text of one of Gradio's messages.

    A file in a request must not be returned: Gradio copies each file that it sends to where it can
    be fetched.
    """
    content = message["content"]
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(str(part.get("text") or "") for part in parts if isinstance(part, dict))


def show_turns(t: Locale, turns: Sequence[Turn], is_done: bool = True) -> Messages:
    """Return the messages that show the turns.

    Args:
        is_done: the last answer is complete or cut off, not being generated.
    """
    messages: Messages = []
    for turn in turns:
        messages.append({"role": "user", "content": _content(turn.question)})
        is_last = turn is turns[-1]
        if turn.answer or not is_last or is_done:
            note = turn.note if turn.answer else t(_("not answered"))
            # `status` and `log` show nothing by themselves: chat.js reads them.
            status = "pending" if turn.is_cut else "done"
            answer = {
                "role": "assistant", "content": _content(turn.answer),
                "metadata": {"log": note, "status": status},
            }  # fmt: skip
            if is_last and is_done and (turn.is_cut or not turn.answer):
                label = t(_("Continue")) if turn.answer else t(_("Answer"))
                answer["options"] = [{"value": CONTINUE, "label": label}]
            messages.append(answer)
    return messages


def _content(text: str) -> list[dict[str, str]]:
    # Of a bare string Gradio would remove the indentation that its lines share.
    return [{"type": "text", "text": text}]


def dialogue(turns: Sequence[Turn]) -> ChatTurns:
    """Return the answered turns for a model."""
    return [
        {"role": role, "content": text}
        for turn in turns if turn.answer
        for role, text in (("user", turn.question), ("assistant", turn.answer))
    ]  # fmt: skip


def align(turns: Sequence[Turn], questions: Sequence[str]) -> list[Turn]:
    """Return one turn for each question: the pane's own where it is the same, else without answer.

    So both panes of a comparison always have the same questions.
    """
    known = [*turns, *[Turn("")] * len(questions)]
    return [
        turn if turn.question == question else Turn(question)
        for question, turn in zip(questions, known, strict=False)
    ]
