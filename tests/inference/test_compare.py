"""Base against adapter on the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from jetson_ft.inference.compare import (
    _cut_turns,
    _select_samples,
    adapter_sides,
    compare_adapter,
)
from jetson_ft.inference.generate import Reply
from jetson_ft.inference.probes import load_probes
from jetson_ft.inference.reader import ModelReader
from jetson_ft.kernels.packing import make_packs

METRICS = {
    "loss", "bits_per_char", "chinese_share", "stop_rate", "repetition", "rouge_l", "chrf", "bleu",
    "distinct_1", "distinct_2", "samples",
}  # fmt: skip
ROWS = [
    [{"role": "user", "content": f"第{n}题"}, {"role": "assistant", "content": f"等于{n}。" * n}]
    for n in range(1, 5)
]


@pytest.fixture(scope="module")
def compared(tiny_phi: Path, phi: Any) -> tuple[dict[str, Any], list[Any], Any, list[Any]]:
    """(result, calls of progress, the model, the rows as tokens)."""
    import torch

    from jetson_ft import adapter
    from jetson_ft.data.chat_template import encode
    from jetson_ft.models import loading
    from jetson_ft.models.files import BaseModelFiles
    from jetson_ft.recipe import LoraRecipe

    base = loading.load_model(BaseModelFiles("tiny", tiny_phi), loading.WeightFormat("fp32"), "cpu")
    model = adapter.attach_adapter(base, LoraRecipe(rank=2), 0)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3)
    encoded = [encode(phi.tokenizer, row) for row in ROWS]
    pieces = [
        {"row": n, "input_ids": e.ids, "segments": e.segments, "answer_characters": e.characters}
        for n, e in enumerate(encoded)
    ]
    calls: list[Any] = []
    conversations = [{"row": n, "messages": row} for n, row in enumerate(ROWS)]
    result = compare_adapter(
        adapter_sides(ModelReader(model.eval(), phi.tokenizer, 200)),
        phi.tokenizer, conversations, pieces, 10, 2, lambda *call: calls.append(call), 200,
    )  # fmt: skip
    return result, calls, model, pieces


def test_document_is_continued_from_its_beginning(compared: Any, phi: Any) -> None:
    *_, model, pieces = compared
    documents = [{"row": 0, "messages": [{"role": "text", "content": "abcdefgh"}]}]
    conversations = [*documents, {"row": 1, "messages": ROWS[0]}]
    sides = adapter_sides(ModelReader(model, phi.tokenizer, 200))
    result = compare_adapter(
        sides, phi.tokenizer, conversations, pieces[:2], 2, 2, lambda *_: None, max_length=64
    )["eval"]
    assert (result["rows"], result["documents"]) == (2, 1)
    sample, other = result["after"]["samples"]
    assert sample["messages"] == [{"role": "text", "content": "ab"}]
    assert sample["reference"] == "cd"
    assert other["messages"] == ROWS[0][:1]


def test_result_has_all_metrics_for_both_sides(compared: Any) -> None:
    result, *_ = compared
    assert set(result) == {"eval", "generation", "rows"}
    assert result["eval"]["rows"] == 4
    for side in ("before", "after"):
        assert set(result["eval"][side]) == METRICS
    assert result["generation"]["method"] == "greedy"
    assert result["generation"]["max_new_tokens"] == 10


def test_before_equals_the_base_without_adapter(compared: Any, phi: Any) -> None:
    import torch

    result, *_ = compared
    nats, count, characters = 0.0, 0, 0
    for row in ROWS:
        prompt = phi.prompt(row[0]["content"])
        answer = phi.tokenizer(row[1]["content"], add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = phi.model(torch.tensor([prompt + answer])).logits[0].double()
        rates = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        nats -= float(rates[range(len(answer)), answer].sum())
        count, characters = count + len(answer), characters + len(row[1]["content"])
    before = result["eval"]["before"]
    assert before["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert before["bits_per_char"] == pytest.approx(
        nats / 0.6931471805599453 / characters, rel=1e-5
    )


def test_after_differs_and_leaves_the_adapter_enabled(compared: Any) -> None:
    result, _, model, _ = compared
    before, after = result["eval"]["before"], result["eval"]["after"]
    assert abs(before["loss"] - after["loss"]) > 1e-3
    assert before["samples"][0]["reply"] != after["samples"][0]["reply"]
    assert not model.base_model.model.model.layers[0].self_attn.q_proj.disable_adapters


def test_samples_have_the_same_rows_on_both_sides(compared: Any) -> None:
    result, *_ = compared
    for before, after in zip(
        result["eval"]["before"]["samples"], result["eval"]["after"]["samples"], strict=True
    ):
        assert before["row"] == after["row"]
        assert before["messages"] == ROWS[before["row"]][:1] == after["messages"]
        assert before["reference"] == ROWS[before["row"]][1]["content"]


def test_progress_is_called_for_both_sides(compared: Any) -> None:
    _, calls, _, pieces = compared
    first, second = (pack.tokens for pack in make_packs(pieces, 200))
    total, probes = first + second, len(load_probes())
    measured = [("tokens", 0, total), ("tokens", first, total), ("tokens", total, total)]
    one_side = [*measured, ("replies", 0, 4), ("replies", 4, 4)]
    expected = [(side, *call) for side in ("before", "after") for call in one_side]
    assert [call for call in calls if call[1] != "probes"] == expected
    for side in ("before", "after"):
        done = [call[2:] for call in calls if call[:2] == (side, "probes")]
        assert done[0] == (0, probes) and done[-1] == (probes, probes) and done == sorted(done)


@pytest.mark.parametrize(
    ("count", "rows"), [(0, []), (1, [0]), (2, [0, 2]), (3, [0, 1, 2]), (9, [0, 1, 2, 3])]
)
def test_samples_are_spread_evenly(count: int, rows: list[int]) -> None:
    replies = [Reply(str(n), True) for n in range(4)]
    conversations = [{"messages": row} for row in ROWS]
    selected = _select_samples(conversations, ["R"] * 4, replies, count)
    assert [sample["row"] for sample in selected] == rows
    assert [sample["reply"] for sample in selected] == [str(row) for row in rows]


UNTRAINED = {"role": "assistant", "content": "庚" * 9, "train": False}
TURNS = [
    {"role": "system", "content": "s"}, {"role": "user", "content": "甲" * 9},
    {"role": "assistant", "content": "乙" * 9}, {"role": "user", "content": "丙" * 9},
    {"role": "assistant", "content": "丁" * 9}, {"role": "user", "content": "戊" * 9},
    UNTRAINED, {"role": "user", "content": "辛" * 90}, {"role": "assistant", "content": "己" * 9},
]  # fmt: skip


@given(length=st.integers(40, 600))
def test_conversation_is_cut_after_the_last_answer_that_training_saw(phi: Any, length: int) -> None:
    """The prompt is the same tokens as in the truncated row."""
    from jetson_ft.data.chat_template import ANSWER, encode, prompt_and_reference

    encoded = encode(phi.tokenizer, TURNS)  # type: ignore[arg-type]
    ids, roles = encoded.ids[:length], encoded.segments[:length]
    assume(ANSWER in roles)
    row, encoded_prompt = _cut_turns(phi.tokenizer, {"messages": TURNS}, length)
    cut = row["messages"]
    assert cut == TURNS[: len(cut)] and cut[-1]["role"] == "assistant" and cut[-1] != UNTRAINED
    prompt, reference = prompt_and_reference(phi.tokenizer, cut)
    assert encoded_prompt == prompt
    assert reference == cut[-1]["content"]
    assert prompt == ids[: len(prompt)] and len(prompt) < length
    answers = [i for i in range(1, length) if roles[i : i + 1] == [ANSWER] != roles[i - 1 : i]]
    assert len(prompt) == answers[-1], "it ends where the last answer within the limit begins"


def test_comparison_takes_the_answers_within_the_length(compared: Any, phi: Any) -> None:
    _, _, model, pieces = compared
    rows = [{"row": 0, "messages": TURNS}]
    sides = adapter_sides(ModelReader(model, phi.tokenizer, 200))
    done = compare_adapter(
        sides, phi.tokenizer, rows, pieces[:1], 3, 1, lambda *_: None, max_length=150
    )
    (sample,) = done["eval"]["after"]["samples"]
    assert (sample["messages"], sample["reference"]) == (TURNS[:4], "丁" * 9)
