"""Two machines, each a network namespace of its own with one cable between them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jetson_ft.events import KINDS

pytestmark = pytest.mark.slow

MEETING = "10.77.0.1:29500"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=10)


def why_not() -> str:
    """What is missing for it; nothing where all is there."""
    if os.geteuid():
        return "network namespaces need root"
    if not shutil.which("ip"):
        return "network namespaces need iproute2's `ip`"
    tried = subprocess.run(["ip", "netns", "add", "jft-try"], capture_output=True, text=True)
    if tried.returncode:
        return f"no network namespace can be made here: {tried.stderr.strip()}"
    ip("netns", "del", "jft-try")
    return ""


class Hosts:
    """`a` owns the run, `b` helps."""

    def __init__(self, folder: Path, recipe: Path) -> None:
        self.folder, self.recipe = folder, recipe

    def train(self, name: str, *more: str) -> subprocess.Popen[str]:
        """`jetson-ft train` on that machine, with a cache and runs of its own."""
        home = self.folder / name
        home.mkdir(exist_ok=True)
        together = ["--nnodes", "2", "--node-rank", str("ab".index(name)), "--rendezvous", MEETING]
        sets = [
            text for value in (f"output_dir={home / 'runs'}", *more) for text in ("--set", value)
        ]
        return self.run(name, "train", str(self.recipe), *together, *sets)

    def run(self, name: str, *words: str) -> subprocess.Popen[str]:
        """`jetson-ft …` on that machine."""
        own = {"JETSON_FT_CACHE": str(self.folder / name / "cache"), "JETSON_FT_DIST_TIMEOUT": "6"}
        inside = ["ip", "netns", "exec", f"jft-{name}"]
        return subprocess.Popen(
            [*inside, sys.executable, "-m", "jetson_ft.cli", *words], env=os.environ | own,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def newest(self, name: str) -> Path:
        """That machine's last run."""
        return max((self.folder / name / "runs").iterdir())

    def events(self, name: str, kind: str) -> list[Any]:
        """Return the events of a kind in that machine's last run."""
        assert kind in KINDS
        try:
            lines = (self.newest(name) / "events.jsonl").read_text().splitlines()
        except (OSError, ValueError):
            return []
        return [event for event in map(json.loads, lines) if event["kind"] == kind]


@pytest.fixture
def hosts(tiny_phi: Path, rows_file: Path, tmp_path: Path) -> Iterator[Hosts]:
    """Both machines, connected."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    recipe = tmp_path / "two.yaml"
    recipe.write_text(
        f"model: {tiny_phi}\nprecision: fp32\ndata: {{train: {rows_file}, heldout: 5}}\n"
        "lora: {rank: 2, dropout: 0.0}\neval: {max_new_tokens: 4, samples: 1}\n"
        "train: {epochs: 1.0, tokens_per_step: 220, eval_every: 1000, save_minutes: 0.02}\n"
    )
    try:
        ip("netns", "add", "jft-a")
        ip("netns", "add", "jft-b")
        ip("link", "add", "jft-va", "netns", "jft-a", "type", "veth",
           "peer", "name", "jft-vb", "netns", "jft-b")  # fmt: skip
        for number, name in enumerate("ab", 1):
            ip("-n", f"jft-{name}", "addr", "add", f"10.77.0.{number}/24", "dev", f"jft-v{name}")
            ip("-n", f"jft-{name}", "link", "set", f"jft-v{name}", "up")
            ip("-n", f"jft-{name}", "link", "set", "lo", "up")
        yield Hosts(tmp_path, recipe)
    finally:
        for name in "ab":
            subprocess.run(["ip", "netns", "del", f"jft-{name}"], capture_output=True)


def output_of(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=120)
    return output


def test_two_hosts_train_one_adapter(hosts: Hosts) -> None:
    first, second = hosts.train("a"), hosts.train("b")
    ours, theirs = output_of(first), output_of(second)
    assert (first.returncode, second.returncode) == (0, 0), ours + theirs
    assert "rendezvous: 2 machines, 10.77.0.1:29500" in ours and "gradients over gloo" in ours
    assert "adapter and report are on machine 0" in theirs
    assert (hosts.newest("a") / "report.json").exists()
    assert [e["loss"] for e in hosts.events("a", "step")] == [
        e["loss"] for e in hosts.events("b", "step")
    ]


def test_a_cut_cable_fails_the_run_and_one_host_goes_on(hosts: Hosts) -> None:
    first, second = hosts.train("a", "train.epochs=400"), hosts.train("b", "train.epochs=400")
    deadline = time.monotonic() + 120
    while not hosts.events("a", "checkpoint"):
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.2)
    ip("-n", "jft-b", "link", "set", "jft-vb", "down")
    cut = time.monotonic()
    ours = output_of(first)
    assert time.monotonic() - cut < 60 and first.returncode == 2
    assert "Process 1 on machine 1" in ours and "stopped answering" in ours
    assert "Process 0 on machine 0" in output_of(second)
    kept = hosts.events("a", "checkpoint")[-1]["step"]
    run = hosts.newest("a")
    alone = hosts.run("a", "train", "--resume", str(run), "--nnodes", "1")
    while not any(e["attempt"] == 2 for e in hosts.events("a", "step")):
        assert alone.poll() is None
        time.sleep(0.2)
    output_of(hosts.run("a", "runs", "stop", str(run)))
    assert "Continue with" in output_of(alone)
    assert min(e["step"] for e in hosts.events("a", "step") if e["attempt"] == 2) == kept + 1
