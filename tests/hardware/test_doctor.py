"""The doctor on fake boards: the checks that need no torch."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from boards_in_folders import AGX, LAPTOP, NANO, NX, Board, FakeMachine
from findings import find, machine, statuses
from huggingface_hub import constants

from jetson_ft.errors import Message
from jetson_ft.hardware import doctor
from jetson_ft.hardware.doctor import system

# --- whole machines ------------------------------------------------------------------------------


def test_intact_board_needs_no_fix(tmp_path: Path) -> None:
    board = FakeMachine(tmp_path, NANO)
    board.write("proc/swaps", "Filename Type Size Used Priority\n/swapfile file 8388604 0 -2\n")
    findings = [*system.examine(machine(board))]
    assert {key for key, status in statuses(findings).items() if status != "ok"} <= {
        "hub.offline", "disk.low",
    }  # fmt: skip
    assert set(statuses(findings)) >= {
        "board.jetson", "jetpack.supported", "power.fastest", "clocks.dynamic", "access.readable",
        "memory.enough", "swap.disk", "sensors.read",
    }  # fmt: skip
    assert str(find(findings, "jetpack").text) == "6.2 (L4T 36.4.3)"
    assert str(find(findings, "board").text).startswith("NVIDIA Jetson Orin Nano")
    assert str(find(findings, "sensors").text) == "tegrastats: 12 W, 62 °C, 97 % GPU"
    assert doctor.works(findings)


@pytest.mark.parametrize(
    ("board", "key", "status"),
    [
        (NANO, "jetpack.supported", "ok"), (NX, "jetpack.old", "failure"),
        (AGX, "jetpack.untried", "warning"),
    ],
)  # fmt: skip
def test_jetpack_5_fails_6_is_supported_and_7_2_untried(
    board: Board, key: str, status: str, tmp_path: Path
) -> None:
    findings = [*system.examine(machine(FakeMachine(tmp_path, board)))]
    assert statuses(findings)[key] == status
    assert doctor.works(findings) is (status != "failure")


@pytest.mark.parametrize(
    ("series", "key", "fix"),
    [(38, "jetpack.thor_only", "JetPack 7.2"), (47, "jetpack.unknown_series", "")],
)
def test_l4t_without_packages_gives_a_warning(
    series: int, key: str, fix: str, tmp_path: Path
) -> None:
    board = FakeMachine(tmp_path, AGX)
    board.write("etc/nv_tegra_release", AGX.release.replace("R39", f"R{series}"))
    finding = find(system.examine(machine(board)), "jetpack")
    assert (finding.key, finding.status) == (key, "warning")
    assert f"L4T {series}" in str(finding.text) and fix in str(finding.fix)


def test_laptop_gets_no_findings_on_jetsons(tmp_path: Path) -> None:
    findings = [*system.examine(machine(FakeMachine(tmp_path, LAPTOP)))]
    assert {finding.name for finding in findings} == {"board", "memory", "disk", "sensors", "hub"}
    assert doctor.works(findings)
    text = " ".join(f"{finding.text} {finding.fix}" for finding in findings)
    assert not re.search("tegra|nvpmodel|jtop|/dev/", text) and "not a Jetson" in text


def test_container_without_device_tree_is_a_jetson_by_its_release_file(tmp_path: Path) -> None:
    board = FakeMachine(tmp_path, NANO)
    (tmp_path / "proc/device-tree/model").unlink()
    assert machine(board).board == "NVIDIA Jetson"
    (tmp_path / "etc/nv_tegra_release").unlink()
    assert machine(board).board is None


# --- single checks -------------------------------------------------------------------------


def faulty_l4t(board: FakeMachine) -> None:
    board.write("etc/nv_tegra_release", NANO.release.replace("REVISION: 4.3", "REVISION: 4.7"))


def no_release(board: FakeMachine) -> None:
    (board.root / "etc/nv_tegra_release").unlink()


def slow_mode(board: FakeMachine) -> None:
    board.write("var/lib/nvpmodel/status", "pmode:0000")


def no_modes(board: FakeMachine) -> None:
    (board.root / "etc/nvpmodel.conf").unlink()


def fixed_clocks(board: FakeMachine) -> None:
    board.write("sys/class/devfreq/17000000.gpu/min_freq", "1020000000")


def no_nvmap(board: FakeMachine) -> None:
    (board.root / "dev/nvmap").unlink()


def memory(free_mib: int) -> Callable[[FakeMachine], None]:
    def change(board: FakeMachine) -> None:
        board.write("proc/meminfo",
                    f"MemTotal: 8000000 kB\nMemAvailable: {free_mib * 1024} kB\n")  # fmt: skip

    return change


def zram(board: FakeMachine) -> None:
    line = "/dev/zram0\tpartition\t635000\t0\t5\n"
    board.write("proc/swaps", "Filename\tType\tSize\tUsed\tPriority\n" + line * 6)


def jtop_of_another_version(board: FakeMachine) -> None:
    board.write("run/jtop.sock", "")


@pytest.mark.parametrize(
    ("change", "key", "status", "fix"),
    [
        (faulty_l4t, "l4t.allocation", "warning", "r36.5"),
        (no_release, "jetpack.unknown", "warning", "-v /etc/nv_tegra_release"),
        (slow_mode, "power.slower", "warning", "sudo nvpmodel -m 2"),
        (no_modes, "power.unknown", "warning", "nvpmodel -q"),
        (fixed_clocks, "clocks.fixed", "ok", ""),
        (no_nvmap, "access.missing", "failure", "--runtime nvidia"),
        (memory(3000), "memory.low_on_board", "warning", "sudo init 3"),
        (memory(500), "memory.too_little", "failure", "Close"),
        (zram, "swap.zram", "warning", "disable --now nvzramconfig"),
        (zram, "swap.none", "warning", "fallocate"),
        (jtop_of_another_version, "jtop.no_answer", "warning", "jetson-stats=="),
    ],
)
def test_fault_gives_a_finding_with_its_fix(
    change: Any, key: str, status: str, fix: str, tmp_path: Path
) -> None:
    board = FakeMachine(tmp_path, NANO)
    assert key not in statuses(system.examine(machine(board))) or key == "swap.none"
    change(board)
    findings = [*system.examine(machine(board))]
    assert statuses(findings)[key] == status
    (finding,) = [finding for finding in findings if finding.key == key]
    assert fix in str(finding.fix)


@pytest.mark.parametrize("node", ["nvmap", "nvhost-gpu", "renderD128"])
def test_unreadable_device_file_fails_with_its_group(
    node: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked, access = machine(FakeMachine(tmp_path, NANO)), os.access
    assert find(system.examine(checked), "access").status == "ok"
    # As root, this process may read every file.
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path).name != node and access(path, mode)
    )
    finding = find(system.examine(checked), "access")
    assert finding.status == "failure"
    assert f"{node} can't be read" in str(finding.text)
    assert str(finding.text).endswith(f"the group {checked.root.group()}")
    assert "usermod -aG video,render" in str(finding.fix)


def test_free_disk_space_decides_the_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = FakeMachine(tmp_path, LAPTOP)
    for free, key in ((10**11, "disk.enough"), (10**9, "disk.low"), (10**8, "disk.full")):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        assert key in statuses(system.examine(machine(board)))


def test_folders_of_one_disk_give_one_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("JETSON_FT_CACHE", str(tmp_path / "cache"))
    finding = find(system.examine(machine(FakeMachine(tmp_path / "board", LAPTOP))), "disk")
    for name in ("hf", "cache", "board/runs"):
        assert str(tmp_path / name) in str(finding.text)
    assert not (tmp_path / "hf").exists(), "checks create nothing"
    monkeypatch.setenv("HOME", str(tmp_path))
    finding = find(system.examine(machine(FakeMachine(tmp_path / "board", LAPTOP))), "disk")
    assert "for ~/board/runs, ~/cache, ~/hf" in str(finding.text)
    monkeypatch.setenv("HOME", tmp_path.name)  # only at the start of a path
    finding = find(system.examine(machine(FakeMachine(tmp_path / "board", LAPTOP))), "disk")
    assert "~" not in str(finding.text)


def test_memory_check_uses_available_memory(tmp_path: Path) -> None:
    """The page cache is available, though the GPU's driver counts it as used."""
    board = FakeMachine(tmp_path, NANO)
    board.write("proc/meminfo", "MemTotal: 8000000 kB\nMemFree: 100 kB\nMemAvailable: 6000000 kB\n")
    assert find(system.examine(machine(board)), "memory").status == "ok"


def limit_memory(board: FakeMachine, limit_mib: int, used_mib: int) -> None:
    board.write("proc/self/cgroup", "0::/\n")
    board.write("sys/fs/cgroup/memory.max", f"{limit_mib << 20}\n")
    board.write("sys/fs/cgroup/memory.current", f"{used_mib << 20}\n")


@pytest.mark.parametrize(
    ("limit", "used", "key", "status"),
    [(5120, 100, "enough", "ok"), (3072, 512, "low_by_limit", "warning"),
     (3072, 2560, "too_little", "failure")],
)  # fmt: skip
def test_memory_limit_is_shown_and_decides_the_status(
    limit: int, used: int, key: str, status: str, tmp_path: Path
) -> None:
    board = FakeMachine(tmp_path, NANO)
    limit_memory(board, limit, used)
    findings = [*system.examine(machine(board))]
    size, left = f"{limit / 1024:.1f}", f"{(limit - used) / 1024:.1f}"
    assert str(find(findings, "limit").text).startswith(f"{size} GiB")
    assert f"{left} GiB of it left" in str(find(findings, "limit").text)
    finding = find(findings, "memory")
    assert (finding.key, finding.status) == (f"memory.{key}", status)
    assert str(finding.text).startswith(f"{left} of {size} GiB free")
    assert ("docker run --memory" in str(finding.fix)) is (status != "ok")


def test_limit_above_the_machines_memory_is_not_shown(tmp_path: Path) -> None:
    board = FakeMachine(tmp_path, NANO)
    limit_memory(board, 100_000, 100)
    assert "limit.set" not in statuses(system.examine(machine(board)))


def test_memory_short_in_spite_of_the_limit_has_the_boards_fix(tmp_path: Path) -> None:
    board = FakeMachine(tmp_path, NANO)
    memory(3000)(board)
    limit_memory(board, 6000, 100)
    findings = [*system.examine(machine(board))]
    assert find(findings, "memory").key == "memory.low_on_board"
    assert find(findings, "limit").key == "limit.set"


# --- the hub -------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.HTTPServer(
        ("127.0.0.1", 0), http.server.BaseHTTPRequestHandler
    ) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http_server.server_port}"
        http_server.shutdown()


def test_hub_check_reports_offline_reachable_and_unreachable(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert system._hub().key == "hub.offline", "tests are offline"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", server)
    finding = system._hub()
    assert (finding.status, str(finding.text)) == ("ok", f"{server} answers")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    finding = system._hub()
    assert finding.status == "warning" and "embedded model" in str(finding.text)
    assert "HF_ENDPOINT" in str(finding.fix)


# --- output --------------------------------------------------------------------------------


@pytest.mark.parametrize("board", [NANO, NX, AGX, LAPTOP])
def test_json_has_english_texts_and_messages_to_translate(board: Board, tmp_path: Path) -> None:
    findings = [*system.examine(machine(FakeMachine(tmp_path, board)))]
    data = json.loads(json.dumps(doctor.as_json(findings)))
    assert data["schema"] == 1 and data["works"] is (board is not NX)
    for check, finding in zip(data["checks"], findings, strict=True):
        assert (check["name"], check["key"]) == (finding.name, finding.key)
        for part in ("title", "text", "fix"):
            message = Message.from_json(check["messages"][part])
            assert str(message) == check[part] == str(getattr(finding, part))
    if board is NX:
        jetpack = next(check for check in data["checks"] if check["name"] == "jetpack")
        assert jetpack["status"] == "failure" and "JetPack 6" in jetpack["fix"]
        assert "is not supported" in jetpack["text"]


@pytest.mark.slow
def test_quick_checks_come_first_and_load_no_torch() -> None:
    code = (
        "import sys; from jetson_ft.hardware import doctor\n"
        "for finding in doctor.examine(doctor.Machine()):\n"
        "    if finding.name == 'torch': break\n"
        "    assert 'torch' not in sys.modules and 'gradio' not in sys.modules, finding\n"
        "else: sys.exit('no torch')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
