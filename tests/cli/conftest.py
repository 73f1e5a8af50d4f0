"""The program in an empty folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import program
import pytest


@pytest.fixture
def here(tmp_path: Path) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


@pytest.fixture
def jetson(here: Path) -> Callable[..., program.Done]:
    """The real program, started in `here`."""
    return lambda *arguments, **environment: program.run(*arguments, cwd=here, **environment)
