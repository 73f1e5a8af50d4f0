"""Processes for tests, forked from one that has done the work common to all.

They share imports and tables; threads and torch's random state start anew in each.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest


def context() -> Any:
    """Return a context of multiprocessing; the first call starts the process to fork from."""
    fork_context: Any = multiprocessing.get_context("forkserver")
    fork_context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:  # the folder of this module
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        patch.setenv("JETSON_FT_TEST_FORKED", "1")
        forkserver.ensure_running()
    return fork_context


def _do_common_work() -> None:
    from transformers import conversion_mapping

    from jetson_ft.models import fast_import

    fast_import.import_libraries("datasets", "jetson_ft.training.loop", "jetson_ft.runs.pipeline")
    conversion_mapping.get_checkpoint_conversion_mapping("phi")
    gc.freeze()


if "JETSON_FT_TEST_FORKED" in os.environ:
    _do_common_work()
