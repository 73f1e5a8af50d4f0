"""Write `constraints/*.txt`, or check with `--check` that they are up to date.

Existing pins are preferences. So the check passes when a package has a new release, and fails when
a pinned version is gone or no longer fits pyproject.toml. Every pin has a wheel: no board compiles.
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
# Made by `make lock` (uv pip compile {options}); checked by `make test`. Don't edit.
# NVIDIA's packages are left out: the torch build that `make setup` takes brings its own or none.
"""
# torch's CUDA packages: which are needed, and from where, differs between machines.
EXCLUDED = re.compile(r"(nvidia(?!-ml-py)|triton|cuda)[-=]")


class Lock(NamedTuple):
    file: str
    title: str
    options: str  # of `uv pip compile`
    constraints: str  # what this environment fixes and pyproject.toml leaves open
    build_packages: str = ""  # what builds the project on install


LOCKS = [
    Lock(
        "constraints/cpu.txt",
        "Pins for laptops, servers and CI: Python 3.10 to 3.13, Linux and macOS, test tools too.",
        "--universal --python-version 3.10 --extra export --extra dev",
        "torch==2.13.0\ntransformers==5.23.0; python_version >= '3.11'\n",
        "hatchling\neditables\n",
    ),
    Lock(
        "constraints/jetpack6-py310.txt",
        "Pins for JetPack 6: aarch64, Python 3.10, the set that `make setup` installs there.",
        "--python-platform aarch64-unknown-linux-gnu --python-version 3.10 --extra export",
        # The Jetson wheels of torch were built against numpy 1.
        "torch==2.8.0\ntransformers==5.20.2\nnumpy<2\n",
    ),
    Lock(
        "constraints/jetpack7-py312.txt",
        "Pins for JetPack 7.2: aarch64, Python 3.12, the set that `make setup` installs there.",
        "--python-platform aarch64-unknown-linux-gnu --python-version 3.12 --extra export",
        # The index of CUDA 13 builds has this version too; its packages of CUDA are left out.
        "torch==2.13.0\n",
    ),
]


def resolve(lock: Lock, pins: str) -> str:
    """Return the file's new text; uv keeps the given pins as far as it can."""
    with tempfile.TemporaryDirectory() as folder:
        names = "pins.txt", "constraints.txt", "build.txt"
        output, constraints, build = (Path(folder, name) for name in names)
        output.write_text(pins)
        constraints.write_text(lock.constraints)
        build.write_text(lock.build_packages)
        uv = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", *lock.options.split()]
        uv += ["--no-header", "--no-annotate", "--only-binary", ":all:"]
        uv += ["--constraints", str(constraints), "--output-file", str(output)]
        process = subprocess.run(
            [*uv, "pyproject.toml", str(build)],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if process.returncode:
            sys.exit(
                f"{lock.file}: no versions meet all requirements:\n{process.stderr.rstrip()}\n"
                "  fix:   change pyproject.toml or `LOCKS` in scripts/lock.py, then `make lock`;\n"
                "         if the package index wasn't reached, try again (uv reads UV_INDEX_URL)."
            )
        lines = output.read_text().splitlines(keepends=True)
    header = HEADER.format(title=lock.title, options=lock.options)
    return header + "".join(line for line in lines if not EXCLUDED.match(line))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a change")
    parser.add_argument("--upgrade", action="store_true", help="ignore the existing pins")
    arguments = parser.parse_args()
    paths = [ROOT / lock.file for lock in LOCKS]
    old_texts = [path.read_text() if path.exists() else "" for path in paths]
    with ThreadPoolExecutor() as pool:  # each mostly waits for the index
        pins = ["" if arguments.upgrade else text for text in old_texts]
        new_texts = list(pool.map(resolve, LOCKS, pins))
    changed = []
    for path, old, new in zip(paths, old_texts, new_texts, strict=True):
        file = str(path.relative_to(ROOT))
        lines = [text.splitlines(keepends=True) for text in (old, new)]
        difference = "".join(difflib.unified_diff(*lines, file, "resolved"))
        print(difference or f"{file}: {sum('==' in line for line in lines[1])} pins")
        changed += [file] if difference else []
        if not arguments.check:
            path.write_text(new)
    if changed and arguments.check:
        sys.exit(f"{' and '.join(changed)}: out of date with pyproject.toml.\n  fix:   make lock")


if __name__ == "__main__":
    main()
