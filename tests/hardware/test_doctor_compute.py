"""The doctor's checks of torch, the GPU and bitsandbytes."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from boards_in_folders import AGX, LAPTOP, NANO, Board, FakeMachine
from findings import find, machine

from jetson_ft.hardware import detect, doctor
from jetson_ft.hardware.doctor import compute
from jetson_ft.hardware.doctor.finding import Finding, Machine, ok


def test_this_machine_computes_correctly() -> None:
    findings = [*compute.examine(Machine())]
    assert find(findings, "torch").status == "ok" and find(findings, "bitsandbytes").status == "ok"
    assert doctor.works(findings)


def test_failing_or_wrong_nf4_kernels_give_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes
    import torch

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Error named symbol not found at line 74 in file ops.cu")

    original = bitsandbytes.matmul_4bit
    for broken in (fail, lambda *a, **k: original(*a, **k) * 1.01):
        monkeypatch.setattr(bitsandbytes, "matmul_4bit", broken)
        finding = compute._bitsandbytes(torch, "cpu", Machine())
        assert (finding.key, finding.status) == ("bitsandbytes.broken", "warning")
    monkeypatch.setattr(bitsandbytes, "matmul_4bit", original)
    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", fail)
    finding = compute._bitsandbytes(torch, "cpu", Machine())
    assert "named symbol not found" in str(finding.text)


def test_broken_bitsandbytes_on_a_board_has_the_build_as_its_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compute, "_nf4_error", lambda *_: float("nan"))
    finding = compute._bitsandbytes(None, "cuda", machine(FakeMachine(tmp_path, NANO)))
    assert finding.status == "warning" and "CAPABILITY=87" in str(finding.fix)
    jetpack_7 = machine(FakeMachine(tmp_path / "agx", AGX))
    fix = str(compute._bitsandbytes(None, "cuda", jetpack_7).fix)
    assert "make setup" in fix and "CAPABILITY" not in fix, "the published wheel should work there"
    monkeypatch.setattr(detect, "package_version", lambda name: "")
    assert compute._bitsandbytes(None, "cuda", Machine()).key == "bitsandbytes.missing"


def torch_for(cuda: str | None, **gpu: Any) -> Any:
    """Return a stand-in for torch as built for another machine."""
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
def test_torch_build_is_checked_against_the_machine(
    cuda: str | None, board: Board, smi: bool, key: str, tmp_path: Path
) -> None:
    fake = FakeMachine(tmp_path, board)
    path = fake.program("nvidia-smi", "") if smi else ""
    finding = compute._torch(torch_for(cuda), machine(fake, path=path))
    status = {"torch.cpu_on_board": "failure", "torch.cpu_with_gpu": "warning"}
    assert (finding.key, finding.status) == (key, status.get(key, "ok"))


@pytest.mark.parametrize(("board", "index"), [(NANO, "jp6/cu126"), (AGX, "whl/cu130")])
def test_cpu_build_on_a_board_has_the_index_of_its_jetpack_as_fix(
    board: Board, index: str, tmp_path: Path
) -> None:
    finding = compute._torch(torch_for(None), machine(FakeMachine(tmp_path, board)))
    assert index in str(finding.fix)


def gpu_finding(
    built: list[str], error: float | Exception, monkeypatch: pytest.MonkeyPatch
) -> Finding:
    """Return the finding on an Orin whose product has an error or raises one."""

    def product_error(*_: Any) -> float:
        if isinstance(error, Exception):
            raise error
        return error

    monkeypatch.setattr(compute, "_product_error", product_error)
    orin = SimpleNamespace(name="Orin", major=8, minor=7, is_integrated=True)
    torch = torch_for(
        "12.6", get_device_properties=lambda _: orin, get_arch_list=lambda: built,
    )  # fmt: skip
    torch.bfloat16 = "bf16"
    return compute._gpu(torch)


@pytest.mark.parametrize(
    ("built", "error", "key", "status"),
    [
        (["sm_87"], 0.001, "gpu.correct", "ok"),
        (["sm_80", "sm_90"], 0.001, "gpu.compatible", "ok"),
        (["sm_75", "sm_89", "sm_90"], 0.001, "gpu.other_arch", "warning"),
        (["sm_87"], 0.5, "gpu.wrong", "failure"),
        (["sm_90"], RuntimeError("no kernel image is available\nmore"), "gpu.kernels", "failure"),
    ],
)
def test_gpu_status_depends_on_its_product(
    built: list[str], error: Any, key: str, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = gpu_finding(built, error, monkeypatch)
    assert (finding.key, finding.status) == (key, status)
    assert "sm_87" in str(finding.text) and "\n" not in str(finding.text)


@pytest.mark.parametrize("integrated", [False, True])
def test_discrete_gpu_reports_its_own_memory(
    integrated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SimpleNamespace(name="GPU", major=9, minor=0, is_integrated=integrated)
    torch = torch_for(
        "12.6", is_available=lambda: True, get_device_properties=lambda _: gpu,
        get_arch_list=lambda: ["sm_90"], mem_get_info=lambda _: (3 << 30, 4 << 30),
    )  # fmt: skip
    torch.bfloat16 = "bf16"
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(compute, "_product_error", lambda *_: 0.001)
    monkeypatch.setattr(compute, "_bitsandbytes", lambda *_: ok("bitsandbytes.correct", ""))
    texts = {finding.key: str(finding.text) for finding in compute.examine(Machine())}
    assert set(texts) >= {"torch.cuda", "gpu.correct", "bitsandbytes.correct"}
    assert texts.get("gpu.memory") == (None if integrated else "3.0 of 4.0 GiB free")


def test_unusable_gpu_of_a_board_fails_with_the_error_of_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise RuntimeError("CUDA driver initialization failed: error 801")

    monkeypatch.setitem(sys.modules, "torch", torch_for("12.6", init=refuse))
    monkeypatch.setattr(compute, "_bitsandbytes", lambda *_: ok("bitsandbytes.correct", ""))
    findings = [*compute.examine(machine(FakeMachine(tmp_path, NANO)))]
    assert "error 801" in str(find(findings, "gpu").text) and not doctor.works(findings)


def test_torch_that_cant_be_imported_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    (finding,) = compute.examine(Machine())
    assert (finding.key, finding.status) == ("torch.broken", "failure")
