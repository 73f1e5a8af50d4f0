"""The doctor, before boards that are folders, and before this machine."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import string
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from boards_in_folders import AGX, LAPTOP, NANO, NX, Board, Folder

from jetson_ft.device import doctor
from jetson_ft.device.doctor import arithmetic, finding, system
from jetson_ft.device.doctor.finding import Finding, Machine
from jetson_ft.device.doctor.words import FINDINGS, TITLES


def machine(board: Folder, **changes: Any) -> Machine:
    """As its own user, who is in the group of the device files."""
    path = board.tegrastats() if board.board.model else ""
    return replace(Machine(board.root, path, board.root / "runs"), **changes)


def keys(found: Any) -> dict[str, str]:
    """What was found, with its weight."""
    return {one.key: one.status for one in found}


def one(found: Any, name: str) -> Finding:
    (chosen,) = [finding for finding in found if finding.name == name]
    return chosen


# --- whole machines ------------------------------------------------------------------------------


def test_a_sound_board_has_nothing_to_mend(tmp_path: Path) -> None:
    board = Folder(tmp_path, NANO)
    board.write("proc/swaps", "Filename Type Size Used Priority\n/swapfile file 8388604 0 -2\n")
    found = [*system.examine(machine(board))]
    assert {key for key, status in keys(found).items() if status != "ok"} <= {
        "hub.told", "disk.tight",
    }  # fmt: skip
    assert set(keys(found)) >= {
        "board.jetson", "jetpack.supported", "power.fastest", "clocks.follow", "access.fine",
        "memory.enough", "swap.disk", "sensors.read",
    }  # fmt: skip
    assert one(found, "jetpack").found() == "6.2 (L4T 36.4.3)"
    assert one(found, "board").found().startswith("NVIDIA Jetson Orin Nano")
    assert one(found, "sensors").found() == "tegrastats: 12 W, 62 °C, 97 % GPU"
    assert doctor.works(found)


@pytest.mark.parametrize(
    ("board", "key", "status"),
    [
        (NANO, "jetpack.supported", "ok"), (NX, "jetpack.old", "failure"),
        (AGX, "jetpack.untried", "warning"),
    ],
)  # fmt: skip
def test_jetpack_5_is_refused_6_supported_and_7_untried(
    board: Board, key: str, status: str, tmp_path: Path
) -> None:
    found = [*system.examine(machine(Folder(tmp_path, board)))]
    assert keys(found)[key] == status
    assert doctor.works(found) is (status != "failure")


def test_a_laptop_hears_nothing_of_boards(tmp_path: Path) -> None:
    found = [*system.examine(machine(Folder(tmp_path, LAPTOP)))]
    assert {finding.name for finding in found} == {"board", "memory", "disk", "sensors", "hub"}
    assert doctor.works(found)
    said = " ".join(finding.found() + finding.fix() for finding in found)
    assert not re.search("tegra|nvpmodel|jtop|/dev/", said) and "no Jetson" in said


def test_a_container_that_hides_the_boards_name_is_still_one(tmp_path: Path) -> None:
    board = Folder(tmp_path, NANO)
    (tmp_path / "proc/device-tree/model").unlink()
    assert machine(board).board == "NVIDIA Jetson"
    (tmp_path / "etc/nv_tegra_release").unlink()
    assert machine(board).board is None


# --- one thing at a time -------------------------------------------------------------------------


def fault_l4t(board: Folder) -> None:
    board.write("etc/nv_tegra_release", NANO.release.replace("REVISION: 4.3", "REVISION: 4.7"))


def no_release(board: Folder) -> None:
    (board.root / "etc/nv_tegra_release").unlink()


def slow_mode(board: Folder) -> None:
    board.write("var/lib/nvpmodel/status", "pmode:0000")


def no_modes(board: Folder) -> None:
    (board.root / "etc/nvpmodel.conf").unlink()


def fixed_clocks(board: Folder) -> None:
    board.write("sys/class/devfreq/17000000.gpu/min_freq", "1020000000")


def no_nvmap(board: Folder) -> None:
    (board.root / "dev/nvmap").unlink()


def memory(free_mib: int) -> Any:
    def change(board: Folder) -> None:
        board.write("proc/meminfo",
                    f"MemTotal: 8000000 kB\nMemAvailable: {free_mib * 1024} kB\n")  # fmt: skip

    return change


def zram(board: Folder) -> None:
    line = "/dev/zram0\tpartition\t635000\t0\t5\n"
    board.write("proc/swaps", "Filename\tType\tSize\tUsed\tPriority\n" + line * 6)


def jtop_of_another_version(board: Folder) -> None:
    board.write("run/jtop.sock", "")


@pytest.mark.parametrize(
    ("change", "key", "status", "fix"),
    [
        (fault_l4t, "l4t.allocation", "warning", "r36.5"),
        (no_release, "jetpack.unknown", "warning", "-v /etc/nv_tegra_release"),
        (slow_mode, "power.slower", "warning", "sudo nvpmodel -m 2"),
        (no_modes, "power.unknown", "warning", "nvpmodel -q"),
        (fixed_clocks, "clocks.fixed", "ok", ""),
        (no_nvmap, "access.missing", "failure", "--runtime nvidia"),
        (memory(3000), "memory.board", "warning", "sudo init 3"),
        (memory(500), "memory.none", "failure", "Close"),
        (zram, "swap.zram", "warning", "disable --now nvzramconfig"),
        (zram, "swap.none", "warning", "fallocate"),
        (jtop_of_another_version, "jtop.silent", "warning", "jetson-stats=="),
    ],
)
def test_each_fault_is_found_and_mended(
    change: Any, key: str, status: str, fix: str, tmp_path: Path
) -> None:
    board = Folder(tmp_path, NANO)
    assert key not in keys(system.examine(machine(board))) or key == "swap.none"
    change(board)
    found = [*system.examine(machine(board))]
    assert keys(found)[key] == status
    (told,) = [one for one in found if one.key == key]
    assert fix in told.fix()


@pytest.mark.parametrize(
    ("mode", "groups", "status"),
    [(0o440, {0}, "ok"), (0o440, {65534}, "failure"), (0o444, {65534}, "ok"),
     (0o400, {0}, "failure")],
)  # fmt: skip
def test_device_files_must_be_readable_by_group(
    mode: int, groups: set[int], status: str, tmp_path: Path
) -> None:
    board = Folder(tmp_path, NANO)
    for path in (tmp_path / "dev").rglob("*"):
        if path.is_file():
            os.chown(path, 0, 0)
            path.chmod(0o444)
    (tmp_path / "dev/nvmap").chmod(mode)
    him = machine(board, user=65534, groups=frozenset(groups))
    found = one(system.examine(him), "access")
    assert found.status == status
    if status == "failure":
        assert "/dev/nvmap" in found.found() and "usermod -aG video,render" in found.fix()
    assert one(system.examine(machine(board, user=0)), "access").status == "ok"


def test_a_disk_is_judged_by_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = Folder(tmp_path, LAPTOP)
    for free, key in ((10**11, "disk.enough"), (10**9, "disk.tight"), (10**8, "disk.full")):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        assert key in keys(system.examine(machine(board)))


def test_places_of_one_disk_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("JETSON_FT_CACHE", str(tmp_path / "cache"))
    found = one(system.examine(machine(Folder(tmp_path / "board", LAPTOP))), "disk")
    for place in ("hf", "cache", "board/runs"):
        assert str(tmp_path / place) in found.found()
    assert not (tmp_path / "hf").exists(), "looking makes nothing"
    monkeypatch.setenv("HOME", str(tmp_path))
    found = one(system.examine(machine(Folder(tmp_path / "board", LAPTOP))), "disk")
    assert "for ~/board/runs, ~/cache, ~/hf" in found.found()
    monkeypatch.setenv("HOME", tmp_path.name)  # only at the start of a path
    found = one(system.examine(machine(Folder(tmp_path / "board", LAPTOP))), "disk")
    assert "~" not in found.found()


def test_memory_is_what_is_available_and_not_what_is_free(tmp_path: Path) -> None:
    """The page cache can be had back, though the GPU's driver doesn't count it."""
    board = Folder(tmp_path, NANO)
    board.write("proc/meminfo", "MemTotal: 8000000 kB\nMemFree: 100 kB\nMemAvailable: 6000000 kB\n")
    assert one(system.examine(machine(board)), "memory").status == "ok"


# --- the hub -------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()


def test_the_hub_or_its_mirror_is_asked(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert system._hub().key == "hub.told", "tests are offline"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", server)
    assert (system._hub().status, system._hub().found()) == ("ok", f"{server} answers")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    away = system._hub()
    assert away.status == "warning" and "embedded model" in away.found()
    assert "HF_ENDPOINT" in away.fix()


# --- torch, GPU, bitsandbytes --------------------------------------------------------------------


def test_this_machine_computes_right() -> None:
    found = [*arithmetic.examine(Machine())]
    assert one(found, "torch").status == "ok" and one(found, "bitsandbytes").status == "ok"
    assert doctor.works(found)


def test_nf4_kernels_that_fail_or_lie_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes
    import torch

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Error named symbol not found at line 74 in file ops.cu")

    right = bitsandbytes.matmul_4bit
    for lie in (fail, lambda *a, **k: right(*a, **k) * 1.01):
        monkeypatch.setattr(bitsandbytes, "matmul_4bit", lie)
        found = arithmetic._bitsandbytes(torch, "cpu", Machine())
        assert (found.key, found.status) == ("bitsandbytes.broken", "warning")
    monkeypatch.setattr(bitsandbytes, "matmul_4bit", right)
    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", fail)
    found = arithmetic._bitsandbytes(torch, "cpu", Machine())
    assert "named symbol not found" in found.found()


def test_on_a_board_the_fix_builds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "_error_of_nf4", lambda *_: float("nan"))
    found = arithmetic._bitsandbytes(None, "cuda", machine(Folder(tmp_path, NANO)))
    assert found.status == "warning" and "CAPABILITY=87" in found.fix()
    monkeypatch.setattr(arithmetic, "_version", lambda: "")
    assert arithmetic._bitsandbytes(None, "cuda", Machine()).key == "bitsandbytes.missing"


def torch_for(cuda: str | None, **gpu: Any) -> Any:
    """What the doctor asks of torch, as a build for another machine would answer."""
    return SimpleNamespace(
        __version__="2.8.0", version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(**{"is_available": lambda: False, "init": lambda: None} | gpu),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("cuda", "board", "smi", "key"),
    [
        ("12.6", NANO, False, "torch.cuda"), (None, NANO, False, "torch.cpu_on_board"),
        (None, LAPTOP, True, "torch.cpu_with_gpu"), (None, LAPTOP, False, "torch.cpu"),
    ],
)  # fmt: skip
def test_the_build_of_torch_fits_the_machine(
    cuda: str | None, board: Board, smi: bool, key: str, tmp_path: Path
) -> None:
    made = Folder(tmp_path, board)
    path = made.program("nvidia-smi", "") if smi else ""
    found = arithmetic._torch(torch_for(cuda), machine(made, path=path))
    weight = {"torch.cpu_on_board": "failure", "torch.cpu_with_gpu": "warning"}
    assert (found.key, found.status) == (key, weight.get(key, "ok"))


def gpu(built: list[str], off: float | Exception, monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    def product(*_: Any) -> float:
        if isinstance(off, Exception):
            raise off
        return off

    monkeypatch.setattr(arithmetic, "_error_of_product", product)
    orin = SimpleNamespace(name="Orin", major=8, minor=7, is_integrated=True)
    torch = torch_for(
        "12.6", get_device_properties=lambda _: orin, get_arch_list=lambda: built,
    )  # fmt: skip
    torch.bfloat16 = "bf16"
    return [*arithmetic._gpu(torch)]


@pytest.mark.parametrize(
    ("built", "off", "key", "status"),
    [
        (["sm_87"], 0.001, "gpu.right", "ok"),
        (["sm_80", "sm_90"], 0.001, "gpu.other_arch", "warning"),
        (["sm_87"], 0.5, "gpu.wrong", "failure"),
        (["sm_90"], RuntimeError("no kernel image is available\nmore"), "gpu.kernels", "failure"),
    ],
)
def test_a_gpu_is_judged_by_what_it_computes(
    built: list[str], off: Any, key: str, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (found,) = gpu(built, off, monkeypatch)
    assert (found.key, found.status) == (key, status)
    assert "sm_87" in found.found() and "\n" not in found.found()


def test_a_board_whose_gpu_cant_be_used_says_what_the_driver_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise RuntimeError("CUDA driver initialization failed: error 801")

    monkeypatch.setitem(sys.modules, "torch", torch_for("12.6", init=refuse))
    monkeypatch.setattr(arithmetic, "_bitsandbytes", lambda *_: finding.ok("gpu.none"))
    found = [*arithmetic.examine(machine(Folder(tmp_path, NANO)))]
    assert "error 801" in one(found[:2], "gpu").found() and not doctor.works(found)


def test_a_torch_that_doesnt_load_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    (found,) = arithmetic.examine(Machine())
    assert (found.key, found.status) == ("torch.broken", "failure")


# --- what is said --------------------------------------------------------------------------------


def test_every_text_is_there_in_both_languages_with_the_same_braces() -> None:
    def braces(text: str) -> set[str]:
        return {name for _, name, _, _ in string.Formatter().parse(text) if name}

    for key, words in FINDINGS.items():
        assert key.partition(".")[0] in TITLES
        english, chinese = words.found
        assert braces(english) == braces(chinese), key
        if not isinstance(words.fix, str):
            assert braces(words.fix[0]) == braces(words.fix[1]), key
        assert re.search(r"[\u4e00-\u9fff]", chinese) or braces(chinese), key


def test_every_key_is_used_and_declared() -> None:
    source = "".join(
        path.read_text() for path in Path(doctor.__file__).parent.glob("*.py")
        if path.name != "words.py"
    )  # fmt: skip
    used = set(re.findall(r'"([a-z0-9]+\.[a-z_0-9]+)"', source))
    assert used == set(FINDINGS)


def test_json_is_for_programs(tmp_path: Path) -> None:
    found = [*system.examine(machine(Folder(tmp_path, NX)))]
    told = json.loads(json.dumps(doctor.as_json(found)))
    assert told["schema"] == 1 and told["works"] is False
    jetpack = next(check for check in told["checks"] if check["name"] == "jetpack")
    assert jetpack["status"] == "failure" and "不支持" in jetpack["found"]["zh"]
    assert "is not supported" in jetpack["found"]["en"] and "JetPack 6" in jetpack["fix"]["en"]


@pytest.mark.slow
def test_looking_loads_no_torch_before_the_quick_ones_are_told() -> None:
    code = (
        "import sys; from jetson_ft.device import doctor\n"
        "for found in doctor.examine(doctor.Machine()):\n"
        "    if found.name == 'torch': break\n"
        "    assert 'torch' not in sys.modules and 'gradio' not in sys.modules, found\n"
        "else: sys.exit('no torch')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
