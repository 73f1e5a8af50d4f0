"""The doctor's findings as the page shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from jetson_ft.hardware import doctor
from jetson_ft.hardware.doctor.finding import failure, ok
from jetson_ft.webui.render import Locale, render
from jetson_ft.webui.tabs.device import Doctor

FIX = "Flash JetPack 6.2: https://developer.nvidia.com/embedded/jetpack"


def test_each_finding_has_its_mark_and_its_fix() -> None:
    result = doctor.as_json([
        ok("board.other", "not a Jetson: {name}, {cores} cores", name="<b>", cores=2),
        failure("jetpack.old", "{l4t}", FIX, l4t="r35"),
    ])  # fmt: skip
    english, chinese = (
        render("findings.jinja", Locale(language), **result) for language in ("en", "zh_CN")
    )
    assert "&lt;b&gt;, 2 cores" in english and "<b>," not in english
    assert 'class="failure"' in english and f"<code>{FIX}</code>" in english
    assert (
        "does not work" in english
        and "<code>请刷写 JetPack 6.2：https://developer.nvidia.com/embedded/jetpack</code>"
        in chinese
    )


@pytest.mark.slow
def test_the_machine_is_examined_once_for_all_pages(tmp_path: Path) -> None:
    examined = Doctor(tmp_path)
    result = examined.findings()
    assert {"memory", "torch", "bitsandbytes"} <= {check["name"] for check in result["checks"]}
    assert examined.findings() is result
