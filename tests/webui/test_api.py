"""Fragments, actions and downloads of runs."""

from __future__ import annotations

import time
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from fastapi import FastAPI
from run_folders import make_run
from starlette.testclient import TestClient

from jetson_ft.errors import Message, UserError
from jetson_ft.events import Download, Paused, PauseEnded, PhaseStarted, Warned
from jetson_ft.runs import locks
from jetson_ft.runs.event_log import EventLog
from jetson_ft.webui import api


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def page(root: Path) -> TestClient:
    app = FastAPI()
    app.include_router(api.router(root))
    app.add_exception_handler(UserError, api.error_response)
    return TestClient(app, follow_redirects=False)


# Languages


@pytest.mark.parametrize(("accepted", "language"), [("zh-CN,en;q=0.8", "zh_CN"), ("fr", "en")])
def test_home_redirects_to_the_browsers_language(
    page: TestClient, accepted: str, language: str
) -> None:
    response = page.get("/?run=a", headers={"Accept-Language": accepted})
    assert response.headers["location"] == f"/{language}/?run=a"


def test_home_redirects_to_the_chosen_language(page: TestClient) -> None:
    headers = {"Cookie": "jetson-ft-language=zh_CN", "Accept-Language": "en"}
    assert page.get("/", headers=headers).headers["location"] == "/zh_CN/"


# Fragments


def test_the_list_of_an_empty_folder_explains_how_to_start(page: TestClient, root: Path) -> None:
    assert "没有训练任务" in page.get("/live/zh_CN/runs").text


def test_an_unchanged_fragment_is_not_sent_again(page: TestClient, root: Path) -> None:
    make_run(root, "20260101-000000-old")
    make_run(root, "20260102-000000-new", "stopped")
    first = page.get("/live/en/runs")
    assert first.text.index("-new") < first.text.index("-old")
    assert "stopped" in first.text and "step 3 of 10" in first.text
    again = page.get("/live/en/runs", headers={"If-None-Match": first.headers["etag"]})
    assert again.status_code == 304 and not again.content
    other = page.get("/live/zh_CN/runs", headers={"If-None-Match": first.headers["etag"]})
    assert "已停止" in other.text


def test_a_run_is_drawn_with_the_compared_runs(page: TestClient, root: Path) -> None:
    for name in ("20260101-000000-a", "20260102-000000-b"):
        make_run(root, name)
    address = "/live/en/runs/20260101-000000-a"
    drawn = {"drawn": ["20260102-000000-b", "20260103-000000-gone", "20260101-000000-a"]}
    both = page.get(address, params=drawn)
    assert both.status_code == 200 and both.text.count('class="plot"') == 1
    assert '<i class="c2"></i>a' in both.text and '<i class="c0"></i>b' in both.text
    assert page.get(address, params=drawn | {"view": "charts"}).text.count('class="plot"') == 4
    curves = page.get("/live/en/curves", params=drawn | {"view": "overview"})
    assert [run["colour"] for run in curves.json()] == [0, 2]
    again = {"If-None-Match": curves.headers["etag"]}
    assert (
        page.get("/live/en/curves", params=drawn | {"view": "overview"}, headers=again).status_code
        == 304
    )


def test_what_live_and_watched_runs_do_is_one_short_answer(page: TestClient, root: Path) -> None:
    make_run(root, "20260101-000000-ended")
    assert page.get("/progress/en").json() == []
    watched = {"watched": "20260101-000000-ended"}
    (run,) = page.get("/progress/zh_CN", params=watched).json()
    assert run == {"name": watched["watched"], "title": "ended", "is_live": False,
                   "share": None, "state": "已完成"}  # fmt: skip


def test_an_unchanged_run_of_a_changed_list_is_not_sent_again(page: TestClient, root: Path) -> None:
    old = make_run(root, "20260101-000000-old")
    first = page.get("/live/en/runs")
    make_run(root, "20260102-000000-new")
    time.sleep(1.1)
    second = page.get("/live/en/runs", headers={"If-None-Match": first.headers["etag"]})
    assert second.status_code == 200 and ">new<" in second.text and ">old<" not in second.text
    assert f'id="run-{old.name}" data-run="{old.name}" data-same></li>' in second.text
    assert ">old<" in page.get("/live/en/runs").text


def test_titles_and_logs_are_escaped(page: TestClient, root: Path) -> None:
    run = make_run(root, "20260101-000000-a")
    (run.path / "log.txt").write_text("<script>alert(1)</script>\n")
    assert page.post(f"/runs/{run.name}/about", json={"title": "<b>x"}).json() == {"done": True}
    for address in ("/live/en/runs", f"/live/en/runs/{run.name}/head"):
        html = page.get(address).text
        assert "&lt;b&gt;x" in html and "<b>x" not in html and "<script" not in html


def test_a_damaged_run_is_listed_with_the_others(page: TestClient, root: Path) -> None:
    make_run(root, "20260101-000000-a")
    bad = make_run(root, "20260102-000000-b")
    (bad.path / "state.json").write_text("{")
    html = page.get("/live/en/runs").text
    assert "20260101-000000-a" in html and "damaged" in html
    for address in ("", "/head", "?view=charts", "?view=log", "?view=settings", "?view=samples"):
        assert page.get(f"/live/en/runs/{bad.name}{address}").status_code == 200


@pytest.mark.slow
def test_phase_reason_and_warning_are_in_the_pages_language(page: TestClient, root: Path) -> None:
    run = make_run(root, "20260101-000000-a", "failed", steps=0)
    log = EventLog(run, 1)
    fault = Message("{path} is missing", {"path": "/x/step-3/a"})
    warning = Message("{fault}; the checkpoint before it is used", {"fault": fault})
    log.emit(Warned.of_message(warning))
    run.write_state("failed", Message("ended with code {code}; see log.txt", {"code": 7}))

    def shown(language: str) -> str:
        address = f"/live/{language}/runs/{run.name}"
        return " ".join((page.get(f"{address}/head").text + page.get(address).text).split())

    chinese = shown("zh_CN")
    assert "以代码 7 退出，详见 log.txt" in chinese and "缺少 /x/step-3/a；改用" in chinese
    english = shown("en")
    assert "ended with code 7" in english and "is missing; the checkpoint before" in english
    log = EventLog(run, 2)
    log.emit(PhaseStarted(name="model files"))
    held = locks.lock(run.path / "worker.lock")
    run.write_state("running", attempt=2)
    time.sleep(1.1)  # a fragment is rendered once per second
    resumed = shown("zh_CN")
    assert ">准备中<" in resumed and "获取模型文件" in resumed
    log.emit(Download(file="a", done=312_500_000, total=2_836_000_000, seconds_left=65.0))
    time.sleep(1.1)
    assert "获取模型文件 · 已下载 312 / 2,836 MB · 剩余 1 分 05 秒" in shown("zh_CN")
    assert "缺少" not in resumed  # an earlier attempt's warning
    paused = Paused(step=1, temperature=90.0, limit=85.0, until=80.0)
    ended = PauseEnded(step=1, temperature=80.0, seconds=9.0)
    for event, is_paused in ((paused, True), (ended, False)):
        log.emit(event)
        time.sleep(1.1)
        assert ("已暂停，等待降温" in shown("zh_CN")) == is_paused
    assert held
    held.close()


# Actions and files


@pytest.mark.parametrize("name", ["..", "%2e%2e", "..%2f..%2fetc", "nothing", ".deleted-x"])
def test_a_name_of_no_run_is_refused(page: TestClient, root: Path, name: str) -> None:
    make_run(root, "20260101-000000-a")
    for method, address in (
        ("GET", f"/live/en/runs/{name}"), ("POST", f"/runs/{name}/stop"),
        ("POST", f"/runs/{name}/delete"), ("GET", f"/runs/{name}/adapter.zip"),
        ("GET", f"/runs/{name}/report.html"),
    ):  # fmt: skip
        assert page.request(method, address).status_code in (404, 405, 422)
    assert (root / "20260101-000000-a").is_dir()


@pytest.mark.parametrize("file", ["recipe.yaml", "log.txt", "state.json", "..%2fstate.json"])
def test_another_file_of_a_run_is_refused(page: TestClient, root: Path, file: str) -> None:
    run = make_run(root, "20260101-000000-a")
    assert page.get(f"/runs/{run.name}/{file}").status_code in (404, 422)


def test_adapter_and_report_can_be_downloaded(page: TestClient, root: Path) -> None:
    run = make_run(root, "20260101-000000-a")
    assert "no adapter yet" in page.get(f"/runs/{run.name}/adapter.zip").json()["what"]
    run.adapter.mkdir()
    (run.adapter / "adapter_config.json").write_text("{}")
    (run.path / "report.md").write_text("# report")
    answer = page.get(f"/runs/{run.name}/adapter.zip")
    assert f"{run.name}-adapter.zip" in answer.headers["content-disposition"]
    archive = zipfile.ZipFile(BytesIO(answer.content))
    assert archive.namelist() == [f"{run.name}/adapter_config.json"]
    assert page.get(f"/runs/{run.name}/report.md").text == "# report"


def test_an_action_has_the_result_of_its_command(page: TestClient, root: Path) -> None:
    run = make_run(root, "20260101-000000-a")
    assert page.post(f"/runs/{run.name}/resume").json()["what"].endswith("is finished.")
    assert page.post(f"/runs/{run.name}/explode").status_code == 422
    assert page.post(f"/runs/{run.name}/delete").json() == {"done": True}
    assert not run.path.exists()
    assert run.title() == run.name


def test_an_error_is_in_the_language_of_its_page(page: TestClient, root: Path) -> None:
    run = make_run(root, "20260101-000000-a")
    headers = {"Referer": "http://testserver/zh_CN/?run=a"}
    error = page.post(f"/runs/{run.name}/resume", headers=headers).json()
    assert error["what"] == f"{run.name} 已完成。" and error["fix"].startswith("请延长它")
    assert error["where"] == str(run.path)
    assert page.get("/live/zh_CN/runs/none").json()["what"] == "没有任务 'none'。"


@pytest.mark.parametrize("file", ["compare.html", "compare.md", "none/report.html", "none/log.txt"])
def test_an_error_of_a_link_is_a_page(page: TestClient, root: Path, file: str) -> None:
    headers = {"Accept": "text/html,*/*;q=0.8", "Referer": "http://testserver/zh_CN/?run=a"}
    error = page.get(f"/runs/{file}?run=none", headers=headers)
    assert error.status_code == 422 and error.headers["content-type"].startswith("text/html")
    assert "<h1>没有任务 &#39;none&#39;。</h1>" in error.text
    assert page.get(f"/runs/{file}?run=none").json()["what"]
