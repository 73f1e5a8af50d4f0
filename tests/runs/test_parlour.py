"""A chat in a process of its own: answers, stops, and leaves when it should."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from jetson_ft.errors import UserError
from jetson_ft.runs import chat_worker
from jetson_ft.runs.parlour import Parlour, Question

GREEDY = {"max_new_tokens": 12}


@pytest.fixture(scope="module")
def parlour(finished: Any) -> Iterator[Parlour]:
    made = Parlour(finished.path.parent)
    yield made
    made.close()


def said(parlour: Parlour, name: str, **more: Any) -> Any:
    question = {"text": "1加2等于几？", "turns": [], "sampling": GREEDY, **more}
    return list(parlour.answer(name, Question(**question)))


@pytest.mark.slow
def test_base_and_adapter_answer_as_they_stream(parlour: Parlour, finished: Any) -> None:
    answers = said(parlour, finished.name)
    texts = [answer.text for answer in answers]
    assert all(after.startswith(before) for before, after in pairwise(texts))
    assert answers[-1].tokens and answers[-1].seconds and answers[0].tokens is None
    process = parlour._process
    assert said(parlour, finished.name, adapter=False)[-1].text != texts[-1]
    assert said(parlour, finished.name)[-1].text == texts[-1], "greedy answers repeat"
    assert parlour._process is process, "the model stays loaded"


@pytest.mark.slow
def test_an_answer_can_be_stopped_and_left(
    parlour: Parlour, finished: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = {"max_new_tokens": 1500, "temperature": 5.0, "top_k": 0, "seed": 1}
    question = Question("1加2等于几？", [], long)
    stream = parlour.answer(finished.name, question, visitor="me")
    next(stream)
    sent: list[Any] = []
    with monkeypatch.context() as patched:
        patched.setattr(parlour, "_send", sent.append)
        parlour.stop(visitor="another")
    assert not sent, "only whose it is may end it"
    with pytest.raises(UserError, match="answering somebody else"):
        said(parlour, finished.name)
    started = time.monotonic()
    parlour.stop(visitor="me")
    last = list(stream)[-1]
    assert time.monotonic() - started < 5 and last.tokens is not None
    left = parlour.answer(finished.name, question)
    next(left)
    left.close()  # type: ignore[attr-defined]
    assert said(parlour, finished.name)[-1].text, "what was left is not taken for the next answer"
    whole = parlour.answer(finished.name, Question("1加2等于几？", [], {"max_new_tokens": 2}))
    while next(whole).tokens is None:
        pass
    whole.close()  # type: ignore[attr-defined]
    assert said(parlour, finished.name)[-1].text, "nobody waits for the end of what has ended"


@pytest.mark.slow
def test_a_refusal_leaves_the_model_where_it_was(parlour: Parlour, finished: Any) -> None:
    with pytest.raises(UserError, match="There is no run"):
        said(parlour, "nothing")
    with pytest.raises(UserError, match="temperature can't be"):
        said(parlour, finished.name, sampling={"temperature": -1})
    assert said(parlour, finished.name)[-1].text


@pytest.mark.slow
def test_a_mistyped_name_leaves_the_model_loaded(
    finished: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_worker, "tell", lambda *_, **__: None)
    worker = chat_worker.Worker(finished.path.parent)
    worker._open(finished.name)
    loaded = worker.chat
    with pytest.raises(UserError, match="There is no run"):
        worker._open("nothing")
    worker._open(finished.name)
    assert worker.chat is loaded


@pytest.mark.slow
def test_a_newer_adapter_of_the_same_name_is_taken(
    parlour: Parlour, finished: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished.adapter, tmp_path / "adapter")
    before = said(parlour, str(folder))[-1].text
    file = folder / "adapter_model.safetensors"
    save_file({name: 0 * one for name, one in load_file(file).items()}, file)
    base = said(parlour, finished.name, adapter=False)[-1].text
    assert said(parlour, str(folder))[-1].text == base != before


@pytest.mark.slow
def test_stopped_while_it_loads_the_next_one_is_served(tmp_path: Path, finished: Any) -> None:
    parlour = Parlour(finished.path.parent)
    told: list[UserError] = []

    def ask() -> None:
        with pytest.raises(UserError) as caught:
            said(parlour, finished.name)
        told.append(caught.value)

    visitor = threading.Thread(target=ask)
    visitor.start()
    while not parlour._opening:
        time.sleep(0.01)
    parlour.stop()
    visitor.join(5)
    assert [error.what for error in told] == ["Stopped before the model was loaded."]
    assert said(parlour, finished.name)[-1].text
    parlour.close()


@pytest.mark.slow
def test_it_ends_with_whoever_started_it(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "jetson_ft.runs.chat_worker", str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin
    process.stdin.close()
    assert process.wait(20) == 0


@pytest.mark.parametrize(("loaded", "scarce", "idle", "why"), [
    (True, True, False, "training"), (False, True, True, "idle"), (True, False, True, "idle"),
])  # fmt: skip
def test_it_leaves_for_a_run_that_needs_memory_and_when_nobody_talks(
    loaded: bool, scarce: bool, idle: bool, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Left(Exception):
        pass

    def leave(reason: str) -> None:
        raise Left(reason)

    monkeypatch.setattr(chat_worker, "leave", leave)
    monkeypatch.setattr(chat_worker, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(chat_worker, "IDLE_SECONDS", -1.0 if idle else 600.0)
    monkeypatch.setattr(chat_worker, "is_scarce", lambda: scarce)
    with pytest.raises(Left, match=why):
        worker = chat_worker.Worker(Path())
        worker.chat = object() if loaded else None
        worker._look_around()
