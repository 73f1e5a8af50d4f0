"""The engine's process is watched: it ends, it is started again, it makes room for a run."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from served_api import CONTEXT, ServedApi, lora_models, serve_api
from workbench import wait_for

from jetson_ft.errors import UserError
from jetson_ft.export.llama import LlamaServer
from jetson_ft.serve import engine as engine_module
from jetson_ft.serve.engine import Engine


def engine_pid(served: ServedApi) -> int:
    """Return the number of the engine's process."""
    process = served.engine.process
    assert isinstance(process, LlamaServer) and process._process
    return process._process.pid


def test_a_dead_engine_is_started_again(
    make_engine: Callable[..., Engine], capfd: pytest.CaptureFixture[str]
) -> None:
    with serve_api(make_engine(), lora_models()) as served:
        before = served.complete("one", "abc")
        first = engine_pid(served)
        os.kill(first, signal.SIGKILL)
        with pytest.raises(openai.InternalServerError) as caught:
            served.complete("one", "abc")
        assert caught.value.status_code == 503
        wait_for(lambda: httpx.get(f"{served.url}/healthz").status_code == 200 and
                 engine_pid(served) != first)  # fmt: skip
        assert served.complete("one", "abc") == before
        assert "started again" in capfd.readouterr().out
        last = engine_pid(served)
    assert not psutil.pid_exists(last)


def test_a_stream_whose_engine_dies_ends_with_an_error(make_engine: Callable[..., Engine]) -> None:
    errors: list[str] = []
    with serve_api(make_engine(), lora_models()) as served:
        for _attempt in range(4):  # the tiny model may have written all before it is killed
            wait_for(lambda: httpx.get(f"{served.url}/healthz").status_code == 200)
            stream = served.client.completions.create(
                model="base", prompt="abc", max_tokens=CONTEXT, temperature=1, stream=True
            )
            os.kill(engine_pid(served), signal.SIGKILL)
            try:
                assert list(stream)[-1].choices[0].finish_reason
            except openai.APIError as error:
                errors.append(error.message)
                break
        wait_for(lambda: served.api.pending == 0)
    assert len(errors) == 1 and "engine has ended" in errors[0]


class BrittleProcess:
    """An engine's process that ends as soon as it is started."""

    api_key, url, is_alive, starts = "", "http://127.0.0.1:9", False, 0

    def __enter__(self) -> None:
        self.starts += 1
        if self.starts % 2:
            return
        raise UserError("It can't be started.", fix="Repair it.")

    def close(self) -> None:
        """End the process."""


def test_an_engine_that_always_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "_WATCH_SECONDS", 0.01)
    process, given_up = BrittleProcess(), []
    engine = Engine(process, lambda: False, lambda: True, lambda: given_up.append(True))
    with engine:
        wait_for(lambda: given_up)
    assert process.starts == 1 + engine_module._RESTARTS
    assert engine.failure and str(engine.failure.fix) == "Repair it."


class ForklessProcess(BrittleProcess):
    """An engine's process that the system can't start again."""

    def __enter__(self) -> None:
        self.starts += 1
        if self.starts > 1:
            raise BlockingIOError(11, "Resource temporarily unavailable")


def test_a_fault_of_a_restart_ends_the_server_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_module, "_WATCH_SECONDS", 0.01)
    given_up: list[bool] = []
    engine = Engine(ForklessProcess(), lambda: False, lambda: True, lambda: given_up.append(True))
    with engine:
        wait_for(lambda: given_up)
    assert "Resource temporarily unavailable" in str(engine.failure) and engine.unavailable


def test_the_model_makes_room_for_a_training_run(make_engine: Callable[..., Engine]) -> None:
    training: list[bool] = []
    with serve_api(make_engine(is_memory_short=lambda: bool(training)), lora_models()) as served:
        assert served.complete("base", "abc")
        first = engine_pid(served)
        training.append(True)
        wait_for(lambda: not psutil.pid_exists(first))
        with pytest.raises(openai.InternalServerError, match="Busy") as caught:
            served.complete("base", "abc")
        assert int(caught.value.response.headers["retry-after"]) > 0
        assert httpx.get(f"{served.url}/healthz").status_code == 503
        training.clear()
        wait_for(lambda: not served.engine.unavailable)
        assert served.complete("base", "abc")


def test_a_fault_of_the_watch_is_survived(make_engine: Callable[..., Engine]) -> None:
    """As where the run that trains is being deleted just now."""
    calls: list[int] = []

    def watch() -> bool:
        calls.append(1)
        if len(calls) == 1:
            raise UserError("The run is gone.")
        return False

    with serve_api(make_engine(is_memory_short=watch), lora_models()) as served:
        wait_for(lambda: len(calls) > 1)
        assert served.complete("base", "abc")


def test_a_file_that_cant_be_loaded_is_an_error_at_the_start(tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + b"\0" * 100)
    engine = Engine(LlamaServer(file, n_ctx=64), lambda: False, lambda: True, lambda: None)
    with pytest.raises(UserError), engine:
        pass
