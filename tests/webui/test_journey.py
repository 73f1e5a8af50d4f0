"""The whole use of the page, in a real browser with the embedded model."""

from __future__ import annotations

import contextlib
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from few_probes import IN_CHILDREN
from light_jobs import LightJobs
from run_folders import make_run
from script_modules import load_script
from served import Serve, Served
from workbench import change_children

from jetson_ft.runs import jobs, manager
from jetson_ft.runs.store import Run, list_runs
from jetson_ft.webui.tabs.inside import PANELS

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.slow(minutes=2)
SETTINGS = {
    "data-heldout": "1", "train-max_minutes": "0.5",
    "train-tokens_per_step": "64", "train-learning_rate": "2e-3", "train-eval_every": "5",
    "eval-max_new_tokens": "2", "eval-samples": "1",
}  # fmt: skip
TIMEOUT = 120_000  # milliseconds; other tests share the machine


@pytest.fixture(autouse=True)
def _stop_all_runs(tmp_path: Path) -> Iterator[None]:
    """Stop all runs: a run outlives its page and a failed test."""
    yield
    for run in list_runs(tmp_path / "runs"):
        manager.stop(run)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Return a file of few, similar rows: the loss falls within seconds."""
    path = tmp_path / "mine.json"
    row = {"instruction": "天空为什么是蓝色的？", "output": "阳光被空气散射，蓝光散射得最多。"}
    path.write_text(
        json.dumps([row | {"instruction": f"{n}、{row['instruction']}"} for n in range(40)]),
        encoding="utf-8",
    )
    return path


def choose(page: Any, tab: str) -> None:
    page.get_by_role("tab", name=tab).click()


def open_runs(browser: Any, served: Served) -> Any:
    """Return a page with the runs open."""
    page = browser.new_page(locale="en-GB")
    page.goto(served.link)
    choose(page, "Runs")
    return page


def start_run(page: Any, rows: Path) -> None:
    """Upload the data, wait for rows and plan, which appear by themselves, and start."""
    page.locator("#data-kind label", has_text="My files").click()
    page.locator("#upload input[type=file]").set_input_files(rows)
    sync_api.expect(
        page.locator("#field-data-train input, #field-data-train textarea")
    ).to_have_value(re.compile(r"uploads/.*mine\.json$"))
    for group in ("data", "training", "evaluation"):
        page.locator(f"#group-{group} > button").click()
    for field, value in SETTINGS.items():
        page.locator(f"#field-{field}").locator("input, textarea").fill(value)
    sync_api.expect(page.locator("#data-rows")).to_contain_text("蓝光", timeout=TIMEOUT)
    sync_api.expect(page.locator("#plan")).to_contain_text("GiB", timeout=TIMEOUT)
    page.get_by_role("button", name="Start", exact=True).click()


def the_run(folder: Path) -> Run:
    (run,) = list_runs(folder / "runs")
    return run


def wait_for_state(page: Any, state: str) -> None:
    pill = page.locator(f"#run-detail .pill.{state}")
    sync_api.expect(pill).to_be_visible(timeout=TIMEOUT)


def loss_shown(page: Any) -> float:
    shown = page.locator("#run-detail .tile b").first
    sync_api.expect(shown).to_have_text(re.compile(r"\d"), timeout=TIMEOUT)
    return float(shown.inner_text())


def assert_panels_are_quick(served: Served, run: Run) -> None:
    """Fail if a panel needs two seconds, the model being loaded.

    Where other tests share the processor, the panel may need three seconds of a core instead.
    """

    def show(view: str, options: dict[str, Any]) -> None:
        asked = {"model": run.name, "options": options}
        httpx.post(f"{served.base}/inside/{view}", json=asked, timeout=60).raise_for_status()

    (chat,) = (
        child
        for child in psutil.Process(served.process.pid).children()
        if "jetson_ft.chat.server" in child.cmdline()
    )
    seconds = load_script("time_inside").time_panels(show, chat)
    assert list(seconds) == list(PANELS)
    late = [name for name, (wall, computed) in seconds.items() if wall >= 2 and computed >= 3]
    assert late == [], seconds


def test_from_an_empty_folder_to_a_downloaded_adapter(
    browser: Any, serve: Serve, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_children(IN_CHILDREN, tmp_path, monkeypatch, own_cache=False)
    served = serve()
    page = browser.new_page(viewport={"width": 1440, "height": 1000}, locale="en-GB")
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(served.link)
    start_run(page, rows)
    wait_for_state(page, "running")
    first = loss_shown(page)

    page.reload()  # in mid-run: the runs are shown again, and go on
    wait_for_state(page, "running")
    served.kill()
    served = serve(port=served.port)
    with contextlib.suppress(sync_api.Error):  # Gradio's script reloads by itself, which ends this
        page.reload()
    wait_for_state(page, "running")
    page.get_by_role("button", name="Stop", exact=True).and_(page.locator(".do")).click()
    wait_for_state(page, "stopped")
    stopped_at = len(the_run(tmp_path).events())
    page.get_by_role("button", name="Resume").click()
    wait_for_state(page, "finished")
    assert loss_shown(page) < first
    assert len(the_run(tmp_path).events()) > stopped_at and the_run(tmp_path).state().attempt == 2
    sync_api.expect(page.locator("#run-detail .plot canvas").first).to_be_visible()

    choose(page, "Chat")
    page.get_by_label("Compare with").click()
    page.get_by_role("option", name="(base)").first.click()
    sync_api.expect(page.locator("#chat-b")).to_be_visible()
    page.get_by_role("button", name="Settings").click()
    page.locator("#chat-max_new_tokens input[type=number]").fill("4")
    page.keyboard.press("Escape")
    box = page.get_by_role("textbox", name="Message")
    box.fill("天空为什么是蓝色的？")
    box.press("Enter")
    answered = page.locator("#chat .bot-row[data-note*=tokens]")
    sync_api.expect(answered).to_have_count(2, timeout=TIMEOUT)
    page.get_by_role("button", name="History").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="JSON").click()
    conversation = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    assert conversation["models"] == [the_run(tmp_path).name, "own-base"]
    (turn,) = conversation["turns"]
    assert turn["question"] == "天空为什么是蓝色的？" and len(turn["answers"]) == 2

    choose(page, "Inside")
    for name, panel in PANELS.items():  # on the embedded model, with the adapter just trained
        page.locator(f"#inside-form input[value={name}]").check(force=True)
        if name == "tokens":  # chosen from the start
            page.get_by_role("button", name="Show").click()
        views = page.locator("#inside-views article.inside")
        sync_api.expect(views).to_have_count(len(panel.views), timeout=TIMEOUT)
    sync_api.expect(page.locator("#inside-views")).to_contain_text("v_proj", timeout=TIMEOUT)
    assert_panels_are_quick(served, the_run(tmp_path))

    page.get_by_role("button", name="简体中文").click()
    choose(page, "任务")
    page.locator("#view-export").click()
    with page.expect_download() as download:
        page.locator("a[href$='adapter.zip']").click()
    names = zipfile.ZipFile(download.value.path()).namelist()
    assert any(name.endswith("/adapter_model.safetensors") for name in names)
    assert faults == []
    assert served.close() == 130, "with the page still open"


def test_a_button_acts_on_the_shown_run(browser: Any, serve: Serve, tmp_path: Path) -> None:
    """Another run is chosen, and its fragment does not arrive."""
    shown, chosen = (make_run(tmp_path / "runs", f"2026010{n}-000000-{n}") for n in (2, 1))
    served = serve()
    page = open_runs(browser, served)
    sync_api.expect(page.locator("#run-detail h2")).to_have_text(shown.label)
    page.route(re.compile("/live/en/runs/."), lambda route: route.abort())
    page.locator(f"[data-choose='{chosen.name}']").click()
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    sync_api.expect(page.locator(f"[data-choose='{shown.name}']")).to_have_count(0)
    assert list_runs(tmp_path / "runs")[0].path == chosen.path


def test_the_last_runs_detail_is_gone_after_its_deletion(
    browser: Any, serve: Serve, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "runs", "20260101-000000-1")
    served = serve()
    page = open_runs(browser, served)
    sync_api.expect(page.locator("#run-detail h2")).to_have_text(run.label)
    with page.expect_response(re.compile(r"/live/en/runs\?")):
        pass
    page.wait_for_timeout(1200)  # the list that the server keeps has become too old
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    sync_api.expect(page.locator(f"[data-choose='{run.name}']")).to_have_count(0)
    sync_api.expect(page.locator("#run-head")).to_be_empty()
    sync_api.expect(page.locator("#run-view")).to_be_empty()


def test_the_detail_stays_while_requests_fail(browser: Any, serve: Serve, tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", "20260101-000000-1")
    served = serve()
    page = open_runs(browser, served)
    title = page.locator("#run-detail h2")
    sync_api.expect(title).to_have_text(run.label)
    address = re.compile("/live/en/runs/.")
    with page.expect_response(address):
        page.route(address, lambda route: route.fulfill(status=500))
    sync_api.expect(title).to_have_text(run.label)
    page.unroute(address)
    manager.set_title_and_notes(run, "another title")
    sync_api.expect(title).to_have_text("another title")


def test_an_export_is_chosen_started_and_cancelled_by_keyboard(
    browser: Any, serve: Serve, light_jobs: LightJobs
) -> None:
    run = light_jobs.run()
    light_jobs.choose("endless")
    served = serve()
    page = open_runs(browser, served)
    page.locator("#view-export").focus()
    page.keyboard.press("Enter")
    page.locator("#choice-gguf-f16").focus()
    choice = page.locator("#choice-lora")
    while not choice.is_checked():
        page.keyboard.press("ArrowDown")
    page.locator("#export-unchecked").focus()
    page.keyboard.press("Space")
    page.keyboard.press("Tab")  # to the button
    manager.set_title_and_notes(run, "another title")  # the fragment changes
    sync_api.expect(page.locator("#run-detail h2")).to_have_text("another title")
    sync_api.expect(choice).to_be_checked()
    sync_api.expect(page.locator("#start-export")).to_be_focused()

    page.keyboard.press("Enter")
    cancel = page.locator("#stop-export")
    sync_api.expect(cancel).to_be_visible(timeout=TIMEOUT)
    job = jobs.read(run, "export")
    assert job and job.arguments[2:] == ["--format", "lora", "--no-check", "--json"]
    cancel.focus()
    sync_api.expect(page.locator("#run-detail")).to_contain_text("merging <b>")
    page.wait_for_timeout(3000)
    sync_api.expect(cancel).to_be_focused()
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#run-detail")).to_contain_text("The export was cancelled.")
    width = "element => element.scrollWidth - element.clientWidth"
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.locator("#run-detail").evaluate(width) <= 0
