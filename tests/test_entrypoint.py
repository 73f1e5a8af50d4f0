"""The image's entrypoint, in a mount namespace of its own as in a container."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

DOCKER = Path(__file__).resolve().parent.parent / "docker"

FAKE_SUPERVISOR = """
import signal, sys, time
from pathlib import Path

stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
Path(sys.argv[1], "up").touch()
end = time.monotonic() + 30  # without a signal
while not stopped and time.monotonic() < end:
    time.sleep(0.02)
time.sleep(0.5)  # the rest of the step
if not stopped:
    sys.exit("no SIGTERM")
Path(sys.argv[1], "checkpoint").touch()
"""


def start_entrypoint(
    folder: Path, program: str, detached: str = "jetson_ft.runs.supervisor"
) -> subprocess.Popen[str]:
    """Start the entrypoint with `program` as its jetson-ft, beside a fake detached process.

    Return once the program has created the file `page`, or has ended.
    """
    (folder / "bin").mkdir()
    (folder / "bin/jetson-ft").write_text(f"#!{sys.executable}\n{program}")
    (folder / "bin/jetson-ft").chmod(0o755)
    (folder / "supervisor.py").write_text(FAKE_SUPERVISOR)
    supervisor = f"{sys.executable} supervisor.py {folder} {detached}"
    entrypoint = f"{sys.executable} -IS {DOCKER}/entrypoint.py webui"
    wait = "while [ ! -e up ]; do sleep 0.05; done"
    unshare = ["unshare", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]), "--mount"]
    if subprocess.call([*unshare, "true"], stderr=subprocess.DEVNULL):
        pytest.skip("this system allows no namespaces")
    process = subprocess.Popen(
        [*unshare, "sh", "-c", f"setsid {supervisor} & {wait}; exec {entrypoint}"],
        cwd=folder, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL,
        env={**os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}"},
    )  # fmt: skip
    while not (folder / "page").exists() and process.poll() is None:
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("detached", ["jetson_ft.runs.supervisor", "jetson_ft.runs.job_process"])
def test_sigterm_waits_for_checkpoint_of_this_container_only(tmp_path: Path, detached: str) -> None:
    other = subprocess.Popen(  # as in another container: must not be stopped
        [sys.executable, "-c", "import time; time.sleep(60)", detached]
    )
    try:
        program = "import time\nopen('page', 'w')\ntime.sleep(60)"
        process = start_entrypoint(tmp_path, program, detached)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGTERM
        assert (tmp_path / "checkpoint").exists()
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_exit_of_page_stops_runs(tmp_path: Path) -> None:
    process = start_entrypoint(tmp_path, "import sys\nsys.exit(7)")
    assert process.wait(20) == 7
    assert (tmp_path / "checkpoint").exists()


def test_sigint_without_terminal_reaches_program(tmp_path: Path) -> None:
    program = "import time\ntry:\n    open('page', 'w')\n    time.sleep(60)\n"
    program += "except KeyboardInterrupt:\n    raise SystemExit(3)\n"
    process = start_entrypoint(tmp_path, program)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 3
    assert (tmp_path / "checkpoint").exists()


@pytest.mark.slow
def test_program_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    stubborn = (
        "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nopen('page', 'w')\ntime.sleep(60)"
    )
    process = start_entrypoint(tmp_path, stubborn)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGKILL
    assert (tmp_path / "checkpoint").exists()
