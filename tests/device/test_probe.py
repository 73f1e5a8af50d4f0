"""What a machine says about itself, read from samples of what Linux shows."""

from __future__ import annotations

import os
import platform
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from jetson_ft.device import probe
from jetson_ft.device.probe import Device, board_name, cpu_has_bf16, cpu_name, usable_cores

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
def test_bf16_is_fast_where_the_processor_has_instructions_for_it(
    cpuinfo: str, has_bf16: bool
) -> None:
    assert cpu_has_bf16(cpuinfo) is has_bf16


def test_a_flag_is_a_whole_word() -> None:
    assert not cpu_has_bf16("flags\t: avx512_bf16x not_bf16\nmodel name\t: bf16\n")


def test_a_processor_goes_by_its_first_marketing_name() -> None:
    assert cpu_name(SAPPHIRE_RAPIDS) == "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz"


def test_where_there_is_none_the_architecture_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert cpu_name(ORIN) == "aarch64"


@pytest.mark.parametrize("place", ["proc/device-tree/model", "tmp/nv_jetson_model"])
def test_a_jetson_is_known_by_its_device_tree(tmp_path: Path, place: str) -> None:
    file = tmp_path / place
    file.parent.mkdir(parents=True)
    file.write_bytes(BOARD.encode() + b"\0")
    assert board_name(tmp_path) == BOARD


@pytest.mark.parametrize("content", [None, b"Raspberry Pi 4 Model B Rev 1.4\0", b"", b"\xff\0"])
def test_another_machine_is_no_board(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "proc/device-tree").mkdir(parents=True)
        (tmp_path / "proc/device-tree/model").write_bytes(content)
    assert board_name(tmp_path) is None


def test_cores_are_those_this_process_may_use() -> None:
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
def test_auto_is_the_fastest_arithmetic_that_is_safe(
    kind: str, fast_bf16: bool, precision: str
) -> None:
    assert replace(CPU, kind=kind, fast_bf16=fast_bf16).precision("auto") == precision


@pytest.mark.parametrize("wanted", ["fp32", "bf16", "fp16"])
def test_a_wanted_arithmetic_is_used(wanted: str) -> None:
    assert CPU.precision(wanted) == wanted


def test_a_machine_without_gpu_is_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(probe, "_read_cpuinfo", lambda: SAPPHIRE_RAPIDS)
    found = probe.probe()
    assert (found.kind, found.integrated, found.fast_bf16) == ("cpu", False, True)
    assert found.name.startswith("Intel(R) Xeon(R)")
    assert found.memory_total == psutil.virtual_memory().total
    assert 0 < found.memory_available <= found.memory_total
    assert found.as_json()["cores"] == usable_cores()


@pytest.mark.parametrize("integrated", [True, False])
def test_of_a_gpu_that_shares_memory_the_machine_says_what_is_free(
    monkeypatch: pytest.MonkeyPatch, integrated: bool
) -> None:
    class Properties:
        name, total_memory, major, is_integrated = "Orin", 16 << 30, 8, integrated

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (7, 16 << 30))
    found = probe.probe()
    assert (found.kind, found.name, found.fast_bf16) == ("cuda", "Orin", True)
    assert found.memory_total == 16 << 30
    assert found.integrated is integrated
    assert (found.memory_available == 7) is not integrated
