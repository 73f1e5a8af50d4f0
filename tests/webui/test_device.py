"""The doctor's findings as the page shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from jetson_ft.device import doctor
from jetson_ft.device.doctor.finding import failure, ok
from jetson_ft.webui.device import Doctor, findings_html
from jetson_ft.webui.words import Words


def test_each_finding_has_its_mark_and_what_mends_it() -> None:
    found = doctor.as_json([
        ok("board.other", name="<b>", cores=2),
        failure("jetpack.old", jetpack="JetPack 5", l4t="35.4.1"),
    ])  # fmt: skip
    english, chinese = (findings_html(found, Words(language)) for language in ("en", "zh"))
    assert "&lt;b&gt;, 2 cores" in english and "<b>," not in english
    assert 'class="failure"' in english and "<code>Flash JetPack" in english
    assert "would not work" in english and "不支持 JetPack 5" in chinese


@pytest.mark.slow
def test_this_machine_is_examined_once_for_all_who_look(tmp_path: Path) -> None:
    asked = Doctor(tmp_path)
    found = asked.findings()
    assert {"memory", "torch", "bitsandbytes"} <= {check["name"] for check in found["checks"]}
    assert asked.findings() is found
