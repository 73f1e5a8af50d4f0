"""Install packages into `.venv` by uv and pip, with a line for each step and a log of everything.

scripts/setup.py decides what to install.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, TimeoutExpired, call, run

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
CPU_PINS = "constraints/cpu.txt"
CLOCK_SECONDS = 1.0


class SetupError(Exception):
    def __init__(self, what: str, fix: str, where: object = "") -> None:
        super().__init__(what + (f"\n  where: {where}" if where else "") + f"\n  fix:   {fix}")


# --- steps and commands ---


@contextlib.contextmanager
def step(title: str) -> Iterator[None]:
    """Print the title, then the seconds; on a terminal also a clock and the bytes received."""
    line, start, over = f"  {title} ... ", time.monotonic(), threading.Event()
    is_terminal, seconds = sys.stdout.isatty(), ""

    def show_clock() -> None:
        before = bytes_received()
        while is_terminal and not over.wait(CLOCK_SECONDS):
            megabytes = (bytes_received() - before) / 1e6
            received = f", {megabytes:,.0f} MB received" if megabytes >= 1 else ""
            print(f"\r{line}{time.monotonic() - start:.0f} s{received}\033[K", end="", flush=True)

    print(line, end="", flush=True)
    clock = threading.Thread(target=show_clock)
    clock.start()
    try:
        yield
        seconds = f"{time.monotonic() - start:.0f} s"
    finally:
        over.set()
        clock.join()
        print(f"\r{line}\033[K{seconds}" if is_terminal else seconds, flush=True)


def bytes_received() -> int:
    """Return the bytes that this machine received from others; 0 without Linux's counters."""
    counters = Path("/proc/net/dev")
    lines = counters.read_text().splitlines()[2:] if counters.exists() else []
    return sum(int(line.split(":")[1].split()[0]) for line in lines if "lo:" not in line.split())


def output(*command: object) -> str:
    """Return what a command prints; an empty string if it does not run."""
    with contextlib.suppress(OSError, TimeoutExpired):
        words = [str(word) for word in command]
        return run(words, stdout=PIPE, stderr=DEVNULL, text=True, timeout=60, check=False).stdout
    return ""


def run_logged(*command: object, **env: str) -> str:
    """Run a command with its output in the log; return the output.

    Raises:
        SetupError: the command failed.
    """
    words, env = [str(word) for word in command], {**os.environ, "PIP_USER": "0", **env}
    with open(VENV / "setup.log", "a+", errors="replace") as log:
        print("$", *words, file=log, flush=True)
        start = log.tell()
        # close_fds=False: the command keeps set-up's lock even if this process is killed.
        code = call(
            words, stdin=DEVNULL, stdout=log, stderr=STDOUT, cwd=ROOT, env=env, close_fds=False
        )
        log.seek(start)
        text = log.read()
    if code:
        raise explain_failure(code, text)
    return text


# (pattern in a command's output, what is wrong, how to fix it)
CAUSES = [
    (r"No space left on device|Errno 28", "The disk is full.",
     "free about 3 GB here and in the folder for temporary files (8 GB with CUDA); "),
    (r"CERTIFICATE_VERIFY_FAILED", "The package index's certificate was refused.",
     "name your proxy's certificate to pip (`pip config set global.cert FILE`); "),
    (r"onnection|name resolution|Retrying \(|Read timed out|ProxyError|ConnectTimeout",
     "The package index can't be reached.",
     "check the network, the proxy, TORCH_INDEX, and pip's own index (`pip config list`); "),
    (r"ResolutionImpossible|conflicting dependencies",
     "The pins in constraints/ don't fit pyproject.toml.", "`make lock`, "),
    (r"No matching distribution found for (\S+)", "The package index doesn't serve {0}.",
     "check the index that pip is set to (`pip config list`), or TORCH_INDEX, "),
    (r"ImportError: (lib\S+): cannot open shared object", "A system library is missing: {0}.",
     "install its package (for libopenblas: `sudo apt install libopenblas0`), "),
]  # fmt: skip


def explain_failure(code: int, text: str) -> SetupError:
    """Return the error for a command's exit code and output, by the first cause that fits."""
    shown = "".join(f"    | {line}\n" for line in text.splitlines()[-20:])
    what, fix = "The command failed; its last lines are above.", ""
    if code == -9:
        what, text = "The command was killed, most likely because memory ran out.", ""
    elif shutil.disk_usage(ROOT).free < 20_000_000:
        text = "No space left on device"
    for pattern, cause, remedy in CAUSES:
        if match := re.search(pattern, text):
            what, fix = cause.format(*match.groups()), remedy
            break
    fix += "then `make setup` again: it continues where it stopped (from nothing: `make clean`)."
    return SetupError(shown + what, fix, VENV / "setup.log")


# --- pip and uv ---

# pip's settings and uv's variables for the same.
UV_NAMES = {
    "index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_INDEX", "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT", "trusted-host": "UV_INSECURE_HOST", "cert": "SSL_CERT_FILE",
    "proxy": "ALL_PROXY",
}  # fmt: skip
# pip's settings that don't change what is installed.
NEUTRAL_SETTINGS = {
    "break-system-packages", "cache-dir", "compile", "default-timeout", "disable-pip-version-check",
    "log", "no-cache-dir", "no-color", "no-compile", "no-input", "no-warn-script-location",
    "prefer-binary", "progress-bar", "quiet", "require-virtualenv", "retries", "root-user-action",
    "timeout", "user", "verbose",
}  # fmt: skip


@functools.cache
def pip_settings(python: object) -> dict[str, str]:
    """Return the settings of this Python's pip by name; several values are joined by spaces."""
    listing = output(python, "-I", "-m", "pip", "config", "list")
    settings = {}
    for section in ("global", "install", ":env:"):  # each overrides those before
        for name, value in re.findall(rf"^{section}\.([\w-]+)=(.*)$", listing, re.MULTILINE):
            settings[name] = " ".join(str(ast.literal_eval(value)).split())
    return settings


def uv_settings(pip: dict[str, str]) -> dict[str, str] | None:
    """Return pip's settings as uv's variables; None where uv lacks one of them."""
    if not pip.keys() <= UV_NAMES.keys() | NEUTRAL_SETTINGS:
        return None
    known = {UV_NAMES[name]: value for name, value in pip.items() if name in UV_NAMES}
    if "UV_FIND_LINKS" in known:
        known["UV_FIND_LINKS"] = known["UV_FIND_LINKS"].replace(" ", ",")
    return known


def pip_install(*arguments: object, **env: str) -> None:
    # -I: packages on a PYTHONPATH (ROS sets one) must not count as installed.
    # --no-compile: a tenth of the modules is ever used; importing them compiles them.
    options = ["--no-input", "--disable-pip-version-check", "--no-compile"]
    run_logged(VENV / "bin/python", "-I", "-m", "pip", "install", *options, *arguments, **env)


def install(*arguments: object) -> None:
    """Install by uv, in a fifth of pip's time; by pip where uv lacks a setting of pip's, or fails.

    torch is always installed by pip: it may be where only pip searches.
    """
    python, uv = VENV / "bin/python", VENV / "bin/uv"
    settings = uv_settings(pip_settings(python))
    if settings is not None:
        # Of several indexes, any may have the pinned version, as for pip.
        options = ["--index-strategy", "unsafe-best-match", "--python", python]
        # A variable that is already set for uv wins over pip's setting.
        env = {name: value for name, value in settings.items() if name not in os.environ}
        with contextlib.suppress(SetupError):
            if not uv.exists():
                pip_install("uv", "--constraint", CPU_PINS)
            run_logged(uv, "pip", "install", *options, *arguments, **env)
            return
    pip_install(*arguments)
