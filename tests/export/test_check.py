"""The check of an export finds what is wrong with it: texts, tokens, ends, weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_exports import save_tiny_model, smollm_tokenizer

from jetson_ft.cli.export import check_phrase
from jetson_ft.data.chat_template import encode
from jetson_ft.export import check, gguf
from jetson_ft.export.check import Reference, check_file, measure_reference
from jetson_ft.export.quantize import quantize_file
from jetson_ft.models import loading
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.models.loading import WeightFormat

# A turn ends with a token that llama.cpp doesn't know as an end; the date is another each day.
_TEMPLATE = (
    "{{ strftime_now('%d %B %Y') }}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<repo_name>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_ROWS = [
    {"messages": [{"role": "user", "content": f"Question {number}? 你好"},
                  {"role": "assistant", "content": f"The answer is {number}, 好的。" * 20}]}
    for number in range(3)
]  # fmt: skip


def _load(folder: Path) -> Any:
    return loading.load_model(BaseModelFiles("tiny", folder), WeightFormat("fp32"), "cpu")


def _reference(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]] = _ROWS) -> Reference:
    encoded = [encode(tokenizer, row["messages"]) for row in rows]
    return measure_reference(
        model, tokenizer, rows,
        [{"input_ids": row.ids, "segments": row.segments, "answer_characters": row.characters}
         for row in encoded],
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Reference]:
    """A model, its f16 file, and what transformers makes of the rows."""
    folder = tmp_path_factory.mktemp("check")
    model = save_tiny_model(folder / "model", "llama", _TEMPLATE)
    gguf.convert_model(model, folder / "f16.gguf", "f16")
    tokenizer = loading.load_tokenizer(BaseModelFiles("tiny", model))
    return model, folder / "f16.gguf", _reference(_load(model), tokenizer)


@pytest.mark.slow(minutes=0.5)
def test_an_exact_file_passes_and_others_do_not(
    made: tuple[Path, Path, Reference], tmp_path: Path
) -> None:
    _model, file, reference = made
    steps: list[tuple[int, int]] = []
    result = check_file(
        reference, file, "f16", threads=1,
        on_progress=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    assert result["passed"], result
    assert (result["prompts"], result["same_tokens"], result["unknown_end_tokens"]) == (3, 3, [])
    assert result["same_text"] + result["near_ties"] == 3
    bits = result["bits_per_character"]
    assert bits["export"] == pytest.approx(bits["adapter"], rel=1e-3)
    assert steps[-1] == (6, 6)

    quantize_file(file, tmp_path / "q4.gguf", "q4_0")
    assert not check_file(reference, tmp_path / "q4.gguf", "f16", threads=1)["passed"]
    # Each part of the check by itself.
    ends = check_file(replace(reference, end_ids=[5, 9000]), file, "f16", threads=1)
    assert not ends["passed"] and 9000 in ends["unknown_end_tokens"]
    first = reference.replies[0]
    other = replace(first, prompt=first.prompt[1:])
    tokens = check_file(replace(reference, replies=[other]), file, "f16", threads=1)
    assert not tokens["passed"] and tokens["same_tokens"] == 0
    other = replace(first, text="another", ids=[7, *first.ids[1:]], gaps=[5.0] * len(first.gaps))
    texts = check_file(replace(reference, replies=[other]), file, "f16", threads=1)
    assert not texts["passed"] and texts["same_text"] == texts["near_ties"] == 0
    tie = replace(other, gaps=[0.01, *first.gaps[1:]])
    ties = check_file(replace(reference, replies=[tie]), file, "f16", threads=1)
    assert ties["passed"] and ties["near_ties"] == 1
    shifted = replace(reference, bits_per_char=reference.bits_per_char * 1.02)
    assert not check_file(shifted, file, "f16", threads=1)["passed"]


@pytest.mark.slow(minutes=0.2)
def test_the_reader_of_texts_is_named(
    made: tuple[Path, Path, Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    _model, file, reference = made
    reference = replace(reference, replies=[])
    result = check_file(reference, file, "f16", threads=1)
    assert result["reader"].startswith("llama.cpp in xllamacpp ") and result["prompts"] == 0
    phrase = check_phrase(result)
    assert phrase.startswith("passed, read by ") and phrase.endswith(", no text compared")
    monkeypatch.setattr(check, "find_program", lambda: "/opt/llama/llama-server")
    reader = check_file(reference, file, "f16", threads=1)["reader"]
    assert re.fullmatch(r"llama-server b\S+ \(texts\), llama.cpp in xllamacpp .*", reader)


@pytest.mark.slow(minutes=0.3)
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapters_file_scales_as_peft(
    made: tuple[Path, Path, Reference], tmp_path: Path, rslora: bool
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    model, file, plain = made
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules="all-linear", use_rslora=rslora, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(_load(model), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    gguf.convert_adapter(model, tmp_path / "adapter", tmp_path / "lora.gguf")
    tokenizer = loading.load_tokenizer(BaseModelFiles("tiny", model))
    reference = _reference(adapted.eval(), tokenizer)
    assert abs(reference.bits_per_char - plain.bits_per_char) > 0.02
    result = check_file(reference, file, "lora", tmp_path / "lora.gguf", threads=1)
    assert result["passed"], result


@pytest.mark.slow(minutes=0.4)
@pytest.mark.parametrize("kind", ["phi", "qwen3", "gemma3_text", "smollm3"])
def test_families_are_read_by_llama_cpp(tmp_path: Path, kind: str) -> None:
    model = save_tiny_model(tmp_path / "model", kind)
    gguf.convert_model(model, tmp_path / "f16.gguf", "f16")
    tokenizer = loading.load_tokenizer(BaseModelFiles("tiny", model))
    result = check_file(
        _reference(_load(model), tokenizer), tmp_path / "f16.gguf", "f16", threads=1
    )
    assert result["passed"], result


def test_prompts_are_those_that_a_client_can_send() -> None:
    rows: list[dict[str, Any]] = [
        _ROWS[0],
        {"messages": [{"role": "text", "content": "A document."}]},
        {**_ROWS[1], "tools": '[{"name": "f", "parameters": {}}]'},
        {"messages": [{"role": "user", "content": "<|im_end|>"},
                      {"role": "assistant", "content": "b"}]},
        *([_ROWS[2]] * 200),
    ]  # fmt: skip
    prompts = check._choose_prompts(smollm_tokenizer(), rows[:4])
    assert [messages[-1]["content"] for messages, _ids in prompts] == ["Question 0? 你好"]
    assert len(check._choose_prompts(smollm_tokenizer(), rows)) == check.PROMPTS
