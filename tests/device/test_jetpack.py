"""Release files and power modes, as boards have them and as they may be broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from boards_in_folders import AGX, LAPTOP, NANO, NX, Board, Folder
from hypothesis import given
from hypothesis import strategies as st

from jetson_ft.device.jetpack import L4T, PowerModes, l4t, power_modes


@pytest.mark.parametrize(
    ("board", "version", "jetpack", "major"),
    [(NANO, "36.4.3", "6.2", 6), (NX, "35.4.1", "5.1.2", 5), (AGX, "39.2.0", "7.2", 7)],
)
def test_the_release_file_tells_l4t_and_jetpack(
    board: Board, version: str, jetpack: str, major: int, tmp_path: Path
) -> None:
    Folder(tmp_path, board)
    found = l4t(tmp_path)
    assert found and (str(found), found.jetpack, found.major) == (version, jetpack, major)


def test_an_unknown_release_goes_by_its_series() -> None:
    assert L4T((36, 9, 1)).jetpack == "6" and L4T((36, 9, 1)).major == 6
    assert L4T((99, 0)).jetpack == "" and L4T((99, 0)).major == 0
    assert L4T((36, 4, 7)) < L4T((36, 5, 0))


@pytest.mark.parametrize("text", ["", "# R36", "R36 (release), REVISION: x", "\0\xff"])
def test_what_is_no_release_file_is_none(text: str, tmp_path: Path) -> None:
    Folder(tmp_path, LAPTOP).write("etc/nv_tegra_release", text)
    assert l4t(tmp_path) is None
    assert l4t(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("names", "fastest"),
    [
        ({0: "15W", 1: "25W", 2: "MAXN_SUPER", 3: "7W"}, 2),
        ({0: "MAXN", 1: "10W", 2: "15W"}, 0),
        ({0: "15W", 1: "7W"}, 0), ({0: "7W", 1: "10W"}, 1),
        ({0: "MAXN", 1: "40W", 4: "MAXN_SUPER"}, 4), ({3: "ODD"}, 3),
    ],
)  # fmt: skip
def test_the_fastest_mode_goes_by_its_name(names: dict[int, str], fastest: int) -> None:
    assert PowerModes(names, 0).fastest == fastest


def test_modes_are_read_from_nvpmodels_files(tmp_path: Path) -> None:
    board = Folder(tmp_path, NX)
    assert power_modes(tmp_path) == PowerModes(dict(NX.modes), 2)
    board.write("var/lib/nvpmodel/status", "pmode:0009")
    assert power_modes(tmp_path) is None, "a mode that isn't in the list"


@given(st.text(max_size=60), st.text(max_size=60))
def test_broken_files_raise_nothing(tmp_path_factory: Any, status: str, config: str) -> None:
    root = tmp_path_factory.mktemp("board")
    board = Folder(root, NANO)
    board.write("var/lib/nvpmodel/status", f"pmode:{status}")
    board.write("etc/nvpmodel.conf", f"< POWER_MODEL ID={config}")
    found = power_modes(root)
    assert found is None or found.current in found.names
