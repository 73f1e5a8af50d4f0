"""Processes for tests, forked from one that has done what each would do again.

What they share is imports and tables; threads and torch's random state begin in each anew.
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
    """Of multiprocessing; the process that is forked from is started with the first call."""
    found: Any = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:  # where it looks for this module
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        patch.setenv("JETSON_FT_TEST_FORKED", "1")
        forkserver.ensure_running()
    return found


def _get_ready() -> None:
    import sacrebleu  # noqa: F401
    from transformers import conversion_mapping
    from transformers.models.phi import modeling_phi  # noqa: F401

    from jetson_ft.inference import evaluate  # noqa: F401
    from jetson_ft.models import libraries

    libraries.load("datasets", "jetson_ft.training.trainer", "jetson_ft.runs.pipeline")
    conversion_mapping.get_checkpoint_conversion_mapping("phi")
    gc.freeze()


if "JETSON_FT_TEST_FORKED" in os.environ:
    _get_ready()
