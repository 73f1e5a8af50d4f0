"""Probes of what a fine-tune forgot."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from jetson_ft.inference.metrics import chinese_share
from jetson_ft.inference.probes import answer_probes, load_probes, summarize_probes
from jetson_ft.inference.reader import ModelReader
from jetson_ft.kernels.lm_head_loss import token_losses
from jetson_ft.kernels.packing import pack_rows


def test_bundled_probes_are_enough_and_well_formed() -> None:
    probes = load_probes()
    assert len(probes) >= 60 and len({probe.id for probe in probes}) == len(probes)
    assert Counter(probe.language for probe in probes) == {"en": 33, "zh": 33}
    assert len({probe.question for probe in probes}) == len(probes)
    for probe in probes:
        assert (chinese_share(probe.question) > 0.3) == (probe.language == "zh"), probe.id
        if probe.pattern:
            assert not probe.answer and not probe.others
        else:
            assert len({probe.answer, *probe.others}) == 4, probe.id


@pytest.fixture(scope="module")
def answers(phi: Any) -> dict[str, bool]:
    return answer_probes(ModelReader(phi.model, phi.tokenizer, 0), phi.tokenizer)


def test_choices_are_answered_by_likelihood_per_byte(phi: Any, answers: dict[str, bool]) -> None:
    from jetson_ft.data.chat_template import ANSWER, encode

    assert list(answers) == [probe.id for probe in load_probes()]
    for probe in [each for each in load_probes() if not each.pattern][::9]:
        losses = []
        for choice in (probe.answer, *probe.others):
            question = {"role": "user", "content": probe.question}
            encoded = encode(phi.tokenizer, [question, {"role": "assistant", "content": choice}])  # type: ignore[list-item]
            pack = pack_rows([{"input_ids": encoded.ids, "segments": encoded.segments}])
            assert encoded.segments.count(ANSWER)
            nats = token_losses(phi.model, pack)[pack.is_answer].sum()
            losses.append(float(nats.detach()) / len(choice.encode()))
        assert answers[probe.id] == (losses[0] == min(losses)), probe.id


def test_packing_changes_no_answer(phi: Any, answers: dict[str, bool]) -> None:
    calls: list[Any] = []
    reader = ModelReader(phi.model, phi.tokenizer, 1024)
    packed = answer_probes(reader, phi.tokenizer, lambda *call: calls.append(call))
    assert packed == answers
    count = len(answers)
    assert calls[0] == (0, count) and calls[-1] == (count, count) and calls == sorted(calls)


def test_lost_and_gained_answers_have_an_interval() -> None:
    before = {f"p{n}": n < 40 for n in range(66)}
    result = summarize_probes({"before": before, "after": {**before, "p0": False, "p65": True}})
    assert (result["count"], result["lost"], result["gained"]) == (66, ["p0"], ["p65"])
    assert not result["difference"]["clear"]
    ruined = summarize_probes({"before": before, "after": dict.fromkeys(before, False)})
    assert ruined["difference"]["clear"] and len(ruined["lost"]) == 40
    alone = summarize_probes({"before": before})
    assert set(alone) == {"count", "before"} and alone["before"]["share"] == pytest.approx(40 / 66)


@pytest.mark.slow(minutes=1)
def test_a_ruined_adapter_is_seen() -> None:
    """With large random adapter weights clearly many answers are lost."""
    import torch

    from jetson_ft import adapter
    from jetson_ft.models import files, loading
    from jetson_ft.recipe import LoraRecipe

    base = files.resolve_model("embedded")
    tokenizer = loading.load_tokenizer(base)
    model = loading.load_model(base, loading.WeightFormat("bf16"), "cpu")
    model = adapter.attach_adapter(model, LoraRecipe(rank=4), 0).eval()
    reader = ModelReader(model, tokenizer, 1024)
    before = answer_probes(reader, tokenizer)
    torch.manual_seed(0)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=1.0)
    after = answer_probes(reader, tokenizer)
    result = summarize_probes({"before": before, "after": after})
    assert result["before"]["share"] > 0.5
    assert result["difference"]["clear"] and result["difference"]["high"] < 0
