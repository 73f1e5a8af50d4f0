"""Is torch still the CUDA build that was asked for, and with `--load`: does everything load?

Run after every install while the image is built, and once more on the image itself. A pip that
was sent to the wrong index installs a CPU build without a word; here that ends the build. torch's
files are read, not imported, as its libraries may not be there yet; `--load` imports it, for which
no GPU is needed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

# The driver's libraries: NVIDIA's container runtime brings them in when the container starts.
DRIVER = re.compile(r"lib(cuda|nvidia-[\w-]+|nvcudla|nvrm_\w+|nvmap|nvsci\w+|nvos|nvdla_\w+)\.so\b")


class Unfit(Exception):
    def __init__(self, what: str, fix: str) -> None:
        super().__init__(f"error: {what}\n  fix:   {fix}")


def folder(package: str) -> Path:
    """Where an installed package lies; it isn't imported."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise Unfit(f"{package} is not installed.", "Look at the installer's messages above.")
    return Path(spec.submodule_search_locations[0])


def torch_build(torch: Path) -> tuple[str, str]:
    """(version, CUDA version or nothing) of an installed torch, read off its files."""
    found = dict(re.findall(r"^(\w+).*= '(.*)'$", (torch / "version.py").read_text(), re.MULTILINE))
    return found.get("__version__", ""), found.get("cuda", "")


def check_torch(version: str, cuda: str, packages: Iterable[str], wanted: dict[str, str]) -> None:
    """Fails where torch is not the one that the build's arguments ask for."""
    asked = wanted.get("TORCH_VERSION", "")
    if asked and version.partition("+")[0] != asked.partition("+")[0]:
        raise Unfit(
            f"torch {version} is installed, {asked} was asked for.",
            "Some install replaced it; each has to have torch among its --constraint.",
        )
    if not cuda and wanted.get("REQUIRE_CUDA", "1") != "0":
        raise Unfit(
            f"torch {version} is a CPU build.",
            "TORCH_INDEX must serve a CUDA build of TORCH_VERSION for this Python; some indexes "
            "need /+simple/ at the end. Without a GPU on purpose: --build-arg REQUIRE_CUDA=0.",
        )
    strays = sorted(name for name in packages if re.match(r"nvidia[-_]|cuda[-_]", name.lower()))
    if strays and wanted.get("TORCH_DEPS", "0") != "1":
        raise Unfit(
            f"{', '.join(strays)} would be loaded in place of the base image's CUDA.",
            "Install with --no-deps; or, on a base without CUDA, --build-arg TORCH_DEPS=1.",
        )


def libraries(torch: Path, cuda: str) -> list[Path]:
    """What `import torch` loads, and on CUDA what 4-bit and 8-bit weights need."""
    found = sorted([*torch.glob("*.so"), *torch.glob("lib/*.so*")])
    if cuda:
        found.append(folder("bitsandbytes") / f"libbitsandbytes_cuda{cuda.replace('.', '')}.so")
    return found


def missing(listed: str) -> list[str]:
    """Libraries that `ldd` didn't find; those that come with the driver don't count."""
    names = re.findall(r"^\s*(\S+) => not found$", listed, re.MULTILINE)
    return [name for name in names if not DRIVER.match(name)]


def check_libraries(paths: Iterable[Path]) -> None:
    """Fails where a library isn't there that one of these needs."""
    lacking: dict[str, str] = {}
    for path in paths:
        if not path.exists():
            raise Unfit(f"{path} is missing.", "BNB_VERSION must have kernels for torch's CUDA.")
        run = subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=True)
        lacking.update(dict.fromkeys(missing(run.stdout), path.name))
    if lacking:
        listed = ", ".join(f"{name} (for {user})" for name, user in sorted(lacking.items()))
        raise Unfit(f"not found: {listed}.", "Name them in CUDA_LIBS, or install their packages.")


def main() -> None:
    torch = folder("torch")
    version, cuda = torch_build(torch)
    names = [found.metadata["Name"] for found in distributions()]
    check_torch(version, cuda, names, dict(os.environ))
    print(f"check: torch {version}, {'CUDA ' + cuda if cuda else 'a CPU build, as allowed'}")
    if "--load" in sys.argv[1:]:
        found = libraries(torch, cuda)
        check_libraries(found)
        for name in ("torch", "bitsandbytes", "jetson_ft.runs.pipeline", "jetson_ft.webui.page"):
            import_module(name)
        print(f"check: {len(found)} libraries and all they need, imports")
        model = import_module("jetson_ft.models.embedded").folder()
        print(f"check: embedded model in {model}")


if __name__ == "__main__":
    try:
        main()
    except Unfit as unfit:
        sys.exit(str(unfit))
