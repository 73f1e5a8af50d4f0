"""The comparison: one model, its adapter off and on, over the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jetson_ft.inference.evaluate import _samples, compare
from jetson_ft.inference.generate import Reply
from jetson_ft.models.packing import Pack

FIGURES = {
    "loss", "bits_per_char", "chinese_share", "stop_rate", "repetition", "chrf", "bleu", "samples",
}  # fmt: skip
ROWS = [
    [{"role": "user", "content": f"第{n}题"}, {"role": "assistant", "content": f"等于{n}。" * n}]
    for n in range(1, 5)
]


@pytest.fixture(scope="module")
def compared(tiny_phi: Path, writer: Any) -> tuple[dict[str, Any], list[Any], Any, list[Pack]]:
    """(result, what progress heard, the model, the rows' packs)."""
    import torch

    from jetson_ft.data.template import encode
    from jetson_ft.models import adapter, load
    from jetson_ft.models.packing import packs
    from jetson_ft.models.resolve import Base
    from jetson_ft.recipe import LoraRecipe

    base = load.load_model(Base("tiny", tiny_phi), load.Weights("fp32"), "cpu")
    model = adapter.attach(base, LoraRecipe(rank=2), 0)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3)
    encoded = [encode(writer.tokenizer, row) for row in ROWS]
    packed = list(packs([{"input_ids": e.ids, "parts": e.parts} for e in encoded], 200))
    heard: list[Any] = []
    characters = sum(len(row[1]["content"]) for row in ROWS)
    result = compare(
        model.eval(), writer.tokenizer, ROWS, packed, characters, 10, 2,
        lambda *told: heard.append(told),
    )  # fmt: skip
    return result, heard, model, packed


def test_both_sides_carry_the_contracts_figures(compared: Any) -> None:
    result, *_ = compared
    assert set(result) == {"eval", "generation"}
    assert result["eval"]["rows"] == 4
    for side in ("before", "after"):
        assert set(result["eval"][side]) == FIGURES
    assert result["generation"]["method"] == "greedy"
    assert result["generation"]["max_new_tokens"] == 10


def test_before_is_the_base_alone(compared: Any, writer: Any) -> None:
    import torch

    result, *_ = compared
    nats, count, characters = 0.0, 0, 0
    for row in ROWS:
        prompt = writer.prompt(row[0]["content"])
        answer = writer.tokenizer(row[1]["content"], add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = writer.model(torch.tensor([prompt + answer])).logits[0].double()
        rates = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        nats -= float(rates[range(len(answer)), answer].sum())
        count, characters = count + len(answer), characters + len(row[1]["content"])
    before = result["eval"]["before"]
    assert before["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert before["bits_per_char"] == pytest.approx(
        nats / 0.6931471805599453 / characters, rel=1e-5
    )


def test_after_differs_and_the_adapter_is_on_again(compared: Any) -> None:
    result, _, model, _ = compared
    before, after = result["eval"]["before"], result["eval"]["after"]
    assert abs(before["loss"] - after["loss"]) > 1e-3
    assert before["samples"][0]["reply"] != after["samples"][0]["reply"]
    assert not model.base_model.model.model.layers[0].self_attn.q_proj.disable_adapters


def test_samples_show_the_same_rows_on_both_sides(compared: Any) -> None:
    result, *_ = compared
    for before, after in zip(
        result["eval"]["before"]["samples"], result["eval"]["after"]["samples"], strict=True
    ):
        assert before["row"] == after["row"]
        assert before["messages"] == ROWS[before["row"]][:1] == after["messages"]
        assert before["reference"] == ROWS[before["row"]][1]["content"]


def test_progress_hears_both_sides(compared: Any) -> None:
    _, heard, _, packed = compared
    first, second = (pack.tokens for pack in packed)
    of_all = first + second
    measured = [("tokens", 0, of_all), ("tokens", first, of_all), ("tokens", of_all, of_all)]
    of_a_side = [*measured, ("replies", 0, 4), ("replies", 4, 4)]
    assert heard == [(side, *told) for side in ("before", "after") for told in of_a_side]


@pytest.mark.parametrize(
    ("count", "rows"), [(0, []), (1, [0]), (2, [0, 2]), (3, [0, 1, 2]), (9, [0, 1, 2, 3])]
)
def test_samples_are_spread_evenly(count: int, rows: list[int]) -> None:
    replies = [Reply(str(n), 1, True) for n in range(4)]
    found = _samples(ROWS, replies, count)
    assert [sample["row"] for sample in found] == rows
    assert [sample["reply"] for sample in found] == [str(row) for row in rows]
