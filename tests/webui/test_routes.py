"""The runs as the page sees them: pieces, actions, files."""

from __future__ import annotations

import time
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from jetson_ft.errors import UserError
from jetson_ft.runs import live, rundir
from jetson_ft.runs.rundir import EventLog, Run
from jetson_ft.webui import routes
from jetson_ft.webui.words import _WORDS, LANGUAGES, Words, preferred


def make_run(root: Path, name: str, state: str = "finished", steps: int = 3) -> Run:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("version: 1\n")
    run = Run(folder)
    run.write_state(state)
    log = EventLog(run, 1)
    for number in range(1, steps + 1):
        log.emit("step", step=number, total_steps=10, loss=3.0 / number, seconds_left=65.0,
                 lr=1e-3, grad_norm=1.0, tokens_per_second=180.0, memory=2**31)  # fmt: skip
    log.emit("eval", step=steps, heldout_loss=2.5)
    return run


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def page(root: Path) -> TestClient:
    app = FastAPI()
    app.include_router(routes.router(root))
    app.add_exception_handler(UserError, routes.tell)
    return TestClient(app, follow_redirects=False)


# Languages


@pytest.mark.parametrize(
    ("asked", "language"),
    [
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh"), ("en-GB,en;q=0.9", "en"), ("fr,zh;q=0.3,en;q=0.5", "en"),
        ("", "en"), ("de", "en"), ("zh;q=oops, en", "en"),
    ],
)  # fmt: skip
def test_the_browsers_language_is_taken(page: TestClient, asked: str, language: str) -> None:
    assert preferred(asked) == language
    answer = page.get("/?run=a", headers={"Accept-Language": asked})
    assert answer.headers["location"] == f"/{language}/?run=a"


def test_a_chosen_language_stays(page: TestClient) -> None:
    answer = page.get("/", headers={"Cookie": "jetson-ft-language=zh", "Accept-Language": "en"})
    assert answer.headers["location"] == "/zh/"


def test_every_text_is_there_in_both_languages_with_the_same_places() -> None:
    for key, texts in _WORDS.items():
        assert len(texts) == len(LANGUAGES) and all(texts), key
        braces = [sorted(part.split("}")[0] for part in text.split("{")[1:]) for text in texts]
        assert braces[0] == braces[1], key
        chinese = any("\u4e00" <= letter <= "\u9fff" for letter in texts[1])
        assert chinese or "{" in texts[1] or texts[0] == texts[1], key
    assert Words("zh").duration(3725) == "1 小时 02 分"
    assert Words("xx").duration(245) == "4 min 05 s"


# Pieces


def test_an_empty_folder_says_how_to_begin(page: TestClient, root: Path) -> None:
    assert "没有训练任务" in page.get("/live/zh/runs").text


def test_a_piece_is_sent_only_when_it_changed(page: TestClient, root: Path) -> None:
    make_run(root, "20260101-000000-old")
    make_run(root, "20260102-000000-new", "stopped")
    first = page.get("/live/en/runs")
    assert first.text.index("-new") < first.text.index("-old")
    assert "stopped" in first.text and "step 3 of 10" in first.text
    again = page.get("/live/en/runs", headers={"If-None-Match": first.headers["etag"]})
    assert again.status_code == 304 and not again.content
    other = page.get("/live/zh/runs", headers={"If-None-Match": first.headers["etag"]})
    assert "已停止" in other.text


def test_a_run_is_drawn_with_others_beside_it(page: TestClient, root: Path) -> None:
    for name in ("20260101-000000-a", "20260102-000000-b"):
        make_run(root, name)
    alone = page.get("/live/en/runs/20260101-000000-a").text
    assert alone.count("<svg") == 5 and 'class="train c1"' not in alone
    both = page.get("/live/en/runs/20260101-000000-a", params={"beside": "20260102-000000-b"}).text
    assert 'class="train c1"' in both
    gone = page.get("/live/en/runs/20260101-000000-a", params={"beside": "20260103-000000-c"})
    assert gone.status_code == 200


def test_what_people_and_programs_wrote_is_shown_as_text(page: TestClient, root: Path) -> None:
    run = make_run(root, "20260101-000000-a")
    (run.path / "log.txt").write_text("<script>alert(1)</script>\n")
    assert page.post(f"/runs/{run.name}/about", json={"title": "<b>x"}).json() == {"done": True}
    for address in ("/live/en/runs", f"/live/en/runs/{run.name}"):
        html = page.get(address).text
        assert "&lt;b&gt;x" in html and "<b>x" not in html and "<script" not in html


def test_a_damaged_run_hides_no_other(page: TestClient, root: Path) -> None:
    make_run(root, "20260101-000000-a")
    bad = make_run(root, "20260102-000000-b")
    (bad.path / "state.json").write_text("{")
    html = page.get("/live/en/runs").text
    assert "20260101-000000-a" in html and "damaged" in html
    assert page.get(f"/live/en/runs/{bad.name}").status_code == 200


@pytest.mark.slow
def test_a_run_tells_its_phase_its_end_and_a_warning_in_the_pages_language(
    page: TestClient, root: Path
) -> None:
    run = make_run(root, "20260101-000000-a", "failed", steps=0)
    log = EventLog(run, 1)
    log.emit("warning", message="/x/step-3/a is missing; the checkpoint before it is used")
    run.write_state("failed", "ended with code 7; see log.txt")
    chinese = page.get(f"/live/zh/runs/{run.name}").text
    assert "以代码 7 退出，详见 log.txt" in chinese and "缺少 /x/step-3/a；改用" in chinese
    english = page.get(f"/live/en/runs/{run.name}").text
    assert "ended with code 7" in english and "is missing; the checkpoint before" in english
    log.emit("phase", name="model files", detail="")
    held = rundir.lock(run.path / "worker.lock")
    run.write_state("running", attempt=2)
    time.sleep(1.1)  # a piece is made once a second
    resumed = page.get(f"/live/zh/runs/{run.name}").text
    assert "准备中：获取模型文件" in resumed
    log.emit("download", file="a", done=312_500_000, total=2_836_000_000, seconds_left=65.0)
    time.sleep(1.1)
    fetching = " ".join(page.get(f"/live/zh/runs/{run.name}").text.split())
    assert "获取模型文件 · 已下载 312 / 2,836 MB · 剩余 1 分 05 秒" in fetching
    assert "缺少" not in resumed  # an earlier attempt's warning
    for kind, shown in (("pause", True), ("pause_end", False)):
        log.emit(kind, step=1)
        time.sleep(1.1)
        found = page.get(f"/live/zh/runs/{run.name}").text
        assert ("已暂停，等待降温" in found) == shown
    assert held
    held.close()


# Actions and files


@pytest.mark.parametrize("name", ["..", "%2e%2e", "..%2f..%2fetc", "nothing", ".deleted-x"])
def test_only_runs_are_reached_by_name(page: TestClient, root: Path, name: str) -> None:
    make_run(root, "20260101-000000-a")
    for method, address in (
        ("GET", f"/live/en/runs/{name}"), ("POST", f"/runs/{name}/stop"),
        ("POST", f"/runs/{name}/delete"), ("GET", f"/runs/{name}/adapter.zip"),
        ("GET", f"/runs/{name}/report.html"),
    ):  # fmt: skip
        assert page.request(method, address).status_code in (404, 405, 422)
    assert (root / "20260101-000000-a").is_dir()


@pytest.mark.parametrize("file", ["recipe.yaml", "log.txt", "state.json", "..%2fstate.json"])
def test_no_other_file_of_a_run_is_served(page: TestClient, root: Path, file: str) -> None:
    run = make_run(root, "20260101-000000-a")
    assert page.get(f"/runs/{run.name}/{file}").status_code in (404, 422)


def test_an_adapter_and_its_report_are_taken_away(page: TestClient, root: Path) -> None:
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


def test_an_action_does_what_the_command_does(page: TestClient, root: Path) -> None:
    run = make_run(root, "20260101-000000-a")
    assert page.post(f"/runs/{run.name}/resume").json()["what"].endswith("is finished.")
    assert page.post(f"/runs/{run.name}/explode").status_code == 422
    assert page.post(f"/runs/{run.name}/delete").json() == {"done": True}
    assert not run.path.exists()
    assert live.title(run) == run.name


def test_a_refusal_is_told_in_the_language_of_the_page_that_asked(
    page: TestClient, root: Path
) -> None:
    run = make_run(root, "20260101-000000-a")
    asks = {"Referer": "http://testserver/zh/?run=a"}
    told = page.post(f"/runs/{run.name}/resume", headers=asks).json()
    assert told["what"] == f"{run.name} 已完成。" and told["fix"].startswith("请延长它")
    assert told["where"] == str(run.path)
    assert page.get("/live/zh/runs/none").json()["what"] == "没有任务 'none'。"
