"""The supervisor process and the environment it gives to the worker."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jetson_ft.runs import manager, store
from jetson_ft.runs.locks import lock
from jetson_ft.runs.processes import WORKER_ENVIRONMENT


def test_supervisor_imports_no_torch() -> None:
    """It stays beside the run for hours and must take little memory."""
    code = (
        "import sys, jetson_ft.runs.supervisor as s;"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules);"
        "print(sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_stop_shows_stopping_while_the_worker_works(light_runs: Any) -> None:
    run = light_runs.launch("endless")
    process = light_runs.worker(run)
    # The loader splits the tunables in place.
    given = ":" + Path(f"/proc/{process}/environ").read_text().replace("\0", ":")
    assert all(f":{name}={value}:" in given for name, value in WORKER_ENVIRONMENT.items())
    os.kill(process, 19)  # SIGSTOP: a worker busy with a long step
    manager.stop(run)
    assert light_runs.wait(run, "stopping") == "stopping"
    assert run.state().reason == "writing a checkpoint"
    os.kill(process, 18)  # SIGCONT
    assert light_runs.wait(run, *store.ENDED_STATES) == "stopped"


def test_cache_folder_that_cannot_be_used_is_the_runs_reason(
    light_runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "no-folder"
    cache.touch()
    monkeypatch.setenv("JETSON_FT_CACHE", str(cache))
    run = light_runs.launch("plain")
    assert light_runs.wait(run, *store.ENDED_STATES) == "failed"
    state = run.state()
    assert state.reason == "Expected a folder, found a file."
    assert not state.resumable and not state.interrupted


def test_supervisor_outlives_the_launching_session(light_runs: Any) -> None:
    """`jetson-ft train` in a terminal that is closed: the session's processes are killed."""
    light_runs.root.mkdir(parents=True)
    recipe = light_runs.root / "recipe.yaml"
    recipe.write_text(light_runs.recipe().to_yaml())
    code = (
        "import os, signal, sys; from jetson_ft import recipe; from jetson_ft.runs import manager;"
        "print(manager.launch(recipe.load_recipe(sys.argv[1]), 'endless').path, flush=True);"
        "os.killpg(0, signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(recipe)],
        capture_output=True, text=True, timeout=60, start_new_session=True,
    )  # fmt: skip
    run = store.find_run(done.stdout.strip(), light_runs.root)
    light_runs.worker(run)
    assert manager.reconcile_state(run) == "running"
    manager.stop(run)
    assert light_runs.wait(run, *store.ENDED_STATES) == "stopped"


def test_worker_inherits_the_slot_and_not_the_supervisors_lock(light_runs: Any) -> None:
    run = light_runs.launch("endless")
    process = light_runs.worker(run)
    names = {path.readlink().name for path in Path(f"/proc/{process}/fd").iterdir()}
    assert "slot" in names and "worker.lock" in names
    assert "supervisor.lock" not in names
    assert lock(run.path / "supervisor.lock") is None


# --- a worker's memory -------------------------------------------------------------------------

_LIKE_A_TRAINING = """
import ctypes, itertools

libc = ctypes.CDLL(None)
libc.free.argtypes, libc.malloc.restype = [ctypes.c_void_p], ctypes.c_void_p

def tensor(size):
    address = ctypes.c_void_p()
    assert libc.posix_memalign(ctypes.byref(address), 64, size) == 0
    ctypes.memset(address.value, 1, size)
    return address.value

small = itertools.cycle((40, 56, 72, 88))
for tokens in (406, 508, 474, 359, 512, 351):
    kept = []
    for width in 30 * (576, 192, 192, 576, 1536):
        for_a_moment, for_backward = (tensor(4 * tokens * width) for _ in "ab")
        [libc.malloc(next(small)) for _ in "abc"]
        libc.free(for_a_moment)
        kept.append(for_backward)
    for address in kept:
        libc.free(address)
(peak,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak.split()[1])
"""


def test_worker_environment_lowers_the_peak_of_mixed_allocations() -> None:
    """Allocate as training does, in micro-batches of six lengths; compare the peaks in KiB."""
    own = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    plain, ours = (
        int(subprocess.check_output([sys.executable, "-c", _LIKE_A_TRAINING], env=environment))
        for environment in (own, {**own, **WORKER_ENVIRONMENT})
    )
    version = tuple(map(int, platform.libc_ver()[1].split(".")))
    assert ours < (0.85 if version < (2, 38) else 1.1) * plain
