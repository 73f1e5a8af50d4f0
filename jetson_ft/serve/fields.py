"""The fields that a request may have, and what they become for the engine.

The engine, llama.cpp's server, has fields that read and write files and that choose its memory, so
that a request's own object never reaches it: only what is declared here does.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from starlette.responses import JSONResponse

from jetson_ft.inference.generate import Sampling

MAX_CHOICES = 4  # `n`
_STOP_TEXTS, _STOP_CHARACTERS = 16, 256
_MESSAGES = 1024

_Stop = Annotated[str, StringConstraints(min_length=1, max_length=_STOP_CHARACTERS)]


class RequestError(Exception):
    """A request that is refused.

    Args:
        status: of HTTP.
        message: English, for the client.
        param: the field concerned.
        code: a word for programs, as OpenAI's API has them.
        retry_after: seconds after which the same request can succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        """Return the refusal in the shape of OpenAI's API."""
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


class _Fields(BaseModel):
    # Strict: "1" is no number and 1 no truth value, as the official client sends none.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Fields):
    """How a reply is streamed."""

    include_usage: bool = False
    include_obfuscation: bool = False  # padding against guesses at encrypted replies' lengths


class TextPart(_Fields):
    """A part of a message's content; images and sounds are refused by their type."""

    type: Literal["text"]
    text: str


class ChatTurn(BaseModel):
    """A message; what else clients send along with a reply of ours is left out."""

    model_config = ConfigDict(extra="ignore", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]


class GenerateFields(_Fields):
    """What chat and plain completions have in common; null is the same as absent."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=10**6)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=0, le=2**32 - 2)  # of llama.cpp: 2**32 - 1 is a random one
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=_STOP_TEXTS)] | None = None
    user: str | None = None  # ignored, as are the next two
    metadata: dict[str, str] | None = None
    store: bool | None = None

    @property
    def choices(self) -> int:
        """The number of replies."""
        return self.n or 1

    @property
    def alternatives(self) -> int:
        """The most likely tokens to list at each place, where probabilities are wanted."""
        return 0

    def _max_tokens(self) -> int | None:
        return self.max_tokens

    def engine_fields(self, context: int) -> dict[str, Any]:
        """Return the engine's fields; what is absent has the chat's defaults.

        Args:
            context: most tokens of prompt and reply together.

        Raises:
            RequestError: more tokens are wanted than the model can write.
        """
        max_tokens = self._max_tokens() or context
        if max_tokens > context:
            message = f"max_tokens is {max_tokens}; this server's limit is {context}."
            raise RequestError(400, message, "max_tokens")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        fields: dict[str, Any] = {
            "stream": bool(self.stream),
            "max_tokens": max_tokens,
            "n": self.choices,
            "stop": stop,
            "min_p": 0.0,
            "repeat_last_n": context,  # of the whole text, as transformers counts
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
        }
        if self.stream_options and self.stream_options.include_usage and self.stream:
            fields["stream_options"] = {"include_usage": True}
        for name, engine_name in (
            ("temperature", "temperature"), ("top_p", "top_p"), ("top_k", "top_k"),
            ("repetition_penalty", "repeat_penalty"),
        ):  # fmt: skip
            value = getattr(self, name)
            fields[engine_name] = getattr(Sampling, name) if value is None else value
        if self.seed is not None:
            fields["seed"] = self.seed
        return fields


class ChatFields(GenerateFields):
    """The body of /v1/chat/completions."""

    messages: list[ChatTurn] = Field(min_length=1, max_length=_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def alternatives(self) -> int:
        """As `GenerateFields.alternatives`."""
        return self.top_logprobs or 0

    def _max_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def engine_fields(self, context: int) -> dict[str, Any]:
        """Return the engine's fields with the messages as plain texts."""
        messages = []
        for turn in self.messages:
            is_text = isinstance(turn.content, str)
            text = turn.content if is_text else "".join(part.text for part in turn.content)  # type: ignore[union-attr]
            role = "system" if turn.role == "developer" else turn.role
            messages.append({"role": role, "content": text})
        fields = super().engine_fields(context) | {"messages": messages}
        if self.logprobs:
            # llama.cpp lists no probabilities at all for 0.
            fields |= {"logprobs": True, "top_logprobs": max(1, self.alternatives)}
        return fields


class CompletionFields(GenerateFields):
    """The body of /v1/completions; one prompt a request."""

    prompt: str
    logprobs: int | None = Field(None, ge=0, le=5)

    @property
    def alternatives(self) -> int:
        """As `GenerateFields.alternatives`."""
        return self.logprobs or 0

    def engine_fields(self, context: int) -> dict[str, Any]:
        """Return the engine's fields with the prompt."""
        fields = super().engine_fields(context) | {"prompt": self.prompt}
        if self.logprobs is not None:
            fields["logprobs"] = max(1, self.alternatives)
        return fields


def parse_fields(kind: type[GenerateFields], body: bytes) -> GenerateFields:
    """Return the fields of a request's JSON.

    Raises:
        RequestError: it is no JSON object, or has an unknown field or a value out of its range.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        # Of a union's members the place has their types: text stop words are no fields.
        place = [str(part) for part in first["loc"] if str(part).replace("_", "").isalnum()]
        param = ".".join(place) or None
        if first["type"] == "extra_forbidden":
            message = f"Unknown field: {param}."
        elif param is None:
            message = f"The body is not a JSON object: {first['msg']}."
        else:
            message = f"{param}: {first['msg']}."
        raise RequestError(400, message, param) from error
