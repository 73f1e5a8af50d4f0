"""Commands of jobs that do next to nothing, in real processes with their real keepers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from run_folders import make_run
from workbench import change_children, wait_for

from jetson_ft.runs import jobs, store
from jetson_ft.runs.jobs import Job
from jetson_ft.runs.store import Run

# Python imports a module of this name (`sitecustomize`) when it starts. LIGHT_JOB in the
# environment says what the command does in the place of its work.
LIGHT_COMMAND = """
import os, sys

if "jetson_ft.cli" in sys.orig_argv and {"LIGHT_JOB", "JETSON_FT_PROGRESS"} <= set(os.environ):
    import json, signal, time, types
    from pathlib import Path

    def main():
        kind, folder = os.environ["LIGHT_JOB"], Path(os.environ["JETSON_FT_PROGRESS"]).parent
        (folder / "pid").write_text(str(os.getpid()))
        if kind == "stubborn":
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if kind == "late":
            signal.signal(signal.SIGINT, lambda *_: (print('{"exports": []}'), sys.exit(0)))
        if "server" in kind:
            print(json.dumps({"url": "http://127.0.0.1:8000/v1", "models": ["a-run"],
                              "api_key": "k-1"}), flush=True)
        from jetson_ft.cli.output import ProgressBar
        with ProgressBar(live=False) as bar:
            bar.show("merging <b>", 1, 4)
            print("light work", file=sys.stderr, flush=True)
            while kind not in ("brief", "broken-server"):
                time.sleep(0.02)
        if kind == "broken-server":
            from jetson_ft.errors import UserError
            print(json.dumps({"error": UserError("The engine has ended.").as_json()}))
            sys.exit(2)
        print(json.dumps({"exports": []}))

    module = types.ModuleType("jetson_ft.cli.app")
    module.main = main
    sys.modules["jetson_ft.cli.app"] = module
"""


class LightJobs:
    """Runs in a folder, and jobs of them whose command is light: endless, brief, stubborn,
    late (it ends well when it is asked to stop), server, broken-server.

    Args:
        set_environment: sets a variable of the processes that are started.
    """

    def __init__(self, root: Path, set_environment: Callable[[str, str], None]) -> None:
        self.root, self._set_environment = root, set_environment

    def run(self, name: str = "20260101-000000-a") -> Run:
        """Make a finished run with an adapter's folder."""
        run = make_run(self.root, name)
        run.adapter.mkdir()
        return run

    def choose(self, kind: str) -> None:
        """Set what the commands do that are started from now on."""
        self._set_environment("LIGHT_JOB", kind)

    def start(self, run: Run, kind: str = "endless", name: str = "export") -> psutil.Process:
        """Start a job; return the command's process once it works."""
        self.choose(kind)
        jobs.start(run, name, ["light"])
        return self.command(run, name)

    def command(self, run: Run, name: str = "export") -> psutil.Process:
        """Return the process of a job's command, once it works."""
        folder = jobs.job_folder(run, name)
        wait_for((folder / "progress.json").exists)
        return psutil.Process(int((folder / "pid").read_text()))

    def keeper(self, run: Run, name: str = "export") -> psutil.Process:
        """Return the process of a job's keeper."""
        parent = self.command(run, name).parent()
        assert parent
        return parent

    def wait(self, run: Run, *states: str, name: str = "export", seconds: float = 15.0) -> Job:
        """Wait until the newest job has one of these states; return it."""

        def job() -> Any:
            job = jobs.read(run, name)
            return job and job.state in states and job

        return wait_for(job, seconds)  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the jobs that are still live."""
        for run in store.list_runs(self.root):
            for name in jobs.NAMES:
                jobs.stop(run, name)
                wait_for(lambda run=run, name=name: not jobs.is_live(run, name))  # type: ignore[misc]


@pytest.fixture
def light_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LightJobs]:
    """Return real keepers with light commands."""
    change_children(LIGHT_COMMAND, tmp_path, monkeypatch)
    light = LightJobs(tmp_path / "runs", monkeypatch.setenv)
    yield light
    light.close()
