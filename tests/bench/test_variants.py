"""Every variant trains the same workload; those that can't run have a reason."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft.tuners.lora import layer

from jetson_ft.bench import llamafactory
from jetson_ft.bench.ours import load_model
from jetson_ft.bench.runner import bench, unavailable_variants
from jetson_ft.bench.variants import VARIANTS, describe_error, measure
from jetson_ft.bench.workload import (
    ROWS_PER_STEP,
    BenchWorkload,
    Settings,
    load_workload,
    prepare_workload,
)
from jetson_ft.errors import UserError
from jetson_ft.kernels.lora_linear import FusedLinear
from jetson_ft.kernels.packing import pack_rows
from jetson_ft.models.loading import WeightFormat

HERE = [name for name in VARIANTS if name != "trl" and "llamafactory" not in name]
SHARE_NOTHING = ("ours-without-packing", "ours-without-sharing")
README = Path(__file__).parents[2] / "benchmarks" / "README.md"


@pytest.fixture(scope="module")
def measured(workload: BenchWorkload) -> dict[str, dict[str, Any]]:
    """Measurements of the variants that need no other program."""
    return {name: measure(name, workload) for name in HERE}


# The workload


def test_workload_has_whole_steps_and_survives_writing(
    workload: BenchWorkload, tmp_path: Path
) -> None:
    steps = workload.steps()
    assert [len(step) for step in steps] == [8, 8, 8]  # of the thirty asked for
    assert sorted(i for step in steps for i in step) == list(range(24))
    workload.write(tmp_path / "workload.json")
    assert load_workload(tmp_path / "workload.json") == workload


def test_messages_and_token_ids_are_of_the_same_rows(workload: BenchWorkload) -> None:
    from jetson_ft.models.loading import load_tokenizer

    tokenizer = load_tokenizer(workload.base)
    for row, messages in zip(workload.rows, workload.messages, strict=True):
        assert messages[0]["content"] in tokenizer.decode(row["input_ids"])


def test_supervised_counts_are_those_of_predicted_tokens(workload: BenchWorkload) -> None:
    counts = [sum(map(bool, row["segments"][1:])) for row in workload.rows]
    assert [row["supervised"] for row in workload.rows] == counts


def test_fewer_rows_than_two_steps_raise(settings: Settings) -> None:
    with pytest.raises(UserError, match="at least 16 rows"):
        prepare_workload(replace(settings, rows=15))


# The variants


@pytest.mark.parametrize("name", HERE)
def test_variant_has_the_losses_of_trainer(
    name: str, measured: dict[str, dict[str, Any]], workload: BenchWorkload
) -> None:
    assert len(measured[name]["losses"]) == 3
    assert measured[name]["losses"] == pytest.approx(measured["trainer"]["losses"], abs=1e-3)
    timed = sum(len(workload.rows[i]["input_ids"]) for step in workload.steps()[1:] for i in step)
    assert measured[name]["tokens"] == timed
    assert 0 < measured[name]["share_of_peak"] < 1
    sharing = name.startswith("ours") and name not in SHARE_NOTHING
    assert (measured[name]["computed_tokens"] < timed) is sharing


def test_losses_of_steps_differ(measured: dict[str, dict[str, Any]]) -> None:
    """A variant that took other rows would have other losses."""
    by_step = measured["trainer"]["losses"]
    assert max(by_step) - min(by_step) > 2e-3


def test_packed_rows_are_separated(workload: BenchWorkload) -> None:
    """transformers separates them by positions that restart; without, the loss changes."""
    from jetson_ft.bench.trainers import packed_loss

    workload = replace(
        workload, weights=WeightFormat("fp32")
    )  # bf16 would round the difference away
    model, rows = load_model(workload, fused=False), workload.rows[:2]
    together = pack_rows(rows, share=False)
    in_a_row = replace(together, position_ids=torch.arange(together.tokens)[None])
    with torch.no_grad():
        alone = float(sum(packed_loss(model, pack_rows([row])) for row in rows))
        assert float(packed_loss(model, together)) == pytest.approx(alone, abs=1e-3)
        assert float(packed_loss(model, in_a_row)) != pytest.approx(alone, abs=4e-3)


def test_plan_is_of_ours_alone_and_follows_the_part_left_out(
    measured: dict[str, dict[str, Any]],
) -> None:
    assert measured["trainer"]["plan"] is None
    assert measured["ours"]["plan"]["micro_batch_tokens"] > 0
    assert not measured["ours"]["plan"]["checkpointing"]
    assert measured["ours-without-packing"]["plan"]["micro_batch_tokens"] == 0
    assert measured["ours-with-checkpointing"]["plan"]["checkpointing"]


def test_unfused_model_has_layers_of_peft(workload: BenchWorkload) -> None:
    plain, fused = load_model(workload, fused=False), load_model(workload, fused=True)
    kinds = [{type(m) for m in model.modules() if isinstance(m, layer.Linear)}
             for model in (plain, fused)]  # fmt: skip
    assert kinds == [{layer.Linear}, {FusedLinear}]
    first = [
        {n: p for n, p in model.named_parameters() if "lora_" in n} for model in (plain, fused)
    ]
    assert all(value.equal(first[1][name]) for name, value in first[0].items())


# Failures


def test_unavailable_variants_have_a_reason(settings: Settings, tmp_path: Path) -> None:
    reasons = unavailable_variants(settings)
    assert "--llamafactory" in reasons["llamafactory"]
    assert set(reasons) <= {"llamafactory", "llamafactory-batch-8", "llamafactory-packed", "trl"}
    without = unavailable_variants(replace(settings, llamafactory=sys.executable))
    assert without["llamafactory"] == f"{sys.executable} doesn't have llamafactory"
    missing = unavailable_variants(replace(settings, llamafactory=str(tmp_path / "python")))
    assert "is not a program" in missing["llamafactory"]


def test_no_available_variant_raises_before_preparing(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="None of the variants can run here") as caught:
        bench(replace(settings, variants=("llamafactory",)), tmp_path / "out", print)
    assert str(caught.value.where).startswith("llamafactory: no interpreter")
    assert not (tmp_path / "out").exists()


def test_unknown_variant_raises_with_the_nearest_name(settings: Settings) -> None:
    with pytest.raises(UserError) as caught:
        unavailable_variants(replace(settings, variants=("paked",)))
    assert str(caught.value.fix).startswith("Did you mean packed?")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("It is refused.", "here"), "It is refused."),
        (RuntimeError("CUDA out of memory. Tried …"), "out of memory"),
        (ValueError("first\nsecond"), "ValueError: first"),
        (KeyError(), "KeyError: "),
    ],
)
def test_error_is_described_in_one_line(error: Exception, line: str) -> None:
    assert describe_error(error) == line


# LLaMA-Factory, replaced by a script


def with_llamafactory(workload: BenchWorkload, folder: Path, body: str) -> BenchWorkload:
    """Return the workload with an interpreter that has llamafactory, whose training is `body`."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\ncase "$2" in *find_spec*) exit 0;; esac\n{body}\n')
    path.chmod(0o755)
    return replace(workload, settings=replace(workload.settings, llamafactory=str(path)))


STEPS = """
mkdir out
for step in 1 2 3; do
  printf '{"current_steps": %s, "loss": 1.%s}\\n' $step $step >> out/trainer_log.jsonl
  sleep 0.2
done
printf '{"current_steps": 3, "percentage": 100}\\n{"loss"' >> out/trainer_log.jsonl
"""


def test_log_lines_are_timed(workload: BenchWorkload, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    changed = with_llamafactory(workload, tmp_path, STEPS)
    result = llamafactory.train(changed, str(home))
    assert result.losses == [1.1, 1.2, 1.3]
    assert 0.2 < result.step_ends[2] - result.step_ends[0] < 2
    assert result.peak_memory_bytes > 0


def test_damaged_log_ends_llamafactory_too(workload: BenchWorkload, tmp_path: Path) -> None:
    body = "echo $$ > pid; mkdir out; echo damaged >> out/trainer_log.jsonl; exec sleep 60"
    changed = with_llamafactory(workload, tmp_path, body)
    with pytest.raises(ValueError, match="Expecting value"):
        llamafactory.train(changed, str(tmp_path))
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize(("name", "batch"), [("llamafactory", 1), ("llamafactory-batch-8", 8)])
def test_batch_size_keeps_eight_rows_a_step(
    name: str, batch: int, workload: BenchWorkload, tmp_path: Path
) -> None:
    changed = with_llamafactory(workload, tmp_path, "exit 0")
    VARIANTS[name].train(changed, str(tmp_path))
    config = yaml.safe_load((tmp_path / "train.yaml").read_text(encoding="utf-8"))
    assert config["per_device_train_batch_size"] == batch
    assert config["gradient_accumulation_steps"] * batch == ROWS_PER_STEP


PACKED = """
mkdir out
printf '{"loss": 1.5, "total_tokens": 40}\n' >> out/trainer_log.jsonl
sleep 0.2
printf '{"loss": 1.5, "total_tokens": 80}\n{"loss": 1.5, "total_tokens": 100}\n' \
  >> out/trainer_log.jsonl
"""


def test_packed_steps_have_an_estimated_number_of_tokens(
    workload: BenchWorkload, tmp_path: Path
) -> None:
    changed = with_llamafactory(workload, tmp_path, PACKED)
    measurement = measure("llamafactory-packed", changed)
    tokens = sum(len(row["input_ids"]) for row in workload.rows)
    assert measurement["tokens"] == round(tokens * 0.6)
    assert measurement["losses"] == []
    changed = with_llamafactory(workload, tmp_path, PACKED.partition("sleep")[0])
    with pytest.raises(RuntimeError, match="made 1 steps of packed rows"):
        measure("llamafactory-packed", changed)


def test_packed_bins_make_about_eight_rows_a_step(workload: BenchWorkload, tmp_path: Path) -> None:
    def config(tokens: int) -> dict[str, Any]:
        rows = [{"input_ids": [1] * tokens, "segments": [1] * tokens}] * 16
        changed = replace(workload, rows=rows, settings=replace(workload.settings, max_length=256))
        return llamafactory.training_arguments(changed, tmp_path, packed=True)

    packing = ("packing", "neat_packing", "include_num_input_tokens_seen")
    assert all(config(120)[key] is True for key in packing)
    plain = llamafactory.training_arguments(workload, tmp_path)
    assert not any(key in plain for key in packing)
    steps = {tokens: config(tokens)["gradient_accumulation_steps"] for tokens in (256, 120, 90, 20)}
    assert steps == {256: 8, 120: 4, 90: 3, 20: 1}  # bins a step


def test_rows_file_has_the_training_order(workload: BenchWorkload, tmp_path: Path) -> None:
    from jetson_ft.files import read_json
    from jetson_ft.models.loading import load_tokenizer

    changed = with_llamafactory(workload, tmp_path, "exit 0")
    llamafactory.train(changed, str(tmp_path))
    rows = read_json(tmp_path / "rows.json")
    tokenizer = load_tokenizer(workload.base)
    for row, encoded in zip(rows, workload.rows_in_order(), strict=True):
        assert row["messages"][0]["content"] in tokenizer.decode(encoded["input_ids"])


def test_model_config_has_the_precision_of_the_benchmark(
    workload: BenchWorkload, tmp_path: Path
) -> None:
    from jetson_ft.files import read_json

    changed = with_llamafactory(workload, tmp_path, "exit 0")
    changed = replace(changed, weights=WeightFormat("fp16"))
    before = read_json(workload.base.folder / "config.json")
    llamafactory.train(changed, str(tmp_path))
    written = read_json(tmp_path / "model" / "config.json")
    assert written == before | {"dtype": "float16", "torch_dtype": "float16"}
    assert read_json(workload.base.folder / "config.json") == before
    weights = tmp_path / "model" / "model.safetensors"
    assert weights.samefile(workload.base.folder / "model.safetensors")


def test_missing_steps_raise(workload: BenchWorkload, tmp_path: Path) -> None:
    one_step = "mkdir out; echo '{\"loss\": 1.5}' > out/trainer_log.jsonl"
    changed = with_llamafactory(workload, tmp_path, one_step)
    with pytest.raises(RuntimeError, match="made 1 of 3 steps"):
        measure("llamafactory", changed)


def test_descriptions_refer_to_no_other_variant() -> None:
    """The table describes only those that were asked for."""
    assert not [name for name, variant in VARIANTS.items() if "the same" in variant.description]


def test_readme_explains_every_variant() -> None:
    text = README.read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in VARIANTS)
