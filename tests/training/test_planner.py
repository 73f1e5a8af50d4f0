"""A plan changes memory and speed; it leaves no room for surprises."""

from __future__ import annotations

import dataclasses

import pytest

from jetson_ft.device.probe import Device
from jetson_ft.training.memory import peak_memory_bytes
from jetson_ft.training.planner import choose

CPU = Device("cpu", "a processor", None, 4, 16 * 2**30, 4 * 2**30, False, False)
BOARD = dataclasses.replace(CPU, kind="cuda", integrated=True)


@pytest.mark.parametrize(("packing", "tokens", "expected"), [(True, 512, 512), (False, 512, 0)])
def test_micro_batches_follow_the_step(packing: bool, tokens: int, expected: int) -> None:
    assert choose(CPU, tokens, packing).micro_batch_tokens == expected


def test_a_large_step_is_cut_up() -> None:
    assert 0 < choose(CPU, 100_000, True).micro_batch_tokens < 100_000


def test_activations_are_recomputed_only_where_gpu_memory_is_short() -> None:
    roomy = dataclasses.replace(BOARD, memory_available=40 * 2**30)
    assert choose(BOARD, 4096, True).checkpointing
    assert not choose(roomy, 4096, True).checkpointing
    assert not choose(CPU, 4096, True).checkpointing


def test_peak_memory_is_in_bytes_and_never_falls() -> None:
    before = peak_memory_bytes("cpu")
    block = bytearray(200 * 2**20)
    block[:: 2**12] = b"x" * len(block[:: 2**12])
    after = peak_memory_bytes("cpu")
    del block
    assert before > 2**20
    assert after >= before + 100 * 2**20 or after > 300 * 2**20
    assert peak_memory_bytes("cpu") >= after
