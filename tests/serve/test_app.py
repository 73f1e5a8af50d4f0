"""The API, by the official client: answers, streams, errors, many clients at once."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from served_api import CONTEXT, ServedApi, lora_models, serve_api
from workbench import wait_for

from jetson_ft.serve.app import _events
from jetson_ft.serve.engine import Engine
from jetson_ft.serve.fields import CompletionFields


def test_models_are_listed_and_found_by_each_name(served: ServedApi) -> None:
    assert [model.id for model in served.client.models.list()] == ["one", "two", "base"]
    assert served.client.models.retrieve("two-label").id == "two"
    entry = httpx.get(f"{served.url}/v1/models").json()["data"][0]
    assert entry["engine"] == "llama.cpp" and entry["context_length"] == CONTEXT


def test_a_stream_has_the_same_text_and_usage(served: ServedApi) -> None:
    request = {
        "model": "one-label", "messages": [{"role": "user", "content": "abc"}],
        "max_tokens": 20, "temperature": 0,
    }  # fmt: skip
    whole = served.client.chat.completions.create(**request)  # type: ignore[call-overload]
    chunks = list(
        served.client.chat.completions.create(  # type: ignore[call-overload]
            **request, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 20
    assert {chunk.model for chunk in chunks} == {whole.model} == {"one"}
    assert whole.choices[0].finish_reason == "length"
    assert "timings" not in whole.model_dump()


@pytest.mark.parametrize(("path", "body", "alternatives"), [
    ("chat/completions", {"logprobs": True}, 0),
    ("chat/completions", {"logprobs": True, "top_logprobs": 2}, 2),
    ("completions", {"logprobs": 0}, 0),
    ("completions", {"logprobs": 2}, 2),
])  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_probabilities_without_alternatives_are_listed_too(
    served: ServedApi, path: str, body: dict[str, Any], alternatives: int, stream: bool
) -> None:
    prompt = {"messages": [{"role": "user", "content": "a"}]} if "chat" in path else {"prompt": "a"}
    body = {"model": "base", "max_tokens": 3, "stream": stream, **prompt, **body}
    text = served.post(f"/v1/{path}", json=body).text
    lines = [
        line.removeprefix("data: ")
        for line in text.split("\n")
        if line.startswith(("{", "data: {"))
    ]
    tokens = [
        token for line in lines for choice in json.loads(line)["choices"]
        for token in (choice.get("logprobs") or {}).get("content") or []
    ]  # fmt: skip
    assert len(tokens) == 3 and all(token["logprob"] < 0 for token in tokens)
    assert {len(token["top_logprobs"]) for token in tokens} == {alternatives}


def test_a_stream_is_split_at_line_feeds_alone() -> None:
    text = "a\u2028b\u2029c\x85d\x0be"
    event = {"choices": [{"index": 0, "text": text}]}
    content = f"data: {json.dumps(event, ensure_ascii=False)}\n\ndata: [DONE]\n\n".encode()

    async def parts() -> AsyncIterator[bytes]:
        for place in range(len(content)):  # characters are cut too
            yield content[place : place + 1]

    async def read() -> list[str]:
        fields = CompletionFields(model="base", prompt="abc")
        return [
            line async for line in _events(httpx.Response(200, content=parts()), fields, "base")
        ]

    first, last = asyncio.run(read())
    assert json.loads(first.removeprefix("data: "))["choices"][0]["text"] == text
    assert last == "data: [DONE]\n\n"


def test_stop_texts_and_choices(served: ServedApi) -> None:
    text = served.complete("base", "abc")
    stop = text[5:7]
    assert served.complete("base", "abc", stop=[stop]) == text[: text.index(stop)]
    answer = served.client.completions.create(model="base", prompt="abc", n=3, max_tokens=4)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]


def test_a_seed_repeats_a_sampled_reply(served: ServedApi) -> None:
    def sample(seed: int) -> str:
        return served.complete("base", "xyz", temperature=1.5, seed=seed, top_p=0.9)

    first = sample(7)
    assert sample(7) == first
    assert any(sample(seed) != first for seed in (8, 9, 10))


def test_parts_of_a_message_are_joined(served: ServedApi) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "bc"}]
    assert served.chat("base", parts) == served.chat("base", "abc")  # type: ignore[arg-type]


def test_each_adapter_gives_its_own_text_in_any_order(served: ServedApi) -> None:
    """Slots of llama.cpp are reused: what one adapter computed must not serve another."""
    alone = {name: served.complete(name, "the same prompt") for name in ("one", "two", "base")}
    assert len(set(alone.values())) == 3
    names = ["one", "two", "base", "two", "one", "base"] * 3
    with ThreadPoolExecutor(6) as pool:
        texts = list(pool.map(lambda name: served.complete(name, "the same prompt"), names))
    assert texts == [alone[name] for name in names]


def test_an_earlier_prompt_isnt_restored_for_another_adapter(
    make_engine: Callable[..., Engine],
) -> None:
    """llama.cpp's cache of prompts in memory doesn't know which adapter has computed them."""
    long, other = "abcdefgh " * 40, "9876543210 " * 30
    with serve_api(make_engine(parallel=1), lora_models()) as served:
        expected = served.complete("two", long)
    with serve_api(make_engine(parallel=1), lora_models()) as served:
        assert served.complete("one", long) != expected
        served.complete("two", other)
        assert served.complete("two", long) == expected


def test_no_answer_is_lost_or_mixed_up_among_many_clients(served: ServedApi) -> None:
    def ask(number: int) -> tuple[str, str]:
        name = ("one", "two", "base")[number % 3]
        return served.chat(name, f"question {number}"), name

    alone = [ask(number) for number in range(32)]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(ask, range(32)))
    assert together == alone
    assert served.api.pending == 0


BAD_BODIES: list[tuple[dict[str, Any], type[openai.APIStatusError], str | None]] = [
    ({"model": "nope"}, openai.NotFoundError, "model"),
    ({"extra_body": {"n_discard": 1}}, openai.BadRequestError, "n_discard"),
    ({"extra_body": {"id_slot": 0}}, openai.BadRequestError, "id_slot"),
    ({"extra_body": {"lora": [{"id": 1, "scale": 9}]}}, openai.BadRequestError, "lora"),
    ({"extra_body": {"cache_prompt": False}}, openai.BadRequestError, "cache_prompt"),
    ({"extra_body": {"grammar": "root ::= [0-9]"}}, openai.BadRequestError, "grammar"),
    ({"temperature": 3}, openai.BadRequestError, "temperature"),
    ({"temperature": float("nan")}, openai.BadRequestError, None),
    ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
    ({"max_tokens": CONTEXT + 1}, openai.BadRequestError, "max_tokens"),
    ({"n": 5}, openai.BadRequestError, "n"),
    ({"seed": -1}, openai.BadRequestError, "seed"),
    ({"stop": ["x"] * 17}, openai.BadRequestError, "stop"),
    ({"prompt": ["a", "b"]}, openai.BadRequestError, "prompt"),
    ({"prompt": "a" * (CONTEXT + 9)}, openai.BadRequestError, None),
]


@pytest.mark.parametrize(("fields", "kind", "param"), BAD_BODIES, ids=lambda v: str(v)[:40])
def test_a_bad_request_is_refused_by_its_code(
    served: ServedApi, fields: dict[str, Any], kind: type[openai.APIStatusError], param: str | None
) -> None:
    if fields.get("temperature") != fields.get("temperature"):  # the client refuses NaN itself
        response = served.post(
            "/v1/completions", content=b'{"model": "base", "prompt": "a", "temperature": NaN}'
        )
        assert response.status_code == 400
        return
    with pytest.raises(kind) as caught:
        served.client.completions.create(**{"model": "base", "prompt": "abc"} | fields)
    assert caught.value.param == param or (caught.value.param or "").startswith(f"{param}.")
    assert isinstance(caught.value.body, dict) and caught.value.body["message"]


def test_a_context_that_is_exceeded_has_its_own_code(served: ServedApi) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.complete("base", "a" * (CONTEXT + 9))
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b"{" * 5000,
        b'{"model": "base"}',
        b"1e999",
    ],
)
def test_garbage_is_refused(served: ServedApi, content: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        response = served.post(path, content=content)
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_images_are_refused(served: ServedApi) -> None:
    part = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}
    with pytest.raises(openai.BadRequestError):
        served.chat("base", [part])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("GET", "/slots", 404), ("POST", "/props", 404), ("POST", "/infill", 404),
     ("GET", "/v1/chat/completions", 405), ("GET", "/v1/models/x/../../slots", 404),
     ("POST", "/lora-adapters", 404), ("GET", "/metrics", 404)],
)  # fmt: skip
def test_other_routes_of_the_engine_do_not_exist(
    served: ServedApi, method: str, path: str, status: int
) -> None:
    response = httpx.request(method, served.url + path)
    assert response.status_code == status
    assert response.json()["error"]["message"]


def test_a_full_queue_is_refused_and_empties(make_engine: Callable[..., Engine]) -> None:
    with serve_api(make_engine(parallel=1), lora_models(), max_requests=2) as served:
        streams = [_open_stream(served, "base") for _ in range(2)]
        wait_for(lambda: served.api.pending == 2)
        with pytest.raises(openai.RateLimitError) as caught:
            served.complete("base", "abc")
        assert int(caught.value.response.headers["retry-after"]) > 0
        for stream in streams:
            stream.close()
        wait_for(lambda: served.api.pending == 0)
        assert served.complete("base", "abc")


def _open_stream(served: ServedApi, model: str, stream: bool = True) -> socket.socket:
    """Send a request for a reply as long as the context, and read nothing."""
    body = json.dumps(
        {"model": model, "prompt": "abc", "stream": stream, "max_tokens": CONTEXT}
    ).encode()
    host, port = served.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_ends_the_reply_in_the_engine(
    make_engine: Callable[..., Engine], slow_gguf: Path, stream: bool
) -> None:
    """With one slot, the next reply waits for all others that still have a client."""
    count = 10
    with serve_api(make_engine(parallel=1, model=slow_gguf), lora_models()) as served:
        started = time.monotonic()
        served.complete("base", "abc", max_tokens=CONTEXT)
        whole = time.monotonic() - started
        connections = [_open_stream(served, "base", stream) for _ in range(count)]
        wait_for(lambda: served.api.pending == count)
        for connection in connections:
            connection.close()
        started = time.monotonic()
        assert served.complete("base", "xyz", max_tokens=1)
        assert time.monotonic() - started < whole * 3
        wait_for(lambda: served.api.pending == 0)
