"""Importing the libraries; in a process of its own, since it can be done once."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHECK = """
import gc, sys
from jetson_ft.models.fast_import import import_libraries
import_libraries("datasets")
import torch
assert "datasets" in sys.modules and "peft" in sys.modules
assert gc.isenabled() and gc.get_freeze_count() > 100_000
frozen = gc.get_freeze_count()
import_libraries()
assert gc.get_freeze_count() == frozen, "a second call is not free"
assert torch.compile.__module__ == "torch", "the stand-in for the compiler is still in place"
assert "torch._inductor.compile_fx" not in sys.modules, "the compiler was loaded"
"""


@pytest.mark.slow
def test_libraries_load_once_without_compiler_and_out_of_the_collectors_sight() -> None:
    run = subprocess.run(
        [sys.executable, "-c", CHECK], capture_output=True, text=True, check=False, timeout=300
    )
    assert (run.returncode, run.stderr) == (0, "")
