"""An engine for models that llama.cpp can't load: transformers, one request at a time.

`python -m jetson_ft.serve.transformers_process` speaks the part of llama.cpp's HTTP API that
`app.Api` uses. Standard input is a JSON object: `name` and `root` as in `target.resolve_target`,
`context` (most tokens of prompt and reply together) and `api_key`. Its first line on standard
output is one: `port` and `context`, or an error as `UserError.as_json`. It ends with its parent.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jetson_ft.child_process import PARENT_PROCESS, end_with_parent, python_module
from jetson_ft.errors import Message, UserError, _
from jetson_ft.runs.processes import WORKER_ENVIRONMENT, explain_error, silence_libraries

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from jetson_ft.chat.session import ChatSession
    from jetson_ft.inference.generate import Reply

_HOST = "127.0.0.1"


class TransformersServer:
    """The process, seen from its parent; an `engine.EngineProcess`.

    The thread that starts it must live as long as it does (`child_process.end_with_parent`).
    """

    def __init__(self, name: str, root: Path, context: int) -> None:
        self.api_key = secrets.token_urlsafe(24)
        self.context = context  # once it is started: not above the model's own limit
        self._request = {
            "name": name, "root": str(root), "context": context, "api_key": self.api_key,
        }  # fmt: skip
        self._port = 0
        self._process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        """The address, without a slash at its end."""
        return f"http://{_HOST}:{self._port}"

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def __enter__(self) -> TransformersServer:
        self._process = subprocess.Popen(
            python_module("jetson_ft.serve.transformers_process"),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8",
            env={**WORKER_ENVIRONMENT, **os.environ, PARENT_PROCESS: str(os.getpid())},
        )  # fmt: skip
        assert self._process.stdin and self._process.stdout
        with suppress(BrokenPipeError):  # it has ended
            # Not among the arguments: every user of the machine can read those.
            self._process.stdin.write(json.dumps(self._request))
            self._process.stdin.close()
        line = self._process.stdout.readline()
        try:
            message = json.loads(line)
        except ValueError as error:  # nothing, or a part of a line
            self.close()
            what = _("The model's process ended; it may have run out of memory.")
            raise UserError(what) from error
        if "port" not in message:
            self.close()
            raise UserError.from_json(message)
        self._port, self.context = message["port"], message["context"]
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class _Refused(Exception):
    """A request that can't be answered; `body` is what llama.cpp would answer."""

    def __init__(self, message: str, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.body = {"error": {"code": 400, "message": message, "type": kind}}


class _Replies:
    """One model in memory, one reply at a time."""

    def __init__(self, chat: ChatSession, api_key: str) -> None:
        self.chat, self.api_key = chat, api_key
        self._lock = asyncio.Lock()

    async def answer(self, request: Request) -> Response:
        """Answer a request for replies; a disconnect ends the reply after its current token."""
        from starlette.responses import JSONResponse, StreamingResponse

        from jetson_ft.serve.app import until_disconnect

        if request.headers.get("authorization") != f"Bearer {self.api_key}":
            return JSONResponse({"error": {"code": 401, "message": "wrong key"}}, 401)
        fields = await request.json()
        try:
            prompt = await asyncio.to_thread(self._encode, fields)
        except (_Refused, UserError) as error:
            body = error.body if isinstance(error, _Refused) else _Refused(str(error)).body
            return JSONResponse(body, 400)
        events = self._events(fields, prompt, is_chat="messages" in fields)
        if fields["stream"]:
            lines = (f"data: {json.dumps(event)}\n\n" async for event in events)
            return StreamingResponse(_finished(lines), media_type="text/event-stream")
        return JSONResponse(await until_disconnect(request, _whole(events)))

    def _encode(self, fields: dict[str, Any]) -> list[int]:
        """Return the ids of the prompt."""
        from jetson_ft.data.chat_template import encode_prompt

        for name, neutral in (("presence_penalty", 0.0), ("frequency_penalty", 0.0)):
            if fields[name] != neutral:
                raise _Refused(f"{name} is not supported for this model.")
        if "logprobs" in fields:
            raise _Refused("logprobs is not supported for this model.")
        if "messages" in fields:
            ids = encode_prompt(self.chat.tokenizer, fields["messages"])
        else:
            ids = list(self.chat.tokenizer(fields["prompt"])["input_ids"])
        if len(ids) >= self.chat.context_length:
            message = f"The prompt has {len(ids)} tokens, the context {self.chat.context_length}."
            raise _Refused(message, "exceed_context_size_error")
        return ids

    async def _events(
        self, fields: dict[str, Any], prompt: list[int], is_chat: bool
    ) -> AsyncIterator[dict[str, Any]]:
        """Yield the chunks of all choices, one after the other."""
        from jetson_ft.inference.generate import Reply

        kind = "chat.completion.chunk" if is_chat else "text_completion"
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": kind,
                "created": int(time.time())}  # fmt: skip
        written = 0
        async with self._lock:
            for index in range(fields["n"]):
                if is_chat:
                    yield head | {"choices": [_choice(index, None, role="assistant")]}
                async with aclosing(self._deltas(fields, prompt, index)) as deltas:
                    async for delta in deltas:
                        if isinstance(delta, Reply):
                            written += delta.tokens
                            choice = _choice(
                                index, "", is_chat, "stop" if delta.ended else "length"
                            )
                        else:
                            choice = _choice(index, delta, is_chat)
                        yield head | {"choices": [choice]}
        usage = {"prompt_tokens": len(prompt), "completion_tokens": written,
                 "total_tokens": len(prompt) + written}  # fmt: skip
        if not fields["stream"] or "stream_options" in fields:
            yield head | {"choices": [], "usage": usage}

    async def _deltas(
        self, fields: dict[str, Any], prompt: list[int], index: int
    ) -> AsyncGenerator[str | Reply, None]:
        """Yield one reply's text in deltas, without a stop text and what follows it; then itself.

        It returns, also when it is cancelled, after the model has computed its last token: only
        then another reply can begin.
        """
        from jetson_ft.adapter import adapter_context
        from jetson_ft.data.chat_template import end_ids
        from jetson_ft.inference.generate import Reply, Sampling, stream_reply

        chat, seed = self.chat, fields.get("seed")
        limit = min(fields["max_tokens"], chat.context_length - len(prompt))
        sampling = Sampling(
            limit, fields["temperature"], fields["top_k"], fields["top_p"],
            fields["repeat_penalty"], None if seed is None else seed + index,
        )  # fmt: skip
        wants_adapter = any(lora["scale"] for lora in fields.get("lora", []))
        stop = threading.Event()
        with adapter_context(chat, wants_adapter):
            ends = end_ids(chat.tokenizer, chat.model)
            stream = stream_reply(chat.model, chat.tokenizer, prompt, ends, sampling, stop.is_set)

            def advance() -> str | Reply:
                try:
                    return next(stream)
                except StopIteration as end:  # which no future can hold
                    return cast("Reply", end.value)

            held, is_cut = "", False

            async def end() -> None:
                await asyncio.wait([step])
                await asyncio.to_thread(stream.close)

            try:
                while True:
                    step = asyncio.ensure_future(asyncio.to_thread(advance))
                    delta = await asyncio.shield(step)
                    if isinstance(delta, Reply):
                        break
                    if is_cut:
                        continue
                    held += delta
                    places = [held.find(text) for text in fields["stop"] if text in held]
                    if places:
                        held, is_cut = held[: min(places)], True
                        stop.set()
                        continue
                    kept = max((_overlap(held, text) for text in fields["stop"]), default=0)
                    if ready := held[: len(held) - kept]:
                        yield ready
                    held = held[len(held) - kept :]
                if held:
                    yield held
                yield replace(delta, ended=delta.ended or is_cut)
            finally:
                stop.set()
                ending = asyncio.ensure_future(end())
                while not ending.done():  # starlette cancels a task again and again
                    with suppress(asyncio.CancelledError):
                        await asyncio.wait([ending])


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the text's end may be the beginning of the stop text."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)


def _choice(
    index: int, text: str | None, is_chat: bool = True, reason: str | None = None, **delta: Any
) -> dict[str, Any]:
    if not is_chat:
        return {"index": index, "text": text, "finish_reason": reason, "logprobs": None}
    content = {"content": text} if text or delta else {}
    return {"index": index, "delta": {**delta, **content}, "finish_reason": reason}


async def _finished(lines: AsyncIterator[str]) -> AsyncIterator[str]:
    async for line in lines:
        yield line
    yield "data: [DONE]\n\n"


async def _whole(events: AsyncIterator[dict[str, Any]]) -> dict[str, Any]:
    """Return the chunks as one answer."""
    answer: dict[str, Any] = {}
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    async for event in events:
        answer |= event
        for choice in event["choices"]:
            text = choice.get("text") or choice.get("delta", {}).get("content") or ""
            texts[choice["index"]] = texts.get(choice["index"], "") + text
            reasons[choice["index"]] = choice["finish_reason"]
    is_chat = answer["object"] == "chat.completion.chunk"
    answer["object"] = "chat.completion" if is_chat else "text_completion"
    answer["choices"] = [
        {"index": index, "finish_reason": reasons[index], "logprobs": None}
        | ({"message": {"role": "assistant", "content": text}} if is_chat else {"text": text})
        for index, text in texts.items()
    ]
    return answer


def main() -> None:
    """Load the model and answer until the process is ended."""
    end_with_parent()
    settings = json.load(sys.stdin)
    # Libraries may print to standard output: send that to standard error.
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    silence_libraries()
    try:
        import uvicorn
        from starlette.applications import Starlette
        from starlette.routing import Route

        from jetson_ft.chat import target

        chat = target.open_session(target.resolve_target(settings["name"], Path(settings["root"])))
        chat.context_length = min(chat.context_length, settings["context"])
    except Exception as error:
        fix = Message(_("Report this error."))
        print(json.dumps(explain_error(error, fix).as_json(), default=str), file=output, flush=True)
        sys.exit(1)
    replies = _Replies(chat, settings["api_key"])
    paths = ("/v1/chat/completions", "/v1/completions")
    app = Starlette(routes=[Route(path, replies.answer, methods=["POST"]) for path in paths])
    listener = socket.create_server((_HOST, 0))
    ready = {"port": listener.getsockname()[1], "context": chat.context_length}
    print(json.dumps(ready), file=output, flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run([listener])


if __name__ == "__main__":
    main()
