#!/usr/bin/env python3
"""Kill the processes of runs at random moments, resume the runs, and compare their results.

    python scripts/kill_runs.py --kills 100 --seed 0

Each configuration is trained once without a fault. Then runs with the same settings are started;
SIGKILL hits their worker, their supervisor, the page's server, or all of these at once, several
times in the life of a run and in every phase. After each kill the state on disk and on the page
must become true within seconds: no run may be "running" where nothing lives. The run is then
resumed through the page. Once it is finished, the bytes of its adapter, last checkpoint and
optimizer must be those of the run without a fault.

The seed decides which configuration, victim and phase come next, and the moment within the phase.
The exact instant also depends on the processes' own speed. All runs are on the CPU, with a tiny
model of random weights.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import httpx  # noqa: E402
import psutil  # noqa: E402
from served import Served  # noqa: E402

from jetson_ft import events  # noqa: E402
from jetson_ft.files import sha256_file  # noqa: E402
from jetson_ft.recipe import Recipe  # noqa: E402
from jetson_ft.runs import manager, store  # noqa: E402
from jetson_ft.runs.event_reader import iter_events  # noqa: E402
from jetson_ft.runs.processes import DistributedConfig  # noqa: E402
from jetson_ft.runs.store import LIVE_STATES, Run  # noqa: E402

# In the order of a run; those of the same number alternate while it trains.
PHASES = {
    "start": 0, "libraries": 1, "device": 2, "model files": 3, "data": 4, "plan": 5, "model": 6,
    "training": 7, "evaluation": 7, "checkpoint": 7, "export": 8, "comparison": 9, "report": 10,
    "end": 11,
}  # fmt: skip
VICTIMS = ("worker", "supervisor", "server", "all")
EVAL_EVERY = 3
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {"train": {"tokens_per_step": 1}},  # one row a step
    "packing": {"train": {"epochs": 3.0}},
    "dropout": {"train": {"epochs": 3.0}, "lora": {"dropout": 0.1}},
    "nf4": {"train": {"epochs": 2.0}, "quantize": "nf4"},
    "int8": {"train": {"epochs": 2.0}, "quantize": "int8"},
    "two processes": {"train": {"epochs": 2.0}, "lora": {"dropout": 0.1}},
}
SAME = "finished, same bytes"
STATE_SECONDS = 10.0  # for the state to become true
RUN_SECONDS = 180.0  # for an attempt
MODULE = re.compile(r"jetson_ft\.runs\.(worker|launcher|supervisor)")


@dataclass
class Kill:
    """One kill; `outcome` is set once its run has ended."""

    configuration: str
    victim: str
    phase: str
    seconds: float = 0.0  # until the state was true
    outcome: str = ""


@dataclass
class Reference:
    """An uninterrupted run: hashes of its results, and seconds by phase."""

    hashes: dict[str, str]
    steps: int
    seconds: dict[str, float] = field(default_factory=dict)


class Campaign:
    """Runs of all configurations below one folder, the page's server, and the kills so far."""

    def __init__(self, folder: Path, seed: int, phases: list[str]) -> None:
        self.folder, self.root, self.phases = folder, folder / "runs", phases
        self.root.mkdir(parents=True)
        self.random = random.Random(seed)  # noqa: S311 (must be reproducible)
        self.tried: Counter[str] = Counter()  # times that a phase was aimed at
        self.kills: list[Kill] = []
        self.references: dict[str, Reference] = {}
        self.server = Served(folder, "--runs", str(self.root))

    def launch(self, configuration: str) -> Run:
        """Start a run of the configuration in its own processes."""
        settings = CONFIGURATIONS[configuration]
        train = {
            "tokens_per_step": 220, "epochs": 1.0, "learning_rate": 1e-2, "eval_every": EVAL_EVERY,
            "early_stopping_patience": None, "save_minutes": 0.0005, "max_memory_gb": 4.0,
        }  # fmt: skip
        recipe = Recipe.model_validate(
            {
                "model": str(self.folder / "model"), "precision": "fp32",
                "output_dir": str(self.root), "quantize": settings.get("quantize", "none"),
                "data": {"train": str(self.folder / "rows.json"), "heldout": 5},
                "lora": {"rank": 2, **settings.get("lora", {})},
                "train": train | settings["train"],
                "eval": {"max_new_tokens": 6, "samples": 2},
            }
        )  # fmt: skip
        processes = DistributedConfig(nproc_per_node=2 if configuration == "two processes" else 1)
        return manager.launch(recipe, configuration.replace(" ", "-"), processes)

    # --- without a fault ---

    def make_reference(self, configuration: str) -> None:
        """Train a configuration without a fault."""
        run, launched = self.launch(configuration), time.time()
        wait_until(lambda: not processes_of(run), RUN_SECONDS)
        if manager.reconcile_state(run) != "finished":
            raise SystemExit(f"{configuration}: {run.state().reason}; see {run.path}/log.txt")
        self.references[configuration] = Reference(
            result_hashes(run), run.plan()["steps"], phase_seconds(run, launched)
        )

    # --- a run that is killed ---

    def kill_and_resume(self, configuration: str, count: int) -> None:
        """Launch a run, kill it up to `count` times, let it finish, and compare its results."""
        run, first = self.launch(configuration), len(self.kills)
        deadline = time.monotonic() + RUN_SECONDS * (count + 1)
        outcome = ""
        while not outcome and time.monotonic() < deadline:
            phase = ""
            if len(self.kills) - first < count:
                phase = self._choose_phase(run)
            if not phase or not self._kill_at(run, phase, configuration):
                wait_until(lambda: not processes_of(run), RUN_SECONDS)
            seconds = self._wait_for_true_state(run)
            if len(self.kills) > first and not self.kills[-1].seconds:
                self.kills[-1].seconds = seconds
            if seconds > STATE_SECONDS:
                outcome = f"STATE STAYED {run.state().state}"
            elif (state := manager.reconcile_state(run)) == "finished":
                same = result_hashes(run) == self.references[configuration].hashes
                outcome = SAME if same else "finished, OTHER BYTES"
            elif state not in LIVE_STATES:
                self._resume(run)
        for kill in self.kills[first:]:
            kill.outcome = outcome or "NOT FINISHED"
        if outcome == SAME:
            shutil.rmtree(run.path)
        else:
            kill_all(run)

    def _choose_phase(self, run: Run) -> str:
        """Return the phase that was aimed at least of those to come; empty: none is left."""
        if not processes_of(run):
            return ""
        attempt, written = attempt_events(run)
        now = phase_of(run, attempt)
        is_trained = any(isinstance(event, events.BestSelected) for event in written)
        eligible = [
            phase
            for phase, number in PHASES.items()
            if phase in self.phases
            and (number > PHASES[now] or phase == now == "start")
            and not (is_trained and number == PHASES["training"])
        ]
        if not eligible:
            return ""
        phase = min(eligible, key=lambda phase: (self.tried[phase], self.random.random()))
        self.tried[phase] += 1
        return phase

    def _kill_at(self, run: Run, phase: str, configuration: str) -> bool:
        """Kill a victim at a random moment of the phase; return False if it was missed."""
        started, reference = time.monotonic(), self.references[configuration]
        # The first checkpoint of an attempt would always be the one that is hit.
        is_step = PHASES[phase] == PHASES["training"]
        first_step = self.random.randrange(reference.steps) if is_step else 0
        members: dict[str, list[psutil.Process]] = {}
        while time.monotonic() < started + RUN_SECONDS:
            attempt, _written = attempt_events(run)
            now = phase_of(run, attempt)
            step = max((e.step for e in attempt if isinstance(e, events.Step)), default=0)
            if (now == phase and step >= first_step) or PHASES[now] > PHASES[phase]:
                break
            if now == "start" or not members.get("worker"):
                members = processes_of(run)
                if not members:
                    return False
            time.sleep(0.002)
        time.sleep(self.random.random() * reference.seconds[phase])
        if phase == "start" or not members.get("worker"):
            members = processes_of(run)
        members = {name: list(filter(is_alive, group)) for name, group in members.items()}
        members = {name: group for name, group in members.items() if group}
        if not members:
            return False
        counts = Counter(kill.victim for kill in self.kills)
        victims = [name for name in VICTIMS if name in members or name in ("server", "all")]
        victim = min(victims, key=lambda name: (counts[name], self.random.random()))
        targets = members.get(victim, [])
        if victim == "worker" and len(targets) > 1:  # the launcher, or one of its workers
            targets = [self.random.choice(targets)]
        elif victim == "all":
            targets = [process for group in members.values() for process in group]
        if victim in ("server", "all"):
            targets = [*targets, psutil.Process(self.server.process.pid)]
        self.random.shuffle(targets)
        hit = phase_of(run, attempt_events(run)[0])
        for process in targets:
            os.kill(process.pid, signal.SIGKILL)
        if victim in ("worker", "all"):
            psutil.wait_procs(targets, timeout=5)
            hit = phase_of(run, attempt_events(run)[0])
        self.kills.append(Kill(configuration, victim, hit))
        print(f"kill {len(self.kills)}: {configuration}, {victim}, {hit}", flush=True)
        if victim in ("server", "all"):
            self.server.process.wait(20)
            self.server = Served(self.folder, "--runs", str(self.root), port=self.server.port)
        return True

    def _wait_for_true_state(self, run: Run) -> float:
        """Return the seconds until disk and page say what lives; more than the limit: never."""
        started = time.monotonic()
        while (seconds := time.monotonic() - started) <= STATE_SECONDS:
            before, state = processes_of(run), manager.reconcile_state(run)
            shown = self._shown_state(run)
            # A supervisor whose worker was killed lives for a moment, to record that.
            is_settled = bool(before.get("worker")) or not before or state == "queued"
            if is_settled and (state in LIVE_STATES) == bool(before) and shown == state:
                return seconds
            time.sleep(0.05)
        return time.monotonic() - started

    def _shown_state(self, run: Run) -> str:
        """Return the state that the page shows."""
        page = self.server.get(f"/live/en/runs/{run.name}/head")
        match = re.search(r'class="pill (\w+)"', page.text) if page else None
        return match[1] if match else ""

    def _resume(self, run: Run) -> None:
        """Press Resume, unless the run was taken up meanwhile."""
        response = httpx.post(f"{self.server.base}/runs/{run.name}/resume", timeout=20)
        if response.status_code == 422 and "is running" in response.text:
            return
        response.raise_for_status()

    # --- the end ---

    def close(self) -> None:
        """End the server and what is left of the runs."""
        for run in store.list_runs(self.root):
            kill_all(run)
        self.server.kill()

    def print_tables(self) -> None:
        """Print the kills by configuration, victim and phase, and the totals."""
        keys = [(kill.configuration, kill.victim, kill.phase, kill.outcome) for kill in self.kills]
        print("\n| configuration | victim | phase | kills | outcome |\n|---|---|---|---|---|")
        order = list(CONFIGURATIONS), list(PHASES)
        for key, count in sorted(
            Counter(keys).items(),
            key=lambda item: (order[0].index(item[0][0]), item[0][1], order[1].index(item[0][2])),
        ):
            print("| {} | {} | {} | {} | {} |".format(*key[:3], count, key[3]))
        for name in ("configuration", "victim", "phase", "outcome"):
            totals = Counter(getattr(kill, name) for kill in self.kills)
            print(f"by {name}: " + ", ".join(f"{key} {n}" for key, n in totals.most_common()))
        slowest = max((kill.seconds for kill in self.kills), default=0.0)
        print(f"{len(self.kills)} kills; the state was true after {slowest:.2f} s at most")


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process lives and isn't a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def processes_of(run: Run) -> dict[str, list[psutil.Process]]:
    """Return the living processes of a run: `supervisor`, and `worker` with the launcher."""
    result: dict[str, list[psutil.Process]] = {}
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        match = MODULE.search(command) if str(run.path) in command else None
        if match and is_alive(process):
            name = "supervisor" if match[1] == "supervisor" else "worker"
            result.setdefault(name, []).append(process)
    return result


def kill_all(run: Run) -> None:
    """Kill what is left of a run."""
    for group in processes_of(run).values():
        for process in group:
            process.kill()


def attempt_events(run: Run) -> tuple[list[events.Event], list[events.Event]]:
    """Return the events of the current attempt, and those of all."""
    written = list(iter_events(run.events_file, events.Event))
    attempt = run.state().attempt
    return [event for event in written if event.attempt == attempt], written


def phase_of(run: Run, written: list[events.Event]) -> str:
    """Return the phase that an attempt has reached by its events and its checkpoints."""
    phases = [
        event for event in written if isinstance(event, (events.PhaseStarted, events.PhaseEnded))
    ]
    if any(isinstance(event, events.Exited) for event in written):
        return "end"
    if not phases or phases[-1].name == "rendezvous":
        return "start"
    name = phases[-1].name
    if isinstance(phases[-1], events.PhaseEnded):
        return {"training": "export", "report": "end"}.get(name, name)
    if name != "training":
        return name
    last = written[-1]
    if any(run.checkpoints.glob(".step-*.tmp")):
        return "checkpoint"
    if isinstance(last, events.Evaluated) and last.step:
        return "checkpoint"
    if isinstance(last, events.Step) and (
        last.step == 1 or last.step % EVAL_EVERY == 0 or last.step == last.total_steps
    ):
        return "evaluation"
    return "training"


def phase_seconds(run: Run, launched: float) -> dict[str, float]:
    """Return how long each phase of an uninterrupted run took."""
    written = list(iter_events(run.events_file, events.Event))
    ended = {e.name: e for e in written if isinstance(e, events.PhaseEnded)}
    comparison = next(
        e.t for e in written if isinstance(e, events.PhaseStarted) and e.name == "comparison"
    )
    steps = [e for e in written if isinstance(e, events.Step)]
    seconds = {name: ended[name].seconds for name in PHASES if name in ended}
    return seconds | {
        "start": written[0].t - launched,
        "training": ended["training"].seconds / len(steps),
        "evaluation": max(e.seconds for e in written if isinstance(e, events.Evaluated)),
        "checkpoint": max(e.seconds for e in written if isinstance(e, events.CheckpointSaved)),
        "export": comparison - ended["training"].t,
        "end": 0.3,
    }


def result_hashes(run: Run) -> dict[str, str]:
    """Return the hashes of the adapter, and of the last checkpoint's weights and optimizer."""
    last = max(run.checkpoints.glob("step-*"), key=lambda path: int(path.name[5:]))
    paths = [run.adapter / "adapter_model.safetensors", *sorted(last.glob("*.safetensors"))]
    return {str(path.relative_to(run.path)): sha256_file(path) for path in paths}


def wait_until(condition: Any, seconds: float) -> None:
    """Wait until the condition is true; raise `TimeoutError` after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:.0f} s")
        time.sleep(0.05)


def main() -> int:
    """Kill as often as requested; return 1 if a result or a state was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-run", type=int, default=4, help="kills in the life of a run")
    parser.add_argument(
        "--configuration", action="append", choices=CONFIGURATIONS, help="repeatable; default: all"
    )
    parser.add_argument(
        "--phase", action="append", choices=PHASES, help="to aim at; repeatable; default: all"
    )
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kill-runs-"))
    os.environ |= {
        "JETSON_FT_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }  # fmt: skip
    from tiny_models import phi_config, save_model, write_rows

    save_model(folder / "model", phi_config(64), None)  # wide enough for blocks of nf4
    write_rows(folder / "rows.json")
    started, campaign = (
        time.monotonic(),
        Campaign(folder, options.seed, options.phase or list(PHASES)),
    )
    configurations = options.configuration or list(CONFIGURATIONS)
    try:
        for configuration in configurations:
            campaign.make_reference(configuration)
            print(f"{configuration}: trained without a fault", flush=True)
        life = 0
        while len(campaign.kills) < options.kills and life < 2 * options.kills:
            count = min(options.per_run, options.kills - len(campaign.kills))
            campaign.kill_and_resume(configurations[life % len(configurations)], count)
            life += 1
    finally:
        campaign.close()
        campaign.print_tables()
        print(f"{(time.monotonic() - started) / 60:.1f} minutes, seed {options.seed}")
    if {kill.outcome for kill in campaign.kills} != {SAME} or len(campaign.kills) < options.kills:
        print(f"the runs that went wrong are in {campaign.root}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
