"""A chat in a separate process: replies, stops, and when the model is unloaded."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import pytest
from safetensors.torch import load_file, save_file

from jetson_ft.chat import server
from jetson_ft.chat.client import ChatClient, ChatRequest
from jetson_ft.errors import UserError
from jetson_ft.inference.generate import Sampling

SHORT = Sampling(max_new_tokens=12)


@pytest.fixture(scope="module")
def client(finished: Any) -> Iterator[ChatClient]:
    client = ChatClient(finished.path.parent)
    yield client
    client.close()


def replies(client: ChatClient, name: str, **changes: Any) -> Any:
    request = {"text": "1加2等于几？", "turns": [], "sampling": SHORT, **changes}
    return list(client.generate(name, ChatRequest(**request)))


@pytest.mark.slow
def test_base_and_adapter_reply_in_growing_texts(client: ChatClient, finished: Any) -> None:
    received = replies(client, finished.name)
    texts = [reply.text for reply in received]
    assert all(after.startswith(before) for before, after in pairwise(texts))
    assert received[-1].tokens and received[-1].seconds and received[0].tokens is None
    process = client._process
    assert replies(client, finished.name, use_adapter=False)[-1].text != texts[-1]
    assert replies(client, finished.name)[-1].text == texts[-1], "greedy replies repeat"
    assert client._process is process, "the model stays loaded"


@pytest.mark.slow
def test_reply_can_be_stopped_or_closed_before_its_end(
    client: ChatClient, finished: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = Sampling(max_new_tokens=1500, temperature=5.0, top_k=0, seed=1)
    request = ChatRequest("1加2等于几？", [], long)
    stream = client.generate(finished.name, request, client_id="me")
    next(stream)
    sent: list[Any] = []
    with monkeypatch.context() as patched:
        patched.setattr(client, "_send", sent.append)
        client.stop(client_id="another")
    assert not sent, "only its own client may stop a reply"
    with pytest.raises(UserError, match="for another client"):
        replies(client, finished.name)
    started = time.monotonic()
    client.stop(client_id="me")
    last = list(stream)[-1]
    assert time.monotonic() - started < 5 and last.tokens is not None
    closed = client.generate(finished.name, request)
    next(closed)
    closed.close()  # type: ignore[attr-defined]
    assert replies(client, finished.name)[-1].text, (
        "the rest of a closed reply is no part of the next one"
    )
    whole = client.generate(finished.name, ChatRequest("1加2等于几？", [], Sampling(2)))
    while next(whole).tokens is None:
        pass
    whole.close()  # type: ignore[attr-defined]
    assert replies(client, finished.name)[-1].text, "closing after the end waits for nothing"


@pytest.mark.slow
def test_error_leaves_the_model_loaded(client: ChatClient, finished: Any) -> None:
    with pytest.raises(UserError, match=r"[Nn]o run|not found"):
        replies(client, "nothing")
    with pytest.raises(UserError, match="The conversation has"):
        replies(client, finished.name, text="长" * 40_000)
    assert replies(client, finished.name)[-1].text


@pytest.mark.slow
def test_unknown_name_leaves_the_model_loaded(
    finished: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "send", lambda *_, **__: None)
    chat_server = server.ChatServer(finished.path.parent)
    chat_server.load(finished.name)
    loaded = chat_server.chat
    with pytest.raises(UserError, match=r"[Nn]o run|not found"):
        chat_server.load("nothing")
    chat_server.load(finished.name)
    assert chat_server.chat is loaded


@pytest.mark.slow
def test_newer_adapter_of_the_same_name_is_loaded(
    client: ChatClient, finished: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished.adapter, tmp_path / "adapter")
    before = replies(client, str(folder))[-1].text
    file = folder / "adapter_model.safetensors"
    save_file({name: 0 * one for name, one in load_file(file).items()}, file)
    base = replies(client, finished.name, use_adapter=False)[-1].text
    assert replies(client, str(folder))[-1].text == base != before


@pytest.mark.slow
def test_stop_while_loading_lets_the_next_request_load_again(tmp_path: Path, finished: Any) -> None:
    client = ChatClient(finished.path.parent)
    errors: list[UserError] = []

    def request_reply() -> None:
        with pytest.raises(UserError) as caught:
            replies(client, finished.name)
        errors.append(caught.value)

    thread = threading.Thread(target=request_reply)
    thread.start()
    while not client._loading:
        time.sleep(0.01)
    client.stop()
    thread.join(5)
    assert [str(error.what) for error in errors] == ["Stopped before the model was loaded."]
    assert replies(client, finished.name)[-1].text
    client.close()


@pytest.mark.slow
def test_server_exits_when_its_input_ends(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "jetson_ft.chat.server", str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin
    process.stdin.close()
    assert process.wait(20) == 0


class Exited(BaseException):
    """The process would exit here."""


def exit_process(what: str, fix: str) -> None:
    raise Exited(what)


def test_watching_continues_after_an_error_and_logs_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server, "exit_process", exit_process)
    monkeypatch.setattr(server, "_WATCH_SECONDS", 0.0)
    results = [UserError("No such run."), OSError("gone"), False, True]
    monkeypatch.setattr(server.memory_guard, "is_memory_short", Mock(side_effect=results))
    chat_server = server.ChatServer(Path())
    chat_server.chat = cast(Any, object())
    with pytest.raises(Exited, match="a run has started"):
        chat_server._watch()
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [
        UserError, OSError,
    ]  # fmt: skip


def test_message_is_sent_in_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    output = Mock()
    monkeypatch.setattr(server, "_output", output)
    server.send("delta", text="a\nb")
    output.write.assert_called_once_with('{"kind": "delta", "text": "a\\nb"}\n')
    output.flush.assert_called_once()


@pytest.mark.parametrize(("loaded", "short", "idle", "reason"), [
    (True, True, False, "a run has started"), (False, True, True, "not used"),
    (True, False, True, "not used"),
])  # fmt: skip
def test_server_exits_when_a_run_needs_memory_or_without_requests(
    loaded: bool, short: bool, idle: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "exit_process", exit_process)
    monkeypatch.setattr(server, "_WATCH_SECONDS", 0.0)
    monkeypatch.setattr(server, "IDLE_SECONDS", -1.0 if idle else 600.0)
    monkeypatch.setattr(server.memory_guard, "is_memory_short", lambda: short)
    with pytest.raises(Exited, match=reason):
        chat_server = server.ChatServer(Path())
        chat_server.chat = cast(Any, object()) if loaded else None
        chat_server._watch()
