"""The supervisor's own duties that no other test holds."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from jetson_ft.runs import jobs, rundir
from jetson_ft.runs.rundir import lock
from jetson_ft.runs.supervisor import WORKER_ENVIRONMENT


def test_it_loads_no_torch() -> None:
    """It stays beside the run for hours; it must cost next to nothing."""
    code = (
        "import sys, jetson_ft.runs.supervisor as s;"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules);"
        "print(sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_stopping_is_shown_while_the_worker_still_works(shop: Any) -> None:
    run = shop.launch("endless")
    process = shop.worker(run)
    # The loader cuts the tunables up in place.
    given = ":" + Path(f"/proc/{process}/environ").read_text().replace("\0", ":")
    assert all(f":{name}={value}:" in given for name, value in WORKER_ENVIRONMENT.items())
    os.kill(process, 19)  # SIGSTOP: a worker busy with a long step
    jobs.stop(run)
    assert shop.wait(run, "stopping") == "stopping"
    assert run.state().reason == "writing a checkpoint"
    os.kill(process, 18)  # SIGCONT
    assert shop.wait(run, *rundir.ENDED) == "stopped"


def test_it_outlives_its_launcher(shop: Any) -> None:
    """`jetson-ft train` in a terminal that is closed: the session's processes are killed."""
    shop.root.mkdir(parents=True)
    recipe = shop.root / "recipe.yaml"
    recipe.write_text(shop.recipe().to_yaml())
    code = (
        "import os, signal, sys; from jetson_ft import recipe; from jetson_ft.runs import jobs;"
        "print(jobs.launch(recipe.load(sys.argv[1]), 'endless').path, flush=True);"
        "os.killpg(0, signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(recipe)],
        capture_output=True, text=True, timeout=60, start_new_session=True,
    )  # fmt: skip
    run = rundir.find(done.stdout.strip(), shop.root)
    shop.worker(run)
    assert jobs.settle(run) == "running"
    jobs.stop(run)
    assert shop.wait(run, *rundir.ENDED) == "stopped"


def test_it_hands_the_slot_but_not_its_own_lock_to_the_worker(shop: Any) -> None:
    run = shop.launch("endless")
    process = shop.worker(run)
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


def test_a_worker_wastes_less_memory_between_its_tensors() -> None:
    """Blocks as a training takes them, in micro-batches of six lengths; kibibytes at the peak."""
    own = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    plain, ours = (
        int(subprocess.check_output([sys.executable, "-c", _LIKE_A_TRAINING], env=environment))
        for environment in (own, {**own, **WORKER_ENVIRONMENT})
    )
    version = tuple(map(int, platform.libc_ver()[1].split(".")))
    assert ours < (0.85 if version < (2, 38) else 1.1) * plain
