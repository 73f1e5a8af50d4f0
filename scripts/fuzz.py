"""Fuzz the readers of what comes from outside, guided by coverage.

    python scripts/fuzz.py TARGET --minutes 10
    python scripts/fuzz.py all --minutes 60        # in turn, the same time for each

It needs atheris, which is no dependency of this project:

    python -m venv --system-site-packages build/fuzz-venv    # on top of the project's environment
    build/fuzz-venv/bin/pip install atheris

A finding is an exception other than `UserError`, or a small input that takes too long or too much
memory. Each distinct one is written to the folder of findings once, with its input. Inputs that
reach new code are kept in the folder of the corpus, so that the next call goes on from there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests" / "support"))

import fuzz_page_targets  # noqa: E402, F401 - it adds a target
import fuzz_run_targets  # noqa: E402, F401 - it adds targets
from fuzz_targets import TARGETS  # noqa: E402

MAX_SECONDS = 5.0  # for one input
MAX_GROWTH = 512 << 20  # bytes of memory for one input
MAX_BYTES = 1 << 13  # of one input
_RSS_MB = 4096  # beyond it, libFuzzer ends the process


class Watched:
    """A target that writes its findings to a folder and goes on."""

    def __init__(self, name: str, findings: Path) -> None:
        self.name, self.findings = name, findings
        self._function, _seeds = TARGETS[name]

    def __call__(self, data: bytes) -> None:
        memory, started = _peak_bytes(), time.process_time()
        try:
            self._function(data)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            place = "".join(f"{frame.filename}:{frame.lineno}" for frame in frames[-3:])
            self._report(data, f"{type(error).__name__}{place}", traceback.format_exc())
        if (seconds := time.process_time() - started) > MAX_SECONDS:
            self._report(data, "slow", f"{seconds:.1f} s\n")
        if (growth := _peak_bytes() - memory) > MAX_GROWTH:
            self._report(data, "memory", f"{growth >> 20} MiB\n")

    def _report(self, data: bytes, kind: str, text: str) -> None:
        key = hashlib.sha256(kind.encode()).hexdigest()[:10]
        path = self.findings / f"{self.name}-{key}"
        if not path.exists():
            path.write_bytes(data)
            path.with_suffix(".txt").write_text(f"{text}\ninput: {data[:2000]!r}\n")
            print(f"finding: {path.with_suffix('.txt')}\n{text}", file=sys.stderr, flush=True)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fuzz(name: str, folder: Path, seconds: int) -> None:
    """Fuzz one target in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports(include=["jetson_ft", "yaml"]):
        watched = Watched(name, folder / "findings")
        for seed in TARGETS[name][1]():
            watched(seed)
    corpus = folder / "corpus" / name
    for seed in TARGETS[name][1]():
        (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    options = [
        f"-max_total_time={seconds}", f"-max_len={MAX_BYTES}", f"-rss_limit_mb={_RSS_MB}",
        "-timeout=60", "-print_final_stats=1", f"-artifact_prefix={folder / 'findings' / name}-",
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, str(corpus)], watched)
    atheris.Fuzz()


def run_targets(names: list[str], folder: Path, minutes: float) -> Iterator[dict[str, Any]]:
    """Fuzz the targets in turn, each in a process of its own; yield the figures of each."""
    for name in names:
        (folder / "corpus" / name).mkdir(parents=True, exist_ok=True)
        (folder / "findings").mkdir(exist_ok=True)
        seconds = max(1, round(60 * minutes / len(names)))
        command = [sys.executable, __file__, name, "--folder", str(folder), "--child", str(seconds)]
        with tempfile.TemporaryDirectory() as cache:
            environment = {**os.environ, "JETSON_FT_CACHE": cache, "PYTHONPATH": str(ROOT)}
            started = time.monotonic()
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False
            )
        (folder / f"{name}.log").write_text(done.stdout + done.stderr)
        runs = re.findall(r"number_of_executed_units: (\d+)", done.stderr)
        yield {
            "target": name, "seconds": round(time.monotonic() - started),
            "executions": int(runs[-1]) if runs else None, "exit": done.returncode,
            "findings": len(list((folder / "findings").glob(f"{name}-*.txt"))),
        }  # fmt: skip


def main() -> None:
    """Read the command line; print a line of JSON for each target."""
    parser = argparse.ArgumentParser(description="Fuzz the readers of what comes from outside.")
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--minutes", type=float, default=1.0, help="of all targets together")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "fuzz")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        fuzz(options.target, options.folder, options.child)
    names = list(TARGETS) if options.target == "all" else [options.target]
    failed = False
    for figures in run_targets(names, options.folder.absolute(), options.minutes):
        print(json.dumps(figures), flush=True)
        failed = failed or bool(figures["findings"] or figures["exit"])
    sys.exit(failed)


if __name__ == "__main__":
    main()
