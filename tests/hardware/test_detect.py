"""Detection of this machine, from samples of what Linux shows."""

from __future__ import annotations

import os
import platform
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from jetson_ft.hardware import cgroup, detect
from jetson_ft.hardware.detect import Device, board_name, cpu_has_bf16, cpu_name, usable_cores

SAPPHIRE_RAPIDS = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
flags\t\t: fpu sse2 avx2 avx512f avx512_bf16 amx_bf16 amx_tile
bugs\t\t: spectre_v1

processor\t: 1
model name\t: another one
flags\t\t: fpu
"""
SKYLAKE = "model name\t: Intel(R) Xeon(R) Gold 6130\nflags\t\t: fpu avx2 avx512f avx512vl\n"
ORIN = """processor\t: 0
BogoMIPS\t: 62.50
Features\t: fp asimd evtstrm aes crc32 atomics fphp asimdhp cpuid asimddp
CPU implementer\t: 0x41
CPU part\t: 0xd42
"""
GRACE = ORIN.replace("asimddp", "asimddp sve i8mm bf16")
BOARD = "NVIDIA Jetson Orin NX Engineering Reference Developer Kit"


@pytest.mark.parametrize(
    ("cpuinfo", "has_bf16"),
    [(SAPPHIRE_RAPIDS, True), (SKYLAKE, False), (ORIN, False), (GRACE, True), ("", False)],
)
def test_bf16_instructions_are_detected_by_cpu_flags(cpuinfo: str, has_bf16: bool) -> None:
    assert cpu_has_bf16(cpuinfo) is has_bf16


def test_part_of_a_flag_is_not_bf16() -> None:
    assert not cpu_has_bf16("flags\t: avx512_bf16x not_bf16\nmodel name\t: bf16\n")


def test_cpu_name_is_the_first_marketing_name() -> None:
    assert cpu_name(SAPPHIRE_RAPIDS) == "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz"


def test_cpu_without_marketing_name_gives_the_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert cpu_name(ORIN) == "aarch64"


@pytest.mark.parametrize("path", ["proc/device-tree/model", "tmp/nv_jetson_model"])
def test_device_tree_or_its_copy_gives_the_name_of_the_jetson(tmp_path: Path, path: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_bytes(BOARD.encode() + b"\0")
    assert board_name(tmp_path) == BOARD


@pytest.mark.parametrize("content", [None, b"Raspberry Pi 4 Model B Rev 1.4\0", b"", b"\xff\0"])
def test_other_device_tree_gives_no_board(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "proc/device-tree").mkdir(parents=True)
        (tmp_path / "proc/device-tree/model").write_bytes(content)
    assert board_name(tmp_path) is None


def test_release_file_without_device_tree_gives_an_unnamed_jetson(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text("# R36 (release), REVISION: 4.3, GCID: 1")
    assert board_name(tmp_path) == "NVIDIA Jetson"


def test_machine_without_gpu_has_no_cuda_gpu_and_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; from jetson_ft.hardware import detect;"
        f"print(detect.has_cuda_gpu(pathlib.Path({str(tmp_path)!r})), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("usable", [True, False])
@pytest.mark.parametrize(
    "sign", ["dev/nvidia0", "dev/nvhost-gpu", "dev/nvgpu/igpu0/ctrl", "bin/nvidia-smi"]
)
def test_machine_that_shows_a_gpu_has_a_cuda_gpu_if_torch_can_use_it(
    sign: str, usable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / sign
    file.parent.mkdir(parents=True)
    file.touch()
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    assert (shutil.which("nvidia-smi") is not None) == (sign == "bin/nvidia-smi")
    assert detect.has_cuda_gpu(tmp_path) is usable


def test_usable_cores_are_those_of_the_process() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


CPU = Device("cpu", "x", None, 2, 8 << 30, 4 << 30, integrated=False, fast_bf16=False)


@pytest.mark.parametrize(
    ("kind", "fast_bf16", "precision"),
    [
        ("cpu", False, "fp32"),
        ("cpu", True, "bf16"),
        ("cuda", True, "bf16"),
        ("cuda", False, "fp16"),
    ],
)
def test_auto_precision_is_the_fastest_that_is_safe(
    kind: str, fast_bf16: bool, precision: str
) -> None:
    assert replace(CPU, kind=kind, fast_bf16=fast_bf16).precision("auto") == precision


@pytest.mark.parametrize("setting", ["fp32", "bf16", "fp16"])
def test_set_precision_is_used(setting: str) -> None:
    assert CPU.precision(setting) == setting


def test_machine_without_gpu_is_a_cpu_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(detect, "read_text", lambda path: SAPPHIRE_RAPIDS)
    device = detect.detect_device()
    assert (device.kind, device.integrated, device.fast_bf16) == ("cpu", False, True)
    assert device.name.startswith("Intel(R) Xeon(R)")
    assert device.memory_total == psutil.virtual_memory().total
    assert 0 < device.memory_available <= device.memory_total
    assert device.cores == usable_cores()


@pytest.mark.parametrize("integrated", [True, False])
def test_integrated_gpu_has_the_available_memory_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, integrated: bool
) -> None:
    class Properties:
        name, total_memory, major, is_integrated = "Orin", 16 << 30, 8, integrated

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (7, 16 << 30))
    device = detect.detect_device()
    assert (device.kind, device.name, device.fast_bf16) == ("cuda", "Orin", True)
    assert device.memory_total == 16 << 30
    assert device.integrated is integrated
    assert (device.memory_available == 7) is not integrated


@pytest.mark.parametrize("kind", ["cpu", "integrated", "discrete"])
def test_limit_of_the_control_group_limits_shared_memory_only(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Properties:
        name, total_memory, major, is_integrated = "Orin", 16 << 30, 8, kind == "integrated"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: kind != "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (7 << 30, 16 << 30))
    monkeypatch.setattr(cgroup, "memory_limit", lambda: cgroup.MemoryLimit(2 << 20, 1 << 20))
    device = detect.detect_device()
    limited = (16 << 30, 7 << 30) if kind == "discrete" else (2 << 20, 1 << 20)
    assert (device.memory_total, device.memory_available) == limited


def test_available_memory_applies_below_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = psutil.virtual_memory()._replace(total=8 << 30, available=3 << 30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cgroup, "memory_limit", lambda: cgroup.MemoryLimit(6 << 30, 5 << 30))
    device = detect.detect_device()
    assert (device.memory_total, device.memory_available) == (6 << 30, 3 << 30)


# --- without torch -----------------------------------------------------------------------------


def test_a_machine_without_a_driver_is_estimated_as_its_processor(tmp_path: Path) -> None:
    assert detect.estimate_device(tmp_path).kind == "cpu"


def test_a_board_is_estimated_with_its_gpu(tmp_path: Path) -> None:
    (tmp_path / "dev" / "nvgpu" / "igpu0").mkdir(parents=True)
    (tmp_path / "dev" / "nvgpu" / "igpu0" / "ctrl").touch()
    device = detect.estimate_device(tmp_path)
    assert (device.kind, device.integrated, device.fast_bf16) == ("cuda", True, True)
    assert device.memory_total == detect.detect_cpu().memory_total


def test_a_gpus_memory_is_its_drivers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import pynvml

    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").touch()
    assert detect.estimate_device(tmp_path).kind in ("cpu", "cuda")  # here without a driver
    memory = type("Memory", (), {"total": 24 * 2**30, "free": 20 * 2**30})
    for name, value in {
        "Init": None, "DeviceGetHandleByIndex": 1, "DeviceGetMemoryInfo": memory,
        "DeviceGetCudaComputeCapability": (7, 5), "DeviceGetName": "T4",
    }.items():  # fmt: skip
        monkeypatch.setattr(pynvml, f"nvml{name}", lambda *_, value=value: value)
    device = detect.estimate_device(tmp_path)
    assert (device.kind, device.name, device.fast_bf16) == ("cuda", "T4", False)
    assert device.memory_available == 20 * 2**30 and not device.integrated


def test_a_measured_speed_is_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JETSON_FT_CACHE", str(tmp_path))
    assert detect.remembered_flops("cpu", "fp32") is None
    assert detect.measure_flops("cpu", "fp32") == detect.remembered_flops("cpu", "fp32")
    assert detect.remembered_flops("cpu", "bf16") is None
    for broken in ("[]", "{", '{"cpu fp32": "x"}', '{"cpu fp32": -1.0}'):
        (tmp_path / "flops.json").write_text(broken)
        assert detect.remembered_flops("cpu", "fp32") is None
