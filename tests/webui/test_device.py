"""The Device tab: findings with their fixes, examined once for all pages, and gauges."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from boards_in_folders import NANO, NX, FakeMachine
from fastapi import FastAPI
from starlette.testclient import TestClient
from workbench import wait_for

from jetson_ft.errors import UserError
from jetson_ft.hardware import doctor
from jetson_ft.hardware.doctor.finding import failure, ok, warning
from jetson_ft.webui.render import Locale, render
from jetson_ft.webui.tabs import device
from jetson_ft.webui.tabs.device import Doctor, Gauges, fix_parts

FIX = "Flash JetPack 6.2 or 7.2: https://developer.nvidia.com/embedded/jetpack"
ENGLISH, CHINESE = Locale("en"), Locale("zh_CN")


def wait_until_examined(doctor: Doctor) -> None:
    """Wait for the end of the examination that runs."""
    assert doctor._examining
    doctor._examining.join()


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return a function that makes the findings those of the next examination."""

    def examine(*findings: Any) -> Doctor:
        result = doctor.as_json(list(findings))
        monkeypatch.setattr(device, "run_cli_json", lambda *_: result)
        made = Doctor(tmp_path)
        made.examine()
        wait_until_examined(made)
        return made

    return examine


def test_failures_and_warnings_come_first_with_their_fixes(examined: Any) -> None:
    shown = examined(
        ok("board.other", "not a Jetson: {name}, {cores} cores", name="<b>", cores=2),
        warning("power.slower", "{mode}; {best} is faster", "sudo nvpmodel -m {id}",
                mode="15W", best="MAXN", id=2),
        failure("jetpack.old", "{l4t}", FIX, l4t="r35"),
    )  # fmt: skip
    english, chinese = shown.html(ENGLISH), shown.html(CHINESE)
    assert re.findall(r'<li class="(\w+)"', english) == ["failure", "warning", "ok"]
    assert "&lt;b&gt;, 2 cores" in english and "<b>," not in english
    assert "Training does not work here" in english and FIX in english
    command = '<code>sudo nvpmodel -m 2</code><button class="do" data-copy aria-label='
    assert command in english
    assert "请刷写 JetPack 6.2 或 7.2：https://developer.nvidia.com/embedded/jetpack" in chinese


@pytest.mark.parametrize(
    ("fix", "parts"),
    [
        ("sudo nvpmodel -q", [("sudo nvpmodel -q", "command")]),
        ("Run `make clean`, then `x`", [("Run ", "text"), ("make clean", "command"),
                                        (", then ", "text"), ("x", "code")]),
        ("`--set a=b c`", [("--set a=b c", "code")]),
        ("Raise the limit", [("Raise the limit", "text")]),
    ],
)  # fmt: skip
def test_the_commands_of_a_fix_can_be_copied(fix: str, parts: list[tuple[str, str]]) -> None:
    assert fix_parts(fix) == parts


def test_findings_stay_while_the_machine_is_examined_again(
    examined: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, release = examined(ok("board.other", "this board")), threading.Event()

    def fail(*_: str) -> dict[str, Any]:
        release.wait(5)
        raise UserError("No such program.", fix="Install it.")

    monkeypatch.setattr(device, "run_cli_json", fail)
    shown.examine()
    html = shown.html(ENGLISH)
    assert "this board" in html and "data-examining" in html and "Examine again" not in html
    release.set()
    wait_until_examined(shown)
    html = shown.html(ENGLISH)
    assert "No such program." in html and "Install it." in html
    assert "this board" in html and "Examine again" in html


def test_all_pages_share_an_examination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, release = 0, threading.Event()

    def examine(*_: str) -> dict[str, Any]:
        nonlocal count
        count += 1
        release.wait(20)
        return doctor.as_json([])

    monkeypatch.setattr(device, "run_cli_json", examine)
    shared = Doctor(tmp_path)
    for max_age, expected in ((60.0, 1), (0.0, 1)):  # the second, while the first examines
        shared.examine(max_age)
        assert shared.html(ENGLISH).count("data-examining") == 1 and count <= expected
    release.set()
    wait_until_examined(shared)
    shared.examine(60.0)
    wait_until_examined(shared)
    assert count == 1, "young enough"
    shared.examine()
    wait_until_examined(shared)
    assert count == 2


def test_only_opening_the_tab_examines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the tab is open, it is fetched every two seconds, also beside a run."""
    monkeypatch.setattr(device, "_CACHE_SECONDS", 0.0)  # each findings are too old
    examined: list[tuple[str, ...]] = []

    def examine(*command: str) -> dict[str, Any]:
        examined.append(command)
        return doctor.as_json([])

    monkeypatch.setattr(device, "run_cli_json", examine)
    app = FastAPI()
    app.include_router(device.router(tmp_path))
    client = TestClient(app)
    assert "data-examining" not in client.get("/live/en/device").text and examined == []
    client.get("/live/en/device?opened=true")
    wait_for(lambda: "data-examining" not in client.get("/live/en/device").text)
    findings = client.get("/live/en/device")
    known = {"If-None-Match": findings.headers["etag"]}
    assert client.get("/live/en/device", headers=known).status_code == 304
    assert len(examined) == 1


@pytest.mark.slow
def test_this_machine_is_examined(tmp_path: Path) -> None:
    real = Doctor(tmp_path)
    real.examine()
    wait_until_examined(real)
    assert all(f">{name}</span>" in real.html(ENGLISH) for name in ("Memory", "PyTorch", "Disk"))


# --- gauges -----------------------------------------------------------------------------------


def test_a_board_has_all_gauges_with_their_limits(tmp_path: Path) -> None:
    gauges = Gauges(FakeMachine(tmp_path, NX).root).read()
    shown = {gauge.title: (gauge.value, gauge.percent, ENGLISH(gauge.limit)) for gauge in gauges}
    assert shown["Power"] == ("15.0 W", pytest.approx(99.7, abs=0.1), "15 W")
    assert shown["Temperature"] == ("62 °C", pytest.approx(63.1, abs=0.1), "slower from 99 °C")
    assert shown["GPU"] == ("97 % · 1015 MHz", 97, "100 %")
    assert {"Memory", "Processor"} <= shown.keys()
    html = render("gauges.jinja", CHINESE, gauges=gauges)
    assert html.count('role="meter"') >= 4 and "99 °C 起降频" in html


def test_the_processors_load_is_that_of_the_moment_in_any_thread(tmp_path: Path) -> None:
    """psutil's own `cpu_percent` without an interval is 0 in each new thread."""
    ended = threading.Event()
    busy = threading.Thread(target=lambda: [None for _ in iter(ended.is_set, True)], daemon=True)
    busy.start()
    loads: list[float | None] = []
    try:
        for _read in range(2):
            with ThreadPoolExecutor(1) as thread:
                gauges = thread.submit(Gauges(tmp_path).read).result()
            loads += [gauge.percent for gauge in gauges if gauge.title == "Processor"]
    finally:
        ended.set()
        busy.join()
    assert len(loads) == 2 and all(load and load > 5 for load in loads)


def test_a_value_without_a_known_limit_has_no_bar(tmp_path: Path) -> None:
    gauges = Gauges(FakeMachine(tmp_path, NANO).root).read()  # whose mode has no limit of power
    (power,) = [gauge for gauge in gauges if gauge.title == "Power"]
    assert power.percent is None
    assert "meter" not in render("gauges.jinja", ENGLISH, gauges=[power])


@pytest.mark.parametrize(("percent", "level"), [(50, ""), (86, "high"), (97, "full"), (None, "")])
def test_a_gauge_near_its_limit_is_marked(percent: float | None, level: str) -> None:
    assert device.Gauge("Memory", "1 GiB", percent).level == level
    assert device.Gauge("GPU", "99 %", percent, is_load=True).level == ""


def test_the_sensors_are_read_once_a_second_and_closed_when_nothing_shows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    closed = threading.Event()

    class Counted(device.Telemetry):
        def read(self) -> Any:
            read.append("read")
            return super().read()

        def close(self) -> None:
            read.append("close")
            super().close()
            closed.set()

    monkeypatch.setattr(device, "Telemetry", Counted)
    monkeypatch.setattr(device, "_READ_SECONDS", 60.0)
    gauges = Gauges(tmp_path)
    assert gauges.read() == gauges.read() and read == ["read"]
    monkeypatch.setattr(device, "_IDLE_SECONDS", 0.0)
    gauges.read()  # the last one for now
    assert closed.wait(20) and read == ["read", "close"]
    monkeypatch.setattr(device, "_READ_SECONDS", 0.0)
    monkeypatch.setattr(device, "_IDLE_SECONDS", 60.0)
    assert gauges.read()
    gauges.close()
    assert read == ["read", "close", "read", "close"]
