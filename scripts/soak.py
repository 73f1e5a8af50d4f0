#!/usr/bin/env python3
"""Start many tiny runs from the page, one after the other, and count what is left of them.

    python scripts/soak.py --runs 300

A real server runs in a process of its own, and a browser (Chromium with Playwright, where they are
installed) shows the Runs tab, which polls. Runs are started as the button does, over HTTP, so that
up to three of them are in the queue. Every ten seconds the memory, threads and open files of the
server, the memory of the browser, the program's processes, and the files of runs, cache and
temporary folder are counted. At the end the browser is closed, the runs are deleted through the
page, and it is counted once more.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import psutil  # noqa: E402
from page_client import PageClient  # noqa: E402
from served import Served  # noqa: E402

from jetson_ft.runs import manager, store  # noqa: E402
from jetson_ft.runs.store import LIVE_STATES, Run  # noqa: E402

SAMPLE_SECONDS = 10.0
IN_QUEUE = 3  # runs that are live at the same time
RUN_SECONDS = 180.0  # in which one of them must end
SETTINGS = {
    "data_heldout": "1", "train_max_steps": "1", "train_max_minutes": "null", "train_epochs": "1",
    "train_tokens_per_step": "64", "train_eval_every": "1", "lora_rank": "2",
    "eval_max_new_tokens": "1", "eval_samples": "0", "precision": "fp32", "data_max_length": "256",
}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """Counts at one moment; memory in MiB."""

    minutes: float
    ended: int  # runs
    server: int
    threads: int
    descriptors: int
    browser: int
    processes: int  # of the program that live, without the server
    zombies: int  # children of the server that it has not waited for
    runs_files: int
    cache_files: int
    temp_files: int


class Soak:
    """The server, an open page, the runs that are live, and the samples."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "runs"
        for name in ("runs", "tmp"):
            (folder / name).mkdir()
        self.started = time.monotonic()
        self.server = Served(folder, "--runs", str(self.root))
        self.process = psutil.Process(self.server.process.pid)
        self.client = PageClient(self.server.base)
        self.live: list[Run] = []
        self.ends: Counter[str] = Counter()  # runs by state
        self.samples: list[Sample] = []

    def run_all(self, count: int, wait: Any) -> None:
        """Start so many runs and wait for their ends, sampling; `wait(seconds)` sleeps."""
        started, changed = 0, time.monotonic()
        while sum(self.ends.values()) < count:
            if started < count and len(self.live) < IN_QUEUE:
                self.live.append(self._start())
                started += 1
            wait(0.3)
            ended = [run for run in self.live if manager.reconcile_state(run) not in LIVE_STATES]
            for run in ended:
                self.live.remove(run)
                self.ends[run.state().state] += 1
                changed = time.monotonic()
            if ended or self._seconds() > 60 * self.samples[-1].minutes + SAMPLE_SECONDS:
                self.take_sample()
            if time.monotonic() > changed + RUN_SECONDS:
                raise TimeoutError(f"no run has ended for {RUN_SECONDS:.0f} s")

    def _start(self) -> Run:
        """Press Start in the page's form."""
        settings = SETTINGS | {
            "model": str(self.folder / "model"), "data_train": str(self.folder / "rows.json"),
        }  # fmt: skip
        return store.run_by_name(self.client.start(uuid.uuid4().hex, **settings), self.root)

    def take_sample(self) -> None:
        """Count everything now."""
        browser = sum(memory_of(process) for process in psutil.Process().children(recursive=True)
                      if "chrom" in process.name())  # fmt: skip
        self.samples.append(
            Sample(
                minutes=round(self._seconds() / 60, 2),
                ended=sum(self.ends.values()),
                server=memory_of(self.process) >> 20,
                threads=self.process.num_threads(),
                descriptors=self.process.num_fds(),
                browser=browser >> 20,
                **self._count_processes(),
                runs_files=count_files(self.root),
                cache_files=count_files(self.folder / "cache"),
                temp_files=count_files(self.folder / "tmp"),
            )
        )

    def _seconds(self) -> float:
        return time.monotonic() - self.started

    def _count_processes(self) -> dict[str, int]:
        """Count what works on these runs, and the children of the server."""
        members = {}
        for process in psutil.process_iter(["cmdline"]):
            command = " ".join(process.info["cmdline"] or [])
            if "jetson_ft.runs." in command and str(self.root) in command:
                members[process.pid] = process
        members |= {child.pid: child for child in self.process.children(recursive=True)}
        states = [status_of(process) for process in members.values()]
        zombies = states.count(psutil.STATUS_ZOMBIE)
        return {"processes": len(states) - zombies - states.count(""), "zombies": zombies}

    def delete_runs(self) -> None:
        """Press Delete for each finished run."""
        for run in store.list_runs(self.root):
            if run.state().state == "finished":
                address = f"{self.server.base}/runs/{run.name}/delete"
                self.client.http.post(address).raise_for_status()

    def print_report(self, count: int, files_per_run: Counter[int]) -> list[str]:
        """Print samples and what is left; return what must not be."""
        marks = sorted({min(10, count), -(-count // 3), -(-2 * count // 3), count})
        by_mark = [next(s for s in self.samples if s.ended >= mark) for mark in (0, *marks)]
        print("| " + " | ".join(field.name for field in fields(Sample)) + " |")
        print("|" + "---|" * len(fields(Sample)))
        last = self.samples[-1]
        for sample in (*by_mark, last):
            print("| " + " | ".join(map(str, astuple(sample))) + " |")
        print("(the first row: before any run; the last: after the runs were deleted)")
        peak = max(sample.server for sample in self.samples)
        most = max(sample.descriptors for sample in self.samples)
        print(f"{count} runs: {dict(self.ends)}; files per run: {dict(files_per_run)}")
        print(f"the server at most: {peak} MiB, {most} descriptors; {len(self.samples)} samples")
        print(
            f"left: {last.processes} processes, {last.zombies} zombies, "
            f"{last.runs_files} files of runs, {last.temp_files} temporary files, "
            f"{last.cache_files} files in the cache"
        )
        checks = {
            "runs that are not finished": set(self.ends) != {"finished"},
            "processes": last.processes > 0,
            "zombies": last.zombies > 0,
            "files of runs": last.runs_files > 0,
            "temporary files": last.temp_files > self.samples[0].temp_files,
            "descriptors": last.descriptors > self.samples[0].descriptors + 8,
        }
        return [name for name, is_wrong in checks.items() if is_wrong]


def memory_of(process: psutil.Process) -> int:
    """Return the resident memory in bytes; 0 for a process that has ended."""
    with contextlib.suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0


def status_of(process: psutil.Process) -> str:
    """Return the status of a process; empty if it has ended."""
    with contextlib.suppress(psutil.Error):
        return str(process.status())
    return ""


def count_files(folder: Path) -> int:
    """Return the number of files below a folder, hidden ones too."""
    return sum(len(files) for _path, _folders, files in os.walk(folder))


@contextlib.contextmanager
def open_page(link: str) -> Iterator[Any]:
    """Show the Runs tab in a browser; yield a function that waits meanwhile."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if chromium is None:
        print("no Chromium or no Playwright here: without a browser", flush=True)
        yield time.sleep
        return
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=chromium, args=options)
        page = browser.new_page(locale="en-GB")
        page.goto(link)
        page.get_by_role("tab", name="Runs").click()
        yield lambda seconds: page.wait_for_timeout(1000 * seconds)
        browser.close()


def main() -> int:
    """Run the soak; return 1 if something is left that must not be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=300)
    count = parser.parse_args().runs
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    os.environ |= {
        "JETSON_FT_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }  # fmt: skip
    from tiny_models import phi_config, save_model, write_rows

    save_model(folder / "model", phi_config(32), None)
    write_rows(folder / "rows.json")
    with mock.patch.dict(os.environ, TMPDIR=str(folder / "tmp")):  # the browser has another one
        soak = Soak(folder)
    try:
        with open_page(soak.server.link) as wait:
            wait(3)
            soak.take_sample()
            soak.run_all(count, wait)
        files_per_run = Counter(count_files(run.path) for run in store.list_runs(soak.root))
        soak.delete_runs()
        time.sleep(5)  # for processes that end, and the server's connections to the browser
        soak.take_sample()
        left = soak.print_report(count, files_per_run)
    finally:
        for run in soak.live:
            manager.stop(run)
        soak.server.kill()
    if left:
        print(f"left that must not be: {', '.join(left)}; see {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
