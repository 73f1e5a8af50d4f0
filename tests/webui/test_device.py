"""The doctor's findings as the page shows them."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from jetson_ft.hardware import doctor
from jetson_ft.hardware.doctor.finding import failure, ok
from jetson_ft.webui.gradio_import import gr
from jetson_ft.webui.render import Locale, render
from jetson_ft.webui.tabs import device
from jetson_ft.webui.tabs.device import Doctor

FIX = "Flash JetPack 6.2 or 7.2: https://developer.nvidia.com/embedded/jetpack"


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
        and "<code>请刷写 JetPack 6.2 或 7.2：https://developer.nvidia.com/embedded/jetpack</code>"
        in chinese
    )


@pytest.fixture
def examinations(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return the list that each examination is added to; one takes a moment."""
    results: list[dict[str, Any]] = []

    def examine(*_: str) -> dict[str, Any]:
        time.sleep(0.3)
        results.append(doctor.as_json([]))
        return results[-1]

    monkeypatch.setattr(device, "run_cli_json", examine)
    return results


def test_the_button_examines_again_and_opening_the_tab_does_not(
    tmp_path: Path, examinations: list[dict[str, Any]]
) -> None:
    with gr.Blocks() as page, gr.Tabs(), gr.Tab() as tab:
        device.build(Locale("en"), Doctor(tmp_path), tab)
    opened, clicked = (function.fn for function in page.fns.values())
    for call, count in ((opened, 1), (opened, 1), (clicked, 2), (clicked, 3), (opened, 3)):
        call()
        assert len(examinations) == count


def test_concurrent_clicks_share_an_examination(
    tmp_path: Path, examinations: list[dict[str, Any]]
) -> None:
    examined = Doctor(tmp_path)
    threads = [threading.Thread(target=examined.findings, args=[0.0]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(examinations) == 1


@pytest.mark.slow
def test_the_machine_is_examined_once_for_all_pages(tmp_path: Path) -> None:
    examined = Doctor(tmp_path)
    result = examined.findings()
    assert {"memory", "torch", "bitsandbytes"} <= {check["name"] for check in result["checks"]}
    assert examined.findings() is result
