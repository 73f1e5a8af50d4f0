"""What llama.cpp makes of a GGUF file, measured as a model in transformers is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_exports import save_tiny_model, smollm_tokenizer
from tiny_gguf import write_lora

from jetson_ft.data.chat_template import ANSWER, encode, encode_prompt
from jetson_ft.errors import UserError
from jetson_ft.export import gguf
from jetson_ft.export.llama_reader import LlamaReader, LlamaScorer
from jetson_ft.inference.reader import ModelReader
from jetson_ft.models import loading
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.models.loading import WeightFormat
from jetson_ft.models.positions import max_positions

_ROWS = [
    [{"role": "user", "content": f"Question {number}?"},
     {"role": "assistant", "content": "The answer, 好的。" * (number + 1)}]
    for number in range(4)
]  # fmt: skip


def ignore(*_call: Any) -> None:
    """Show no progress."""


@pytest.mark.slow(minutes=0.3)
@pytest.mark.parametrize("kind", ["phi", "gpt2"])
def test_both_readers_score_and_reply_alike(tmp_path: Path, kind: str) -> None:
    folder = save_tiny_model(tmp_path / "model", kind, n_positions=96)
    config = json.loads((folder / "config.json").read_text())
    if kind == "gpt2":  # llama.cpp's converter needs the key, which the real model has
        config["n_ctx"] = config["n_positions"]
        (folder / "config.json").write_text(json.dumps(config))
    gguf.convert_model(folder, tmp_path / "f16.gguf", "f16")
    tokenizer = smollm_tokenizer()
    model = loading.load_model(BaseModelFiles("tiny", folder), WeightFormat("fp32"), "cpu")
    exact, ours = ModelReader(model, tokenizer, 0), LlamaReader(tmp_path / "f16.gguf", tokenizer)
    assert ours.vocabulary == len(tokenizer)
    assert ours.max_tokens == max_positions(model.config)
    encoded = [encode(tokenizer, row) for row in _ROWS]
    rows = [{"input_ids": row.ids, "segments": row.segments} for row in encoded]
    rows.append({"input_ids": rows[0]["input_ids"], "segments": [0] * len(encoded[0].ids)})
    rows.insert(0, {"input_ids": encoded[0].ids, "segments": [ANSWER] * len(encoded[0].ids)})
    calls: list[Any] = []
    nats, tokens = ours.score(rows, lambda *call: calls.append(call))
    expected, expected_tokens = exact.score(rows, ignore)
    assert tokens == expected_tokens and tokens[-1] == nats[-1] == 0
    assert nats == pytest.approx(expected, rel=2e-3)
    lengths = [len(row["input_ids"]) for row in rows]
    assert calls == [(sum(lengths[:done]), sum(lengths)) for done in range(7)]
    prompts = [encode_prompt(tokenizer, row[:1]) for row in _ROWS]
    replies, expected_replies = ours.reply(prompts, 90, ignore), exact.reply(prompts, 90, ignore)
    for reply, like, prompt in zip(replies, expected_replies, prompts, strict=True):
        assert reply.text[:4] == like.text[:4]
        most = 96 - len(prompt) if kind == "gpt2" else 90  # the table of positions ends
        assert reply.tokens == most or reply.ended


def test_a_reply_ends_where_llama_cpp_ends_it(tmp_path: Path) -> None:
    """The end token is no part of the reply."""
    from jetson_ft.models import embedded

    tokenizer = smollm_tokenizer()
    reader = LlamaReader(embedded._packaged_gguf(), tokenizer)
    assert (reader.vocabulary, reader.max_tokens) == (49152, 8192)
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": "Say hi."}])
    calls: list[Any] = []
    (whole, cut) = (
        reader.reply([prompt], most, lambda *call: calls.append(call))[0] for most in (60, 3)
    )
    assert whole.ended and not cut.ended and cut.tokens == 3 and whole.text.startswith(cut.text)
    assert whole.tokens == len(tokenizer(whole.text)["input_ids"])
    assert calls == [(0, 1), (1, 1)] * 2


@pytest.mark.parametrize("content", [b"GGUF", b"", None])
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "m.gguf"
    if content is None:
        write_lora(path, 0)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"no GGUF file of a language model(.|\n)*whole model"):
        LlamaReader(path, smollm_tokenizer())


def test_a_damaged_file_ends_the_scorer_with_a_message(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with (
        pytest.raises(UserError, match="can't score"),
        LlamaScorer(tmp_path / "m.gguf", None, 10, 1),
    ):
        pass
