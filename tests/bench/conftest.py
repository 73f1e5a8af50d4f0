"""A workload of three steps on the tiny Llama."""

from __future__ import annotations

from pathlib import Path

import pytest

from jetson_ft.bench.variants import VARIANTS
from jetson_ft.bench.workload import BenchWorkload, Settings, prepare_workload
from jetson_ft.models import fast_import

fast_import.import_libraries()  # the tests import PEFT themselves, and with it torch's compiler


@pytest.fixture(scope="session")
def settings(tiny_llama: Path, rows_file: Path) -> Settings:
    return Settings(
        model=str(tiny_llama), data=str(rows_file), rows=30, max_length=96, rank=4, rounds=1,
        threads=1, variants=tuple(VARIANTS),
    )  # fmt: skip


@pytest.fixture(scope="session")
def workload(settings: Settings) -> BenchWorkload:
    return prepare_workload(settings)
