"""Release files and power modes of boards, intact and broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from boards_in_folders import AGX, LAPTOP, NANO, NX, Board, FakeMachine
from hypothesis import given
from hypothesis import strategies as st

from jetson_ft.hardware.jetpack import L4T, PowerModes, read_l4t, read_power_modes


@pytest.mark.parametrize(
    ("board", "version", "jetpack", "major"),
    [(NANO, "36.4.3", "6.2", 6), (NX, "35.4.1", "5.1.2", 5), (AGX, "39.2.0", "7.2", 7)],
)
def test_release_file_gives_l4t_and_jetpack(
    board: Board, version: str, jetpack: str, major: int, tmp_path: Path
) -> None:
    FakeMachine(tmp_path, board)
    l4t = read_l4t(tmp_path)
    assert l4t and (str(l4t), l4t.jetpack, l4t.major) == (version, jetpack, major)


def test_unknown_release_gives_the_jetpack_of_its_series() -> None:
    assert L4T((36, 9, 1)).jetpack == "6" and L4T((36, 9, 1)).major == 6
    assert L4T((99, 0)).jetpack == "" and L4T((99, 0)).major == 0
    assert L4T((36, 4, 7)) < L4T((36, 5, 0))
    assert L4T((39, 2, 1)).jetpack == "7.2.1" and L4T((39, 2, 1)).series == 39


@pytest.mark.parametrize("text", ["", "# R36", "R36 (release), REVISION: x", "\0\xff"])
def test_broken_or_missing_release_file_gives_none(text: str, tmp_path: Path) -> None:
    FakeMachine(tmp_path, LAPTOP).write("etc/nv_tegra_release", text)
    assert read_l4t(tmp_path) is None
    assert read_l4t(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("names", "fastest"),
    [
        ({0: "15W", 1: "25W", 2: "MAXN_SUPER", 3: "7W"}, 2),
        ({0: "MAXN", 1: "10W", 2: "15W"}, 0),
        ({0: "15W", 1: "7W"}, 0), ({0: "7W", 1: "10W"}, 1),
        ({0: "MAXN", 1: "40W", 4: "MAXN_SUPER"}, 4), ({3: "ODD"}, 3),
    ],
)  # fmt: skip
def test_fastest_mode_is_maxn_or_has_most_watts(names: dict[int, str], fastest: int) -> None:
    assert PowerModes(names, 0).fastest == fastest


def test_power_modes_come_from_the_files_of_nvpmodel(tmp_path: Path) -> None:
    board = FakeMachine(tmp_path, NX)
    assert read_power_modes(tmp_path) == PowerModes(dict(NX.modes), 2)
    board.write("var/lib/nvpmodel/status", "pmode:0009")
    assert read_power_modes(tmp_path) is None, "a mode that isn't in the list"


@given(st.text(max_size=60), st.text(max_size=60))
def test_broken_nvpmodel_files_give_none_or_a_listed_mode(
    tmp_path_factory: Any, status: str, config: str
) -> None:
    root = tmp_path_factory.mktemp("board")
    board = FakeMachine(root, NANO)
    board.write("var/lib/nvpmodel/status", f"pmode:{status}")
    board.write("etc/nvpmodel.conf", f"< POWER_MODEL ID={config}")
    modes = read_power_modes(root)
    assert modes is None or modes.current in modes.names
