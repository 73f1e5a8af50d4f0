"""The baselines that use transformers' Trainer, or TRL's on top of it."""

from __future__ import annotations

import time
from typing import Any, Literal

import torch
from torch.nn.functional import cross_entropy
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from jetson_ft.bench import ours
from jetson_ft.bench.workload import ROWS_PER_STEP, BenchWorkload, Result
from jetson_ft.data.chat_template import IGNORE_INDEX
from jetson_ft.kernels.packing import Pack, make_packs
from jetson_ft.models import loading
from jetson_ft.training.memory import peak_memory_bytes


def train(
    workload: BenchWorkload,
    folder: str,
    batch: int = ROWS_PER_STEP,
    mode: Literal["padded", "packed", "padding-free"] = "padded",
) -> Result:
    """Train the workload with mixed precision and gradient checkpointing, as is usual.

    Args:
        mode: `padded` to the longest row of a batch; `packed` into bins of `max_length`, whose
            rows transformers separates by their positions; `padding-free`: TRL's SFTTrainer with
            the rows of a batch in one sequence.
    """
    model = ours.load_model(workload, fused=False)
    model.config.use_cache = False
    arguments = workload.training_arguments(folder, batch) | {
        "optim": "adamw_torch_fused",
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    tokenizer = loading.load_tokenizer(workload.base)
    trainer: Any
    if mode == "padded":
        args, collator = TrainingArguments(**arguments), DataCollatorForSeq2Seq(tokenizer)
        trainer = Trainer(model, args, collator, train_dataset=labelled_rows(workload))
    elif mode == "packed":
        size = workload.settings.max_length
        args = TrainingArguments(**arguments, remove_unused_columns=False)
        trainer = _PackedTrainer(
            model,
            args,
            lambda rows: list(make_packs(rows, size, share=False)),
            train_dataset=workload.rows_in_order(),
        )
    else:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        args = SFTConfig(**arguments, padding_free=True, max_length=None)
        rows = Dataset.from_list(labelled_rows(workload))
        trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    result = Result()
    trainer.add_callback(_StepTimer(result))
    trainer.train()
    result.peak_memory_bytes = peak_memory_bytes(workload.device.kind)
    return result


def labelled_rows(workload: BenchWorkload) -> list[dict[str, list[int]]]:
    """Return the rows in training order, with `labels`: IGNORE_INDEX where not supervised."""
    return [
        {
            "input_ids": row["input_ids"],
            "labels": [
                token if segment else IGNORE_INDEX
                for token, segment in zip(row["input_ids"], row["segments"], strict=True)
            ],
        }
        for row in workload.rows_in_order()
    ]


def packed_loss(model: Any, pack: Pack) -> torch.Tensor:
    """Return the summed loss of a pack; every position is projected to the vocabulary."""
    labels = torch.full_like(pack.input_ids[0], IGNORE_INDEX)
    labels[pack.positions] = pack.targets
    out = model(input_ids=pack.input_ids, position_ids=pack.position_ids, use_cache=False)
    return cross_entropy(out.logits[0].float(), labels, ignore_index=IGNORE_INDEX, reduction="sum")


class _StepTimer(TrainerCallback):
    """Record when each step ended, and its loss."""

    def __init__(self, result: Result) -> None:
        self.result = result

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.result.step_ends.append(time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.result.losses.append(float(logs["loss"]))


class _PackedTrainer(Trainer):
    """A Trainer whose batches are the packs of one optimizer step."""

    def training_step(
        self, model: Any, inputs: list[Pack], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        model.train()
        supervised_tokens = sum(len(pack.targets) for pack in inputs)
        total = torch.zeros((), device=self.args.device)
        for pack in inputs:
            with self.compute_loss_context_manager():
                loss = packed_loss(model, pack.to(self.args.device)) / supervised_tokens
            self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _prepare_inputs(self, inputs: list[Pack]) -> list[Pack]:
        return inputs

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> None:
        return None

    def floating_point_ops(self, inputs: Any) -> int:
        return 0
