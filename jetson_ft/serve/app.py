"""The routes of OpenAI's API, passed on to the engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from jetson_ft.serve.access import AccessMiddleware, read_body
from jetson_ft.serve.engine import Engine
from jetson_ft.serve.fields import (
    ChatFields,
    CompletionFields,
    GenerateFields,
    RequestError,
    parse_fields,
)
from jetson_ft.serve.models import ServedModel

_RETRY_SECONDS = 5
_ENGINE_TIMEOUT = httpx.Timeout(10.0, read=None)  # a queued request waits without a byte


class Api:
    """The API in front of one engine.

    Args:
        models: what can be asked for; their names are unique.
        context: most tokens of prompt and reply together.
        max_requests: replies that are generated or wait for it; more are refused.
    """

    def __init__(
        self, engine: Engine, models: Sequence[ServedModel], context: int, max_requests: int
    ) -> None:
        self.engine, self.models = engine, models
        self.context, self.max_requests = context, max_requests
        self.pending = 0  # replies
        self._by_name = {name: model for model in models for name in (model.name, *model.aliases)}

    def app(
        self, key: str, host_names: tuple[str, ...] = (), origins: tuple[str, ...] = ()
    ) -> ASGIApp:
        """Return the ASGI application; for the arguments see `AccessMiddleware`."""
        routes = [
            Route("/healthz", self._health),
            Route("/v1/models", self._list_models),
            Route("/v1/models/{name:path}", self._show_model),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
        ]
        middleware = [Middleware(AccessMiddleware, key, host_names, origins)]
        if origins:
            cors = Middleware(
                CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"],
                allow_headers=["*"],  # OpenAI's client in browsers sends some of its own
            )  # fmt: skip
            middleware.insert(0, cors)

        @asynccontextmanager
        async def lifespan(_app: Starlette) -> AsyncIterator[None]:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
            # Proxies of the environment are for other machines.
            async with httpx.AsyncClient(
                timeout=_ENGINE_TIMEOUT, limits=limits, trust_env=False
            ) as self._client:
                yield

        handlers: dict[Any, Callable[[Request, Any], Response | Awaitable[Response]]] = {
            HTTPException: _explain_status,
            Exception: _explain_fault,
            RequestError: lambda _request, error: error.response(),
        }
        return Starlette(
            routes=routes, middleware=middleware, lifespan=lifespan, exception_handlers=handlers
        )

    def _health(self, _request: Request) -> Response:
        reason = self.engine.unavailable
        return JSONResponse({"status": reason or "ok"}, 503 if reason else 200)

    def _list_models(self, _request: Request) -> Response:
        data = [model.as_json(self.context) for model in self.models]
        return JSONResponse({"object": "list", "data": data})

    def _show_model(self, request: Request) -> Response:
        return JSONResponse(self._model(request.path_params["name"]).as_json(self.context))

    def _model(self, name: str) -> ServedModel:
        if model := self._by_name.get(name):
            return model
        names = ", ".join(model.name for model in self.models)
        message = f"Model {name[:100]!r} is not served here. Available: {names}."
        raise RequestError(404, message, "model", "model_not_found")

    async def _chat(self, request: Request) -> Response:
        return await self._generate(request, ChatFields)

    async def _complete(self, request: Request) -> Response:
        return await self._generate(request, CompletionFields)

    async def _generate(self, request: Request, kind: type[GenerateFields]) -> Response:
        """Answer a request for replies; the client's disconnect ends their generation."""
        fields = parse_fields(kind, await read_body(request))
        model = self._model(fields.model)
        engine_fields = fields.engine_fields(self.context) | model.engine_fields
        if self.engine.unavailable:
            raise RequestError(503, self.engine.unavailable, retry_after=_RETRY_SECONDS)
        if self.pending + fields.choices > self.max_requests:
            message = f"{self.pending} replies are waiting or being written; try again later."
            raise RequestError(429, message, code="queue_full", retry_after=_RETRY_SECONDS)
        process = self.engine.process
        engine_request = self._client.build_request(
            "POST", process.url + request.url.path, json=engine_fields,
            headers={"Authorization": f"Bearer {process.api_key}"},
        )  # fmt: skip
        async with AsyncExitStack() as stack:
            self.pending += fields.choices
            stack.callback(self._release, fields.choices)
            response = await until_disconnect(request, self._send(engine_request))
            stack.push_async_callback(response.aclose)
            if response.status_code != 200:
                raise _engine_error(response.status_code, await response.aread())
            if fields.stream:
                return _EventStream(_events(response, fields, model.name), stack.pop_all())
            body = await until_disconnect(request, _read(response))
            return JSONResponse(_own_fields(json.loads(body), fields, model.name))

    def _release(self, choices: int) -> None:
        self.pending -= choices

    async def _send(self, request: httpx.Request) -> httpx.Response:
        try:
            return await self._client.send(request, stream=True)
        except httpx.TransportError as error:
            raise _engine_ended() from error


class _EventStream(StreamingResponse):
    """A stream that closes `resources` when it ends, or when the client disconnects."""

    def __init__(self, events: AsyncIterator[str], resources: AsyncExitStack) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._resources = resources

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._resources:
            await super().__call__(scope, receive, send)


async def _events(
    response: httpx.Response, fields: GenerateFields, name: str
) -> AsyncIterator[str]:
    """Yield the engine's server-sent events as ours; a fault becomes an event with `error`."""
    try:
        async for line in _lines(response):
            kind, _separator, data = line.partition(": ")
            if kind == "data" and data == "[DONE]":
                yield "data: [DONE]\n\n"
            elif kind == "data":
                chunk = _own_fields(json.loads(data), fields, name)
                yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
            elif kind == "error":
                yield f"data: {json.dumps(_engine_error(500, data.encode()).body)}\n\n"
    except httpx.TransportError:
        yield f"data: {json.dumps(_engine_ended().body)}\n\n"


async def _lines(response: httpx.Response) -> AsyncIterator[str]:
    """Yield the whole lines; only "\\n" ends one: JSON allows U+2028 and others in its texts."""
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")


async def _read(response: httpx.Response) -> bytes:
    try:
        return await response.aread()
    except httpx.TransportError as error:
        raise _engine_ended() from error


async def until_disconnect(request: Request, work: Awaitable[Any]) -> Any:
    """Return what `work` returns; cancel it if the client disconnects before.

    Raises:
        RequestError: it has disconnected; nobody reads the response.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise RequestError(400, "The client has disconnected.")
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _own_fields(answer: dict[str, Any], fields: GenerateFields, name: str) -> dict[str, Any]:
    """Return the engine's answer with the model's name, and without what wasn't asked for."""
    for private in ("timings", "__verbose", "prompt_progress"):
        answer.pop(private, None)
    if "error" in answer:
        return _engine_error(500, json.dumps(answer).encode()).body
    if not fields.alternatives:
        for choice in answer.get("choices", []):
            for token in (choice.get("logprobs") or {}).get("content") or []:
                token["top_logprobs"] = []
    return answer | {"model": name}


def _engine_ended() -> RequestError:
    message = "The engine has ended while it wrote this reply. Try again."
    return RequestError(503, message, retry_after=_RETRY_SECONDS)


def _engine_error(status: int, body: bytes) -> RequestError:
    """Return the engine's refusal of a request as one of ours."""
    try:
        error = json.loads(body)
        error = error.get("error", error)
        message, kind = str(error["message"]), error.get("type")
    except (ValueError, KeyError, AttributeError):
        message, kind = "The engine can't answer.", None
    if kind == "exceed_context_size_error":
        return RequestError(400, message, None, "context_length_exceeded")
    if status in (429, 503):
        return RequestError(status, message, retry_after=_RETRY_SECONDS)
    return RequestError(400 if 400 <= status < 500 else 502, message)


def _explain_status(_request: Request, error: HTTPException) -> Response:
    return RequestError(error.status_code, f"{error.detail}.").response()


def _explain_fault(_request: Request, _error: Exception) -> Response:
    return RequestError(500, "A fault in this server; its log has more.").response()
