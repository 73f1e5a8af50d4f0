"""A lesson of three steps on the tiny Llama."""

from __future__ import annotations

from pathlib import Path

import pytest

from jetson_ft.bench.arms import ARMS
from jetson_ft.bench.lesson import Lesson, Settings, prepare
from jetson_ft.models import libraries

libraries.load()  # the tests here import PEFT themselves, and with it torch's compiler


@pytest.fixture(scope="session")
def settings(tiny_llama: Path, rows_file: Path) -> Settings:
    return Settings(
        model=str(tiny_llama), data=str(rows_file), rows=30, max_length=96, rank=4, rounds=1,
        threads=1, arms=tuple(ARMS),
    )  # fmt: skip


@pytest.fixture(scope="session")
def lesson(settings: Settings) -> Lesson:
    return prepare(settings)
