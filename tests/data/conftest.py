"""The cache of the tests of `jetson_ft.data`."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JETSON_FT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
