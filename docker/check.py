"""Check that torch is the CUDA build that was requested and, with `--load`, that everything loads.

The image's build runs this after every install, and `--load` on the finished image. A pip with a
wrong index installs a CPU build without an error; this check ends the build. It reads torch's files
without importing torch, whose libraries may not be installed yet. `--load` imports it, which needs
no GPU.
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

# The driver's libraries: NVIDIA's container runtime adds them when the container starts.
DRIVER = re.compile(r"lib(cuda|nvidia-[\w-]+|nvcudla|nvrm_\w+|nvmap|nvsci\w+|nvos|nvdla_\w+)\.so\b")


class CheckFailed(Exception):
    def __init__(self, what: str, fix: str) -> None:
        super().__init__(f"error: {what}\n  fix:   {fix}")


def folder(package: str) -> Path:
    """Return the folder of an installed package without importing the package."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise CheckFailed(f"{package} is not installed.", "See the installer's messages above.")
    return Path(spec.submodule_search_locations[0])


def torch_build(torch: Path) -> tuple[str, str]:
    """Return torch's version and CUDA version (empty for a CPU build) from its files."""
    text = (torch / "version.py").read_text()
    values = dict(re.findall(r"^(\w+).*= '(.*)'$", text, re.MULTILINE))
    return values.get("__version__", ""), values.get("cuda", "")


def check_torch(version: str, cuda: str, packages: Iterable[str], args: dict[str, str]) -> None:
    """Check torch and the installed packages against the build arguments.

    Raises:
        CheckFailed: torch is another build than requested, or NVIDIA's packages are installed.
    """
    requested = args.get("TORCH_VERSION", "")
    if requested and version.partition("+")[0] != requested.partition("+")[0]:
        raise CheckFailed(
            f"torch {version} is installed, {requested} was requested.",
            "Another install replaced it; every install needs `--constraint torch.txt`.",
        )
    if not cuda and args.get("REQUIRE_CUDA", "1") != "0":
        raise CheckFailed(
            f"torch {version} is a CPU build.",
            "TORCH_INDEX must serve a CUDA build of TORCH_VERSION for this Python; some indexes "
            "need /+simple/ at the end. To build without CUDA: --build-arg REQUIRE_CUDA=0.",
        )
    # nvidia-ml-py reads sensors and brings no library.
    pattern = r"nvidia[-_](?!ml[-_]py$)|cuda[-_]"
    nvidia = sorted(name for name in packages if re.match(pattern, name.lower()))
    if nvidia and args.get("TORCH_DEPS", "0") != "1":
        raise CheckFailed(
            f"{', '.join(nvidia)} would replace the base image's CUDA.",
            "Install with --no-deps; or, on a base without CUDA, --build-arg TORCH_DEPS=1.",
        )


def libraries(torch: Path, cuda: str) -> list[Path]:
    """Return the libraries that torch loads, bitsandbytes' with CUDA, and llama.cpp's server."""
    paths = sorted([*torch.glob("*.so"), *torch.glob("lib/*.so*")])
    if cuda:
        paths.append(folder("bitsandbytes") / f"libbitsandbytes_cuda{cuda.replace('.', '')}.so")
    if (server := Path("/opt/llama/llama-server")).exists():
        paths.append(server)
    return paths


def missing_libraries(listing: str) -> list[str]:
    """Return the libraries that `ldd` did not find, without the driver's."""
    names = re.findall(r"^\s*(\S+) => not found$", listing, re.MULTILINE)
    return [name for name in names if not DRIVER.match(name)]


def check_libraries(paths: Iterable[Path], folders: Iterable[Path] = ()) -> None:
    """Check that these libraries and all that they need exist.

    Args:
        paths: the libraries.
        folders: where torch loads NVIDIA's packages from. bitsandbytes, which has another path for
            them, takes those that torch has loaded.

    Raises:
        CheckFailed: a library is missing.
    """
    missing: dict[str, str] = {}  # library -> a library that needs it
    path_names = [*map(str, folders), os.environ.get("LD_LIBRARY_PATH", "")]
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(filter(None, path_names))}
    for path in paths:
        if not path.exists():
            fix = "BNB_VERSION must have kernels for torch's CUDA."
            raise CheckFailed(f"{path} is missing.", fix)
        run = subprocess.run(
            ["ldd", str(path)], capture_output=True, text=True, check=True, env=environment
        )
        missing.update(dict.fromkeys(missing_libraries(run.stdout), path.name))
    if missing:
        names = ", ".join(f"{name} (for {user})" for name, user in sorted(missing.items()))
        fix = "Add them to CUDA_LIBS, or install their packages."
        raise CheckFailed(f"not found: {names}.", fix)


def main() -> None:
    torch = folder("torch")
    version, cuda = torch_build(torch)
    names = [package.metadata["Name"] for package in distributions()]
    check_torch(version, cuda, names, dict(os.environ))
    print(f"check: torch {version}, {'CUDA ' + cuda if cuda else 'a CPU build, as allowed'}")
    if "--load" in sys.argv[1:]:
        paths = libraries(torch, cuda)
        check_libraries(paths, sorted(torch.parent.glob("nvidia/*/lib")))
        for name in (
            "torch",
            "bitsandbytes",
            "jetson_ft.runs.pipeline",
            "jetson_ft.webui.page",
            "jetson_ft.serve.server",
        ):
            import_module(name)
        print(f"check: {len(paths)} libraries with their dependencies, imports")
        model = import_module("jetson_ft.models.embedded").embedded_folder()
        print(f"check: embedded model in {model}")


if __name__ == "__main__":
    try:
        main()
    except CheckFailed as failure:
        sys.exit(str(failure))
