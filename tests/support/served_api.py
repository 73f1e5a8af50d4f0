"""The real API in a thread, in front of real processes of llama.cpp with a tiny random Llama."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import tiny_gguf as gguf_files
import uvicorn
from openai import OpenAI
from workbench import wait_for

from jetson_ft.export.llama import LlamaServer
from jetson_ft.http_access import listen
from jetson_ft.serve.app import Api
from jetson_ft.serve.engine import Engine
from jetson_ft.serve.models import ServedModel

CONTEXT = 512


class ServedApi:
    """A running server: its `url`, its parts, and clients of it."""

    def __init__(self, api: Api, port: int, key: str) -> None:
        self.api, self.engine = api, api.engine
        self.url = f"http://127.0.0.1:{port}"
        self.key = key
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key=key or "none", max_retries=0)

    def post(self, path: str, **options: object) -> httpx.Response:
        """Send a request as it is."""
        return httpx.post(self.url + path, timeout=60, **options)  # type: ignore[arg-type]

    def complete(self, model: str, prompt: str, **options: object) -> str:
        """Return one greedy completion."""
        options = {"max_tokens": 24, "temperature": 0} | options
        answer = self.client.completions.create(model=model, prompt=prompt, **options)  # type: ignore[call-overload]
        return str(answer.choices[0].text)

    def chat(self, model: str, text: str, **options: object) -> str:
        """Return one greedy reply."""
        options = {"max_tokens": 24, "temperature": 0} | options
        answer = self.client.chat.completions.create(  # type: ignore[call-overload]
            model=model, messages=[{"role": "user", "content": text}], **options
        )
        return str(answer.choices[0].message.content)


@contextmanager
def serve_api(
    engine: Engine,
    models: list[ServedModel],
    key: str = "",
    max_requests: int = 64,
    origins: tuple[str, ...] = (),
    context: int = CONTEXT,
) -> Iterator[ServedApi]:
    """Start the engine, and the API in a thread."""
    listener = listen("127.0.0.1", 0)
    with engine:
        api = Api(engine, models, context, max_requests)
        config = uvicorn.Config(
            api.app(key, origins=origins), log_level="warning", timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=[[listener]])
        thread.start()
        try:
            wait_for(lambda: server.started)
            yield ServedApi(api, listener.getsockname()[1], key)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Llama of one layer."""
    return gguf_files.write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", context=CONTEXT)


@pytest.fixture(scope="session")
def slow_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Llama with so many layers that a reply takes seconds."""
    folder = tmp_path_factory.mktemp("gguf")
    return gguf_files.write_gguf(folder / "slow.gguf", context=CONTEXT, layers=150)


@pytest.fixture(scope="session")
def tiny_loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return two adapters of it."""
    folder = tmp_path_factory.mktemp("loras")
    return {
        name: gguf_files.write_lora(folder / f"{name}.gguf", n)
        for n, name in enumerate(("one", "two"))
    }


@pytest.fixture(scope="session")
def make_engine(tiny_gguf: Path, tiny_loras: dict[str, Path]) -> Callable[..., Engine]:
    """Return a function that makes an engine, not started, of the tiny Llama."""

    def make(
        parallel: int = 4,
        is_memory_short: Callable[[], bool] = lambda: False,
        model: Path = tiny_gguf,
    ) -> Engine:
        server = LlamaServer(model, tiny_loras, n_ctx=CONTEXT, n_parallel=parallel, threads=1)
        return Engine(server, is_memory_short, lambda: not is_memory_short(), lambda: None)

    return make


def lora_models() -> list[ServedModel]:
    """Return the entries of the two adapters and their base."""
    scales = {"one": (1.0, 0.0), "two": (0.0, 1.0), "base": (0.0, 0.0)}
    return [
        ServedModel(
            name, (f"{name}-label",),
            engine_fields={"lora": [{"id": id, "scale": scale} for id, scale in enumerate(pair)]},
        )
        for name, pair in scales.items()
    ]  # fmt: skip


@pytest.fixture(scope="module")
def served(make_engine: Callable[..., Engine]) -> Iterator[ServedApi]:
    """Return a server without a key."""
    with serve_api(make_engine(), lora_models()) as api:
        yield api
