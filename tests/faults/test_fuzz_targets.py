"""The targets of `scripts/fuzz.py` with changed examples: no exception but `UserError`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fuzz_page_targets
import fuzz_run_targets  # noqa: F401 - it adds targets
import pytest
from fuzz_targets import TARGETS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

_PROMISES = {"yaml": 27, "recipe": 27, "encodings": 29, "compressed": 26, "control_tokens": 28,
             "chat_template": 28, "run": 58, "page": 38}  # fmt: skip


def edited(data: st.DataObject, seeds: list[bytes]) -> bytes:
    """Return one of the seeds with a few bytes changed, put in, left out, or from another one."""
    content = bytearray(data.draw(st.sampled_from(seeds)))
    for _number in range(data.draw(st.integers(0, 4))):
        start = data.draw(st.integers(0, len(content)))
        end = min(len(content), start + data.draw(st.integers(0, 8)))
        other = data.draw(st.sampled_from(seeds))
        at = data.draw(st.integers(0, len(other)))
        content[start:end] = data.draw(st.binary(max_size=4) | st.just(other[at : at + 16]))
    return bytes(content)


@pytest.fixture(autouse=True, scope="module")
def _close_page() -> Iterator[None]:
    yield
    fuzz_page_targets.close()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.promise(_PROMISES.get(name, 31))) for name in TARGETS],
)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_input_is_read_or_refused(tmp_path: Path, name: str, data: st.DataObject) -> None:
    function, seeds = TARGETS[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JETSON_FT_CACHE", str(tmp_path))
        function(edited(data, seeds()))
