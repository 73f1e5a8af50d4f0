"""Every arm trains the same lesson; those that can't run say why."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft.tuners.lora import layer

from jetson_ft.bench import lesson as lessons
from jetson_ft.bench import llamafactory
from jetson_ft.bench.arm import measure, reason
from jetson_ft.bench.arms import ARMS
from jetson_ft.bench.lesson import ROWS_PER_STEP, Lesson, Settings, prepare
from jetson_ft.bench.run import bench, lacking
from jetson_ft.errors import UserError
from jetson_ft.models.lora import FusedLinear
from jetson_ft.models.packing import pack

HERE = [name for name in ARMS if name != "trl" and "llamafactory" not in name]
SHARE_NOTHING = ("ours-without-packing", "ours-without-sharing")
README = Path(__file__).parents[2] / "benchmarks" / "README.md"


@pytest.fixture(scope="module")
def measured(lesson: Lesson) -> dict[str, dict[str, Any]]:
    """Each arm that needs nothing else."""
    return {name: measure(name, lesson) for name in HERE}


# The lesson


def test_a_lesson_is_whole_steps_of_eight_rows_and_survives_the_disk(
    lesson: Lesson, tmp_path: Path
) -> None:
    steps = lesson.steps()
    assert [len(step) for step in steps] == [8, 8, 8]  # of the thirty asked for
    assert sorted(i for step in steps for i in step) == list(range(24))
    lesson.write(tmp_path / "lesson.json")
    assert lessons.load(tmp_path / "lesson.json") == lesson


def test_conversations_and_ids_are_of_the_same_rows(lesson: Lesson) -> None:
    from jetson_ft.models.load import load_tokenizer

    tokenizer = load_tokenizer(lesson.base)
    for row, messages in zip(lesson.rows, lesson.messages, strict=True):
        assert messages[0]["content"] in tokenizer.decode(row["input_ids"])


def test_fewer_rows_than_two_steps_are_refused(settings: Settings) -> None:
    with pytest.raises(UserError, match="at least 16 rows"):
        prepare(replace(settings, rows=15))


# The arms


@pytest.mark.parametrize("name", HERE)
def test_an_arm_learns_what_trainer_learns(
    name: str, measured: dict[str, dict[str, Any]], lesson: Lesson
) -> None:
    assert len(measured[name]["losses"]) == 3
    assert measured[name]["losses"] == pytest.approx(measured["trainer"]["losses"], abs=1e-3)
    timed = sum(len(lesson.rows[i]["input_ids"]) for step in lesson.steps()[1:] for i in step)
    assert measured[name]["tokens"] == timed
    assert 0 < measured[name]["roof_share"] < 1
    sharing = name.startswith("ours") and name not in SHARE_NOTHING
    assert (measured[name]["computed_tokens"] < timed) is sharing


def test_steps_differ_so_that_to_agree_means_something(
    measured: dict[str, dict[str, Any]],
) -> None:
    """An arm that took other rows would show."""
    by_step = measured["trainer"]["losses"]
    assert max(by_step) - min(by_step) > 2e-3


def test_packed_rows_do_not_see_each_other(lesson: Lesson) -> None:
    """transformers keeps them apart by positions that begin anew; without, the loss moves."""
    from jetson_ft.bench.trainers import _loss_with_full_head, plain_model

    lesson = replace(lesson, precision="fp32")  # bf16 would round the difference away
    model, rows = plain_model(lesson), lesson.rows[:2]
    together = pack(rows, share=False)
    in_a_row = replace(together, position_ids=torch.arange(together.tokens)[None])
    with torch.no_grad():
        alone = float(sum(_loss_with_full_head(model, pack([row])) for row in rows))
        assert float(_loss_with_full_head(model, together)) == pytest.approx(alone, abs=1e-3)
        assert float(_loss_with_full_head(model, in_a_row)) != pytest.approx(alone, abs=4e-3)


def test_only_ours_has_a_plan_and_switches_change_it(measured: dict[str, dict[str, Any]]) -> None:
    assert measured["trainer"]["plan"] is None
    assert measured["ours"]["plan"]["micro_batch_tokens"] > 0
    assert not measured["ours"]["plan"]["checkpointing"]
    assert measured["ours-without-packing"]["plan"]["micro_batch_tokens"] == 0
    assert measured["ours-with-checkpointing"]["plan"]["checkpointing"]


def test_plain_arms_have_pefts_own_layers(lesson: Lesson) -> None:
    from jetson_ft.bench.ours import _fused_model
    from jetson_ft.bench.trainers import plain_model

    plain, fused = plain_model(lesson), _fused_model(lesson)
    kinds = [{type(m) for m in model.modules() if isinstance(m, layer.Linear)}
             for model in (plain, fused)]  # fmt: skip
    assert kinds == [{layer.Linear}, {FusedLinear}]
    first = [
        {n: p for n, p in model.named_parameters() if "lora_" in n} for model in (plain, fused)
    ]
    assert all(value.equal(first[1][name]) for name, value in first[0].items())


# What can go wrong


def test_arms_that_cannot_run_say_why(settings: Settings, tmp_path: Path) -> None:
    reasons = lacking(settings)
    assert "--llamafactory" in reasons["llamafactory"]
    assert set(reasons) <= {"llamafactory", "llamafactory-batch-8", "llamafactory-packed", "trl"}
    without = lacking(replace(settings, llamafactory=sys.executable))
    assert without["llamafactory"] == f"{sys.executable} doesn't have llamafactory"
    missing = lacking(replace(settings, llamafactory=str(tmp_path / "python")))
    assert "no program" in missing["llamafactory"]


def test_where_no_arm_can_run_nothing_is_prepared(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="None of the arms can run here") as caught:
        bench(replace(settings, arms=("llamafactory",)), tmp_path / "out", print)
    assert caught.value.where.startswith("llamafactory: no interpreter")
    assert not (tmp_path / "out").exists()


def test_an_unknown_arm_is_refused_with_the_nearest(settings: Settings) -> None:
    with pytest.raises(UserError) as caught:
        lacking(replace(settings, arms=("paked",)))
    assert caught.value.fix.startswith("Did you mean packed?")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("It is refused.", "here"), "It is refused."),
        (RuntimeError("CUDA out of memory. Tried …"), "out of memory"),
        (ValueError("first\nsecond"), "ValueError: first"),
        (KeyError(), "KeyError: "),
    ],
)
def test_a_failure_is_one_line(error: Exception, said: str) -> None:
    assert reason(error) == said


# LLaMA-Factory, played by a script


def play(folder: Path, body: str) -> str:
    """An interpreter that has llamafactory, and whose training is `body`."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\ncase "$2" in *find_spec*) exit 0;; esac\n{body}\n')
    path.chmod(0o755)
    return str(path)


STEPS = """
mkdir out
for step in 1 2 3; do
  printf '{"current_steps": %s, "loss": 1.%s}\\n' $step $step >> out/trainer_log.jsonl
  sleep 0.2
done
printf '{"current_steps": 3, "percentage": 100}\\n{"loss"' >> out/trainer_log.jsonl
"""


def test_its_log_is_timed_line_by_line(lesson: Lesson, tmp_path: Path) -> None:
    program = play(tmp_path, STEPS)
    home = tmp_path / "home"
    home.mkdir()
    given = replace(lesson, settings=replace(lesson.settings, llamafactory=program))
    seen = llamafactory.train(given, str(home))
    assert seen.losses == [1.1, 1.2, 1.3]
    assert 0.2 < seen.ends[2] - seen.ends[0] < 2
    assert seen.peak_memory_bytes > 0


@pytest.mark.parametrize(("arm", "batch"), [("llamafactory", 1), ("llamafactory-batch-8", 8)])
def test_a_step_is_eight_rows_in_each_of_its_arms(
    arm: str, batch: int, lesson: Lesson, tmp_path: Path
) -> None:
    given = replace(
        lesson, settings=replace(lesson.settings, llamafactory=play(tmp_path, "exit 0"))
    )
    ARMS[arm].train(given, str(tmp_path))
    told = yaml.safe_load((tmp_path / "train.yaml").read_text(encoding="utf-8"))
    assert told["per_device_train_batch_size"] == batch
    assert told["gradient_accumulation_steps"] * batch == ROWS_PER_STEP


PACKED = """
mkdir out
printf '{"loss": 1.5, "total_tokens": 40}\n' >> out/trainer_log.jsonl
sleep 0.2
printf '{"loss": 1.5, "total_tokens": 80}\n{"loss": 1.5, "total_tokens": 100}\n' \
  >> out/trainer_log.jsonl
"""


def test_its_packed_steps_are_of_its_own_rows(lesson: Lesson, tmp_path: Path) -> None:
    program = play(tmp_path, PACKED)
    given = replace(lesson, settings=replace(lesson.settings, llamafactory=program))
    found = measure("llamafactory-packed", given)
    tokens = sum(len(row["input_ids"]) for row in lesson.rows)
    assert found["tokens"] == round(tokens * 0.6)
    assert found["losses"] == []
    one_step = play(tmp_path, PACKED.partition("sleep")[0])
    given = replace(lesson, settings=replace(lesson.settings, llamafactory=one_step))
    with pytest.raises(RuntimeError, match="made 1 steps of packed rows"):
        measure("llamafactory-packed", given)


def test_it_packs_about_eight_rows_a_step(lesson: Lesson, tmp_path: Path) -> None:
    def told(tokens: int) -> dict[str, Any]:
        rows = [{"input_ids": [1] * tokens, "parts": [1] * tokens}] * 16
        given = replace(lesson, rows=rows, settings=replace(lesson.settings, max_length=256))
        return llamafactory.arguments(given, tmp_path, packed=True)

    packing = ("packing", "neat_packing", "include_num_input_tokens_seen")
    assert all(told(120)[key] is True for key in packing)
    plain = llamafactory.arguments(lesson, tmp_path)
    assert not any(key in plain for key in packing)
    steps = {tokens: told(tokens)["gradient_accumulation_steps"] for tokens in (256, 120, 90, 20)}
    assert steps == {256: 8, 120: 4, 90: 3, 20: 1}  # bins a step


def test_it_is_given_the_rows_in_the_order_trained(lesson: Lesson, tmp_path: Path) -> None:
    from jetson_ft.models.load import load_tokenizer
    from jetson_ft.paths import read_json

    given = replace(
        lesson, settings=replace(lesson.settings, llamafactory=play(tmp_path, "exit 0"))
    )
    llamafactory.train(given, str(tmp_path))
    rows = read_json(tmp_path / "rows.json")
    tokenizer = load_tokenizer(lesson.base)
    for row, encoded in zip(rows, lesson.in_order(), strict=True):
        assert row["messages"][0]["content"] in tokenizer.decode(encoded["input_ids"])


def test_its_model_computes_as_the_others_do(lesson: Lesson, tmp_path: Path) -> None:
    from jetson_ft.paths import read_json

    given = replace(
        lesson, settings=replace(lesson.settings, llamafactory=play(tmp_path, "exit 0"))
    )
    given = replace(given, precision="fp16")
    before = read_json(Path(lesson.folder) / "config.json")
    llamafactory.train(given, str(tmp_path))
    written = read_json(tmp_path / "model" / "config.json")
    assert written == before | {"dtype": "float16", "torch_dtype": "float16"}
    assert read_json(Path(lesson.folder) / "config.json") == before
    weights = tmp_path / "model" / "model.safetensors"
    assert weights.samefile(Path(lesson.folder) / "model.safetensors")


def test_fewer_steps_than_the_lesson_has_are_a_failure(lesson: Lesson, tmp_path: Path) -> None:
    program = play(tmp_path, "mkdir out; echo '{\"loss\": 1.5}' > out/trainer_log.jsonl")
    given = replace(lesson, settings=replace(lesson.settings, llamafactory=program))
    with pytest.raises(RuntimeError, match="made 1 of 3 steps"):
        measure("llamafactory", given)


def test_an_arm_is_described_without_the_others() -> None:
    """The table explains those alone that ran."""
    assert not [name for name, arm in ARMS.items() if "the same" in arm.description]


def test_the_readme_explains_every_arm() -> None:
    text = README.read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in ARMS)
