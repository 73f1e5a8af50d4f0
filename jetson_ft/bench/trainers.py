"""The arms that are not ours, on transformers' Trainer, and the clock that all of those share."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from jetson_ft.bench.lesson import ROWS_PER_STEP, Lesson, Trained
from jetson_ft.data.template import IGNORED
from jetson_ft.models import adapter, load
from jetson_ft.models.packing import Pack, packs
from jetson_ft.training.memory import peak_memory_bytes


class _Clock(TrainerCallback):
    """Notes when each step ended, and its loss."""

    def __init__(self, seen: Trained) -> None:
        self.seen = seen

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.seen.ends.append(time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.seen.losses.append(float(logs["loss"]))


def plain_model(lesson: Lesson) -> Any:
    """The base with PEFT's own layers."""
    base = load.load_model(lesson.base, lesson.weights, lesson.device.kind)
    recipe = lesson.settings.recipe()
    model = adapter.attach(base, recipe.lora, recipe.train.seed, fused=False)
    model.config.use_cache = False
    return model


def padded(lesson: Lesson, folder: str, batch: int) -> Trained:
    """Trainer as people write it: `batch` rows at a time, padded to the longest of them."""
    trainer = Trainer(
        model=plain_model(lesson),
        args=TrainingArguments(**arguments(lesson, folder, batch)),
        train_dataset=labelled(lesson),
        data_collator=DataCollatorForSeq2Seq(load.load_tokenizer(lesson.base)),
    )
    return run(trainer, lesson)


def packed(lesson: Lesson, folder: str) -> Trained:
    """Rows of a step in bins of `max_length`; transformers keeps them apart by positions."""
    rows, size = lesson.in_order(), lesson.settings.max_length
    steps = [
        list(packs(rows[start : start + ROWS_PER_STEP], size, share=False))
        for start in range(0, len(rows), ROWS_PER_STEP)
    ]
    settings = arguments(lesson, folder, ROWS_PER_STEP)
    settings |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    trainer = _Packed(
        model=plain_model(lesson),
        args=TrainingArguments(**settings),
        train_dataset=steps,
        data_collator=lambda batch: batch[0],
    )
    return run(trainer, lesson)


def padding_free(lesson: Lesson, folder: str) -> Trained:
    """TRL's SFTTrainer, the eight rows of a step in one sequence."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=plain_model(lesson),
        args=SFTConfig(
            **arguments(lesson, folder, ROWS_PER_STEP), padding_free=True, max_length=None
        ),
        train_dataset=Dataset.from_list(labelled(lesson)),
        processing_class=load.load_tokenizer(lesson.base),
    )
    return run(trainer, lesson)


def run(trainer: Any, lesson: Lesson) -> Trained:
    """Trains to the end under the clock."""
    seen = Trained()
    trainer.add_callback(_Clock(seen))
    trainer.train()
    seen.peak_memory_bytes = peak_memory_bytes(lesson.device.kind)
    return seen


def labelled(lesson: Lesson) -> list[dict[str, list[int]]]:
    """The rows in order, with `labels` where a token is learnt."""
    return [
        {
            "input_ids": row["input_ids"],
            "labels": [
                token if part else IGNORED
                for token, part in zip(row["input_ids"], row["parts"], strict=True)
            ],
        }
        for row in lesson.in_order()
    ]


def arguments(lesson: Lesson, folder: str, batch: int) -> dict[str, Any]:
    """Settings of TrainingArguments: mixed precision and checkpointing, as they are usual."""
    train = lesson.settings.recipe().train
    return {
        "output_dir": folder,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": ROWS_PER_STEP // batch,
        "num_train_epochs": train.epochs,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "optim": "adamw_torch_fused",
        "seed": train.seed,
        "train_sampling_strategy": "sequential",
        "bf16": lesson.precision == "bf16",
        "fp16": lesson.precision == "fp16",
        "use_cpu": lesson.device.kind == "cpu",
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


class _Packed(Trainer):
    """One item is one optimizer step: the bins of its rows."""

    def training_step(
        self, model: Any, inputs: list[Pack], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        model.train()
        supervised = sum(len(pack.targets) for pack in inputs)
        total = torch.zeros((), device=self.args.device)
        for pack in inputs:
            with self.compute_loss_context_manager():
                loss = _loss_with_full_head(model, pack.to(self.args.device)) / supervised
            self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _prepare_inputs(self, inputs: list[Pack]) -> list[Pack]:
        return inputs

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> None:
        return None

    def floating_point_ops(self, inputs: Any) -> int:
        return 0


def _loss_with_full_head(model: Any, pack: Pack) -> torch.Tensor:
    """Summed loss; every position is projected to the vocabulary."""
    from torch.nn.functional import cross_entropy

    labels = torch.full_like(pack.input_ids[0], IGNORED)
    labels[pack.positions] = pack.targets
    out = model(input_ids=pack.input_ids, position_ids=pack.position_ids, use_cache=False)
    return cross_entropy(out.logits[0].float(), labels, ignore_index=IGNORED, reduction="sum")
