"""The modules' figures agree with each other and with the published ones."""

from __future__ import annotations

import pytest

from jetson_ft.errors import UserError
from jetson_ft.hardware.boards import BOARD_CLASSES, BOARDS, Board, find_board

# Dense INT8 operations per second on the GPU, half of the data sheets' sparse figures. The FP16
# rate is half of these again.
DENSE_INT8 = {
    "orin-nano-4gb": 10e12, "orin-nano-8gb": 20e12, "orin-nano-8gb-super": 33.5e12,
    "agx-orin-32gb": 54e12, "agx-orin-64gb": 85e12,
}  # fmt: skip


@pytest.mark.parametrize(("name", "int8"), DENSE_INT8.items())
def test_fp16_peak_is_half_of_the_published_int8_peak(name: str, int8: float) -> None:
    assert find_board(name).flops("fp16") == pytest.approx(int8 / 2, rel=0.03)


@pytest.mark.parametrize("board", BOARDS.values(), ids=lambda board: board.name)
def test_every_board_leaves_memory_to_the_system_and_prefers_bf16(board: Board) -> None:
    device = board.device()
    assert 0 < device.memory_available < device.memory_total == board.memory_gib * 2**30
    assert board.flops("fp32") < board.flops("bf16") == board.flops("fp16")
    assert device.integrated and device.precision("auto") == "bf16"


def test_available_memory_of_the_known_module_is_the_published_one() -> None:
    device = find_board("orin-nano-8gb").device()
    assert device.memory_available == pytest.approx(5.2e9, rel=0.01)


@pytest.mark.parametrize(
    ("name", "cores"), [("orin-nano-4gb", 6), ("orin-nx-16gb", 8), ("agx-orin-64gb", 12)]
)
def test_modules_have_the_cores_of_their_data_sheet(name: str, cores: int) -> None:
    assert find_board(name).device().cores == cores


def test_each_memory_size_has_its_slowest_module() -> None:
    names = {memory: board.name for memory, board in sorted(BOARD_CLASSES.items())}
    assert names == {
        8: "orin-nano-8gb", 16: "orin-nx-16gb", 32: "agx-orin-32gb", 64: "agx-orin-64gb",
    }  # fmt: skip


def test_mistyped_name_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean orin-nx-16gb") as raised:
        find_board("orin-nx-16g")
    assert str(raised.value.where) == "orin-nx-16g"
