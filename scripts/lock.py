"""Write `constraints/*.txt`, or with `--check` say whether they still hold.

Pins already there are preferences: a new release of something fails nothing, a pin that can no
longer be had, or that pyproject.toml has outgrown, does. Every pin has a wheel: nothing is ever
compiled on a board.
"""

import argparse
import difflib
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
HEADER = """\
# {title}
# Made by `make lock` (uv pip compile {shown}); checked by `make test`. Don't edit.
# NVIDIA's packages are left out: the torch build that `make setup` takes brings its own or none.
"""
# torch's CUDA side; which of it is wanted, and where from, differs from machine to machine.
LEFT_OUT = re.compile(r"(nvidia|triton|cuda)[-=]")


class Lock(NamedTuple):
    file: str
    title: str
    options: str
    given: str  # what pyproject.toml leaves open and this environment fixes
    tools: str = ""  # what builds the project when it is installed, pinned too


LOCKS = [
    Lock(
        "constraints/cpu.txt",
        "Pins for laptops, servers and CI: Python 3.10 to 3.13, Linux and macOS, test tools too.",
        "--universal --python-version 3.10 --extra dev",
        "torch==2.13.0\ntransformers==5.23.0; python_version >= '3.11'\n",
        "hatchling\neditables\n",
    ),
    Lock(
        "constraints/jetpack6-py310.txt",
        "Pins for JetPack 6: aarch64, Python 3.10, the set that `make setup` installs there.",
        "--python-platform aarch64-unknown-linux-gnu --python-version 3.10",
        # The Jetson wheels of torch were built against numpy 1.
        "torch==2.8.0\ntransformers==5.20.2\nnumpy<2\n",
    ),
]


def resolve(lock: Lock, old: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        pins, given, tools = (Path(folder, name) for name in ("pins.txt", "given.txt", "tools.txt"))
        pins.write_text(old)  # uv keeps what it finds here, as far as it can
        given.write_text(lock.given)
        tools.write_text(lock.tools)
        uv = [sys.executable, "-m", "uv", "pip", "compile", "--quiet"]
        inputs = ["pyproject.toml", str(tools)]
        form = ["--no-header", "--no-annotate", "--only-binary", ":all:", "--constraints"]
        run = subprocess.run(
            [*uv, *inputs, *lock.options.split(), *form, str(given), "--output-file", str(pins)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode:
            sys.exit(
                f"{lock.file}: the pins can't all be met:\n{run.stderr.rstrip()}\n"
                "  fix:   change pyproject.toml or `LOCKS` in scripts/lock.py, then `make lock`;\n"
                "         if the package index wasn't reached, try again (uv reads UV_INDEX_URL)."
            )
        lines = pins.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not LEFT_OUT.match(line)]
    return HEADER.format(title=lock.title, shown=lock.options) + "".join(kept)


def text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a change")
    parser.add_argument("--upgrade", action="store_true", help="forget the pins there are")
    arguments = parser.parse_args()
    olds = [text(ROOT / lock.file) for lock in LOCKS]
    with ThreadPoolExecutor() as pool:  # each waits for the index most of its time
        news = list(pool.map(resolve, LOCKS, ["" if arguments.upgrade else old for old in olds]))
    changed = []
    for lock, old, new in zip(LOCKS, olds, news, strict=True):
        difference = "".join(
            difflib.unified_diff(old.splitlines(True), new.splitlines(True), lock.file, "resolved")
        )
        print(difference or f"{lock.file}: {sum('==' in line for line in new.splitlines())} pins")
        changed += [lock.file] if difference else []
        if not arguments.check:
            (ROOT / lock.file).write_text(new)
    if changed and arguments.check:
        files = " and ".join(changed)
        sys.exit(f"{files}: no longer what pyproject.toml asks for.\n  fix:   make lock")


if __name__ == "__main__":
    main()
