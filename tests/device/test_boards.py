"""The modules' figures agree with each other and with what is published of them."""

from __future__ import annotations

import pytest

from jetson_ft.device.boards import BOARDS, Board, find
from jetson_ft.errors import UserError

# Dense INT8 operations a second on the GPU, half of the data sheets' sparse figures. The
# formula's FP16 rate is half of these again.
DENSE_INT8 = {
    "orin-nano-4gb": 10e12, "orin-nano-8gb": 20e12, "orin-nano-8gb-super": 33.5e12,
    "agx-orin-32gb": 54e12, "agx-orin-64gb": 85e12,
}  # fmt: skip


@pytest.mark.parametrize(("name", "int8"), DENSE_INT8.items())
def test_the_fp16_peak_is_half_of_the_published_int8_peak(name: str, int8: float) -> None:
    assert find(name).flops("fp16") == pytest.approx(int8 / 2, rel=0.03)


@pytest.mark.parametrize("board", BOARDS.values(), ids=str)
def test_a_run_never_has_all_of_the_memory(board: Board) -> None:
    assert 0 < board.usable < board.memory
    assert board.flops("fp32") < board.flops("bf16") == board.flops("fp16")
    device = board.device()
    assert device.memory_available == board.usable and device.integrated
    assert device.precision("auto") == "bf16"


def test_the_rule_gives_the_module_it_was_taken_from() -> None:
    assert find("orin-nano-8gb").usable == pytest.approx(5.2e9, rel=0.01)


def test_a_mistyped_name_is_met_with_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean orin-nx-16gb"):
        find("orin-nx-16g")
