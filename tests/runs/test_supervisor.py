"""The supervisor's own duties that no other test holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from jetson_ft.runs import jobs, rundir
from jetson_ft.runs.rundir import lock


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
