"""A conversation with a GGUF file, which llama.cpp's server loads in a child process."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from jetson_ft.chat import memory_guard
from jetson_ft.chat.session import context_full, prompt_messages
from jetson_ft.data.formats import ChatMessage
from jetson_ft.export import gguf
from jetson_ft.export.llama import LlamaServer, find_program
from jetson_ft.hardware import detect
from jetson_ft.inference.generate import Reply, Sampling

_CONTEXT = 4096  # most tokens of prompt and reply together; memory is reserved for them
_PROCESS_BYTES = 400 * 2**20  # of llama.cpp's server, without weights and KV cache


@dataclass
class GgufSession:
    """As much of `ChatSession` as a chat's process uses. Call `close` to end llama.cpp."""

    server: LlamaServer = field(repr=False)
    context_length: int
    system: str = ""
    examples: list[ChatMessage] = field(default_factory=list)
    turns: list[ChatMessage] = field(default_factory=list)
    has_adapter: bool = False

    def reply(
        self,
        text: str,
        sampling: Sampling,
        use_adapter: bool = True,
        should_stop: Callable[[], bool] = lambda: False,
        prefill: str = "",
    ) -> Generator[str, None, Reply]:
        """Yield the answer to `text` in deltas; see `ChatSession.reply`."""
        messages = {"messages": prompt_messages(self, text)}
        prompt = self.server.request("/apply-template", messages)["prompt"] + prefill
        count = len(self.server.request("/tokenize", {"content": prompt})["tokens"])
        left = self.context_length - count
        if left < 1:
            raise context_full(count, self.context_length)
        body = {
            "prompt": prompt, "stream": True, "n_predict": min(sampling.max_new_tokens, left),
            "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p,
            "repeat_penalty": sampling.repetition_penalty, "repeat_last_n": self.context_length,
            "min_p": 0.0, "seed": -1 if sampling.seed is None else sampling.seed % 2**32,
        }  # fmt: skip
        written, tokens, ended = "", 0, False
        with closing(self.server.stream("/completion", body)) as events:
            for event in events:
                if delta := event["content"]:
                    written += delta
                    tokens += 1
                    yield delta
                if event["stop"]:
                    ended = event["stop_type"] != "limit"
                    tokens = event["tokens_predicted"] - ended  # without the end token
                elif should_stop():
                    break
        return Reply(written, ended, tokens)

    def close(self) -> None:
        """End llama.cpp, which frees the model's memory."""
        self.server.close()


def open_gguf(file: Path) -> GgufSession:
    """Start llama.cpp with a GGUF file, and return a chat with it.

    Raises:
        UserError: llama.cpp is not installed, can't load the file, or memory is short.
    """
    find_program()
    context, kv_bytes = gguf.read_limits(file)
    context = min(context, _CONTEXT)
    needed = file.stat().st_size + kv_bytes * context + _PROCESS_BYTES
    memory_guard.require_free(needed, detect.detect_cpu())
    server = LlamaServer(file, n_ctx=context)
    server.__enter__()
    return GgufSession(server, context)
