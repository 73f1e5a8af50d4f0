"""A GGUF file as llama.cpp reads it: scores of rows, and greedy replies."""

from __future__ import annotations

import collections
import json
import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jetson_ft.child_process import PARENT_PROCESS, python_module
from jetson_ft.data.chat_template import ANSWER
from jetson_ft.errors import UserError, _
from jetson_ft.export.llama import LlamaServer, default_threads, find_program
from jetson_ft.inference.generate import Reply

if TYPE_CHECKING:
    from jetson_ft.inference.reader import Progress

_SPARE_TOKENS = 8  # positions that the server may need beside a prompt and its reply


def reader_name() -> str:
    """Return the name and version of the program that scores rows."""
    return f"llama.cpp in xllamacpp {version('xllamacpp')}"


class LlamaReader:
    """An `inference.reader.Reader` by llama.cpp, in a child process for each call.

    Args:
        file: GGUF file of a whole model.
        tokenizer: of the model, for the text of replies.

    Raises:
        UserError: the file is damaged, or has no language model.
    """

    def __init__(self, file: Path, tokenizer: Any) -> None:
        from gguf import GGUFReader

        self._file, self._tokenizer = file, tokenizer
        try:
            content = GGUFReader(file)
            shapes = {tensor.name: tensor.shape for tensor in content.tensors}
            self.vocabulary = int(shapes["token_embd.weight"][1])  # tokens
            architecture = content.fields["general.architecture"].contents()
            # llama.cpp's server reads no more, also where positions are computed.
            self.max_tokens = int(content.fields[f"{architecture}.context_length"].contents())
        except (ValueError, KeyError, IndexError, OSError) as error:
            raise UserError(
                _("This is no GGUF file of a language model, or it is damaged."), str(file),
                _("Name the file of a whole model; an adapter is measured as a part of its run."),
            ) from error  # fmt: skip
        program = find_program()
        self.name = reader_name() + (f", replies by {Path(program).name}" if program else "")

    def score(
        self, rows: Sequence[dict[str, Any]], progress: Progress
    ) -> tuple[list[float], list[int]]:
        """Return the nats and the number of the answer tokens of each row."""
        lengths = [len(row["input_ids"]) for row in rows]
        done, scores = 0, []
        with LlamaScorer(self._file, None, max(lengths, default=1), None) as scorer:
            for row, length in zip(rows, lengths, strict=True):
                progress(done, sum(lengths))
                scores.append(scorer.nats(row))
                done += length
        progress(done, sum(lengths))
        return [nats for nats, _tokens in scores], [tokens for _nats, tokens in scores]

    def reply(
        self, prompts: Sequence[list[int]], max_new_tokens: int, progress: Progress
    ) -> list[Reply]:
        """Return the greedy reply to each prompt; it ends where llama.cpp ends it."""
        longest = max(map(len, prompts), default=0) + max_new_tokens
        replies: list[Reply] = []
        with LlamaServer(self._file, n_ctx=longest + _SPARE_TOKENS) as server:
            for prompt in prompts:
                progress(len(replies), len(prompts))
                answer = server.request("/completion", {
                    "prompt": prompt, "n_predict": max_new_tokens,
                    "temperature": 0.0, "repeat_penalty": 1.0, "cache_prompt": False,
                    "return_tokens": True,
                })  # fmt: skip
                ended = answer["stop_type"] == "eos"
                ids = answer["tokens"][:-1] if ended else answer["tokens"]
                text = self._tokenizer.decode(ids, skip_special_tokens=True)
                replies.append(Reply(text.rstrip("\ufffd").strip(), ended, len(ids)))
        progress(len(replies), len(prompts))
        return replies


class LlamaScorer:
    """llama.cpp in a child process (`score_process`) that scores token ids; a context manager."""

    def __init__(self, model: Path, lora: Path | None, n_ctx: int, threads: int | None) -> None:
        self._settings: dict[str, Any] = {
            "model": str(model.resolve()), "lora": str(lora.resolve()) if lora else "",
            "n_ctx": n_ctx, "threads": threads or default_threads(),
        }  # fmt: skip
        self._log: collections.deque[str] = collections.deque(maxlen=100)

    def __enter__(self) -> LlamaScorer:
        self._process = subprocess.Popen(
            python_module("jetson_ft.export.score_process"),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, errors="replace", bufsize=1,
            env={**os.environ, PARENT_PROCESS: str(os.getpid())},
        )  # fmt: skip
        self._log_reader = threading.Thread(target=self._read_log, daemon=True)
        self._log_reader.start()
        self._request(self._settings)
        return self

    def __exit__(self, *_error: object) -> None:
        self._process.kill()
        self._process.wait()

    def nats(self, row: Mapping[str, Any]) -> tuple[float, int]:
        """Return the nats of the row's answer tokens, given the tokens before each; their number.

        A row's first token has none before it, and doesn't count.
        """
        places = [
            place for place, role in enumerate(row["segments"]) if role == ANSWER and place > 0
        ]
        ids = [int(token) for token in row["input_ids"]]
        nats = self._request({"ids": ids, "places": places})["nats"] if places else 0.0
        return float(nats), len(places)

    def are_ends(self, tokens: Sequence[int]) -> list[bool]:
        """Return whether llama.cpp ends a reply at each of these tokens."""
        return list(self._request({"tokens": list(tokens)})["ends"])

    def _request(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = self._process.wait()
            self._log_reader.join()
            lines = [line for line in self._log if line.strip()][-2:]
            raise UserError(
                _("llama.cpp can't score the rows (exit code {code}): {lines}"),
                self._settings["model"],
                _("End other programs if memory is short. `--no-check` exports without this."),
                code=code, lines=" / ".join(lines),
            )  # fmt: skip
        return dict(json.loads(answer))

    def _read_log(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            self._log.append(line.rstrip()[:500])
