"""Exports and the server of a finished run on the page."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from light_jobs import LightJobs
from served import Serve
from starlette.testclient import TestClient
from workbench import wait_for

from jetson_ft.errors import UserError
from jetson_ft.runs import jobs
from jetson_ft.runs.store import Run
from jetson_ft.webui import api, fragments

CHECK = {
    "schema": 1, "checked": True, "prompts": 20, "same_text": 19, "passed": True,
    "bits_per_character": {"adapter": 1.8731, "export": 1.8742},
}  # fmt: skip


@pytest.fixture
def page(light_jobs: LightJobs, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    monkeypatch.setattr(fragments, "_CACHE_SECONDS", -1.0)  # else it is rendered once per second
    app = FastAPI()
    app.include_router(api.router(light_jobs.root))
    app.add_exception_handler(UserError, api.error_response)
    return TestClient(app, follow_redirects=False)


def make_export(run: Run, name: str, files: dict[str, bytes], check: Any = None) -> Path:
    """Make an export's folder by hand."""
    folder = run.path / "export" / name
    folder.mkdir(parents=True)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    listed = [{"name": file, "bytes": len(content)} for file, content in files.items()]
    export = {
        "schema": 1, "kind": name.partition("-")[0], "name": name, "files": listed, "merge": None,
        "created": "2026-11-30T09:59:30+00:00",
    }  # fmt: skip
    (folder / "export.json").write_text(json.dumps(export))
    (folder / "check.json").write_text(json.dumps(check or CHECK))
    return folder


def detail(page: TestClient, run: Run, language: str = "en") -> str:
    """Return the view of the run's exports, newly rendered, with single spaces."""
    answer = page.get(f"/live/{language}/runs/{run.name}?view=export").raise_for_status()
    return " ".join(answer.text.split())


def test_a_run_without_an_adapter_shows_nothing_to_export(
    page: TestClient, light_jobs: LightJobs
) -> None:
    run = light_jobs.run()
    assert "/adapter.zip" in detail(page, run) and 'id="start-export"' in detail(page, run)
    run.adapter.rmdir()
    html = detail(page, run)
    assert "<form" not in html and "A finished run can be exported" in html
    for action, body in (("export", {"choice": "merged"}), ("serve", {})):
        answer = page.post(f"/runs/{run.name}/{action}", json=body)
        assert answer.status_code == 422 and "no adapter yet" in answer.json()["what"]


def test_an_export_runs_is_cancelled_and_runs_again(
    page: TestClient, light_jobs: LightJobs
) -> None:
    run = light_jobs.run()
    light_jobs.choose("endless")
    answer = page.post(f"/runs/{run.name}/export", json={"choice": "gguf-q8_0"})
    assert answer.json() == {"done": True}
    light_jobs.command(run)
    job = jobs.read(run, "export")
    assert job and job.arguments == [
        "export", str(run.path), "--format", "gguf", "--quantize", "q8_0", "--json",
    ]  # fmt: skip
    html = detail(page, run)
    assert "Exporting · merging &lt;b&gt;" in html and 'style="width: 25.0%"' in html
    assert "light work" in html and 'id="start-export"' not in html
    again = page.post(f"/runs/{run.name}/export", json={"choice": "merged"})
    assert again.status_code == 422 and "is being exported" in again.json()["what"]

    assert page.post(f"/runs/{run.name}/jobs/export/stop").json() == {"done": True}
    light_jobs.wait(run, "stopped")
    html = detail(page, run)
    assert "The export was cancelled." in html and 'id="start-export"' in html
    light_jobs.choose("brief")
    wait_for(lambda: not jobs.is_live(run, "export"))
    page.post(f"/runs/{run.name}/export", json={"choice": "lora", "unchecked": "true"})
    assert light_jobs.wait(run, "finished").arguments[3:] == ["lora", "--no-check", "--json"]
    assert "cancelled" not in detail(page, run)


def test_the_failure_of_a_job_is_in_the_pages_language(
    page: TestClient, light_jobs: LightJobs
) -> None:
    run = light_jobs.run()
    light_jobs.start(run).kill()
    light_jobs.wait(run, "failed")
    assert "命令被终止，很可能是内存不足。" in detail(page, run, "zh_CN")
    log = jobs.job_folder(run, "export") / "log.txt"
    log.write_text("secret beginning" + "x" * 10_000 + "<script>end")
    html = detail(page, run)
    assert "&lt;script&gt;end" in html and "<script" not in html and "secret" not in html


def test_a_lost_job_is_named_and_can_be_started_again(
    page: TestClient, light_jobs: LightJobs
) -> None:
    run = light_jobs.run()
    light_jobs.start(run)
    assert "Exporting" in detail(page, run)
    light_jobs.keeper(run).kill()
    light_jobs.wait(run, "lost")
    html = detail(page, run)  # no file has changed
    assert "The job ended without a record" in html and 'id="start-export"' in html


def test_damaged_files_of_jobs_and_exports_break_nothing(
    page: TestClient, light_jobs: LightJobs
) -> None:
    run = light_jobs.run()
    for name in jobs.NAMES:
        folder = jobs.job_folder(run, name)
        folder.mkdir(parents=True)
        (folder / "progress.json").write_text('{"what": 1}')
    (jobs.job_folder(run, "export") / "job.json").write_text("{")
    job = {"arguments": [], "started": 1.0, "result": {"url": 1, "models": {}}}
    (jobs.job_folder(run, "serve") / "job.json").write_text(json.dumps(job))
    make_export(run, "merged", {}, {"prompts": "x", "logits": 3})
    (run.path / "export" / "lora").mkdir()
    html = detail(page, run)
    assert "job.json is damaged" in html and "not checked" in html


def test_an_export_is_listed_downloaded_and_deleted(
    page: TestClient, light_jobs: LightJobs
) -> None:
    run = light_jobs.run()
    files = {"a.gguf": b"GGUF" * 9, "Modelfile": b"FROM ./a.gguf"}
    folder = make_export(run, "gguf-q8_0", files)
    make_export(run, "lora", {"b.gguf": b"GGUF"}, {"schema": 1, "checked": False})
    html = detail(page, run)
    assert "✓ same text 19/20 · 1.873 → 1.874 bits per character" in html
    assert "<b>GGUF q8_0</b>" in html and "<b>Adapter as GGUF</b>" in html
    assert '<span class="chip warn">not checked</span>' in html
    assert f"ollama create {run.name}-q8_0 -f {folder}/Modelfile" in html
    assert html.count("ollama create") == 1
    assert f'href="/runs/{run.name}/exports/gguf-q8_0/a.gguf" download' in html
    assert "文本一致 19/20" in detail(page, run, "zh_CN")

    answer = page.get(f"/runs/{run.name}/exports/gguf-q8_0/a.gguf")
    assert answer.content == files["a.gguf"]
    assert answer.headers["content-disposition"] == 'attachment; filename="a.gguf"'
    address = f"/runs/{run.name}/exports/gguf-q8_0/delete"
    light_jobs.start(run, "server", "serve")  # it may read the file again
    refused = page.post(address)
    assert refused.status_code == 422 and "is being served" in refused.json()["what"]
    jobs.stop(run, "serve")
    wait_for(lambda: not jobs.is_live(run, "serve"))
    assert page.post(address).json() == {"done": True}
    assert not folder.exists() and "delete-gguf-q8_0" not in detail(page, run)
    assert page.post(address).status_code == 422


@pytest.mark.parametrize(
    "place", ["gguf-q8_0/none", "gguf-q8_0/../../state.json", "../adapter/x", "none/a.gguf",
              "gguf-q8_0/%2e%2e%2fstate.json", "..%2f..%2f/a.gguf", "gguf-q8_0/link",
              "gguf-q8_0/fifo", "gguf-q8_0/folder", "gguf-q8_0/unlisted", ".hidden/a.gguf"],
)  # fmt: skip
def test_what_is_no_file_of_an_export_is_not_served(
    page: TestClient, light_jobs: LightJobs, place: str
) -> None:
    run = light_jobs.run()
    folder = make_export(run, "gguf-q8_0", dict.fromkeys(("a.gguf", "link", "fifo", "folder"), b""))
    make_export(run, ".hidden", {"a.gguf": b""})
    for name in ("link", "fifo", "folder"):
        (folder / name).unlink()
    (folder / "link").symlink_to(run.path / "state.json")
    os.mkfifo(folder / "fifo")
    (folder / "folder").mkdir()
    (folder / "unlisted").write_text("x")
    assert page.get(f"/runs/{run.name}/exports/{place}").status_code in (404, 422)
    export = place.partition("/")[0]
    if export not in ("gguf-q8_0", ".."):  # the client turns the latter into other addresses
        answer = page.post(f"/runs/{run.name}/exports/{export}/delete")
        assert answer.status_code in (404, 405, 422)
    assert run.path.is_dir() and (run.path / "export" / ".hidden").is_dir()


def test_names_of_files_are_escaped(page: TestClient, light_jobs: LightJobs) -> None:
    run = light_jobs.run()
    name = '"><script>alert(1)<'
    make_export(run, "lora", {name: b"x"}, {**CHECK, "prompts": "<script>"})
    html = detail(page, run)
    assert "<script" not in html and "&lt;script&gt;alert(1)&lt;" in html
    address = f"/runs/{run.name}/exports/lora/%22%3E%3Cscript%3Ealert%281%29%3C"
    assert address in html and page.get(address).content == b"x"


def test_a_server_shows_its_address_and_hides_its_key(
    page: TestClient, light_jobs: LightJobs
) -> None:
    run = light_jobs.run()
    light_jobs.choose("server")
    assert page.post(f"/runs/{run.name}/serve").json() == {"done": True}
    light_jobs.command(run, "serve")
    job = wait_for(lambda: (job := jobs.read(run, "serve")) and job.result and job)
    options = dict(zip(job.arguments[2:-1:2], job.arguments[3:-1:2], strict=True))
    assert job.arguments[:2] == ["serve", str(run.path)] and job.arguments[-1] == "--json"
    assert 8000 <= int(options.pop("--port")) < 8100
    assert options == {"--host": "127.0.0.1", "--reached-as": ""}  # whatever the environment says
    html = detail(page, run)
    before, _summary, hidden = html.partition('<details class="key">')
    assert "http://127.0.0.1:8000/v1</code>" in before and "k-1" not in before
    command = hidden.partition("</details>")[0]
    assert "curl http://127.0.0.1:8000/v1/chat/completions" in command
    assert "Authorization: Bearer k-1" in command and "a-run" in command
    assert "天空为什么是蓝色的" in detail(page, run, "zh_CN")
    page.post(f"/runs/{run.name}/jobs/serve/stop")
    light_jobs.wait(run, "stopped", name="serve")
    assert 'id="start-serve"' in detail(page, run)


def test_each_log_keeps_open_by_a_class_of_its_own(page: TestClient, light_jobs: LightJobs) -> None:
    run = light_jobs.run()
    light_jobs.start(run)
    light_jobs.start(run, "server", "serve")
    classes = re.findall(r'<details class="(.*?)"', detail(page, run))
    assert {"log-export", "log-serve"} <= set(classes)
    assert len(classes) == len(set(classes)) and " " not in "".join(classes)


def test_the_page_of_a_container_names_the_command_that_serves(
    page: TestClient, light_jobs: LightJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server beside the page would listen on the container's own loopback."""
    monkeypatch.setenv("JETSON_FT_REACHED_AS", "127.0.0.1:7860")
    run = light_jobs.run()
    html = detail(page, run)
    assert f"<code>docker/run.sh serve {run.name}</code>" in html and "start-serve" not in html
    refused = page.post(f"/runs/{run.name}/serve")
    assert refused.status_code == 422 and "docker/run.sh serve" in refused.json()["fix"]
    assert jobs.read(run, "serve") is None


def test_a_check_without_texts_is_stated(page: TestClient, light_jobs: LightJobs) -> None:
    run = light_jobs.run()
    make_export(run, "lora", {}, {**CHECK, "prompts": 0, "same_text": 0})
    assert "no text compared · 1.873 → 1.874 bits per character" in detail(page, run)
    assert "same text" not in detail(page, run)


@pytest.mark.parametrize("body", [None, {}, {"choice": "zip"}, {"choice": ["merged"]}, "merged",
                                  {"choice": "gguf-../../x"}, {"choice": "--help"}])  # fmt: skip
def test_an_unknown_choice_starts_nothing(
    page: TestClient, light_jobs: LightJobs, body: Any
) -> None:
    run = light_jobs.run()
    assert page.post(f"/runs/{run.name}/export", json=body).status_code == 422
    assert page.post(f"/runs/{run.name}/jobs/other/stop").status_code == 422
    assert not (run.path / "jobs").exists()


@pytest.mark.slow(minutes=0.5)
def test_a_real_run_is_exported_over_http(
    page: TestClient, light_jobs: LightJobs, finished: Run
) -> None:
    run = Run(light_jobs.root / finished.name)
    shutil.copytree(finished.path, run.path)
    page.post(f"/runs/{run.name}/export", json={"choice": "merged"}).raise_for_status()
    job = light_jobs.wait(run, "finished", "failed", seconds=120)
    assert job.error is None and job.result["exports"][0]["name"] == "merged"
    progress = jobs.read_progress(run, "export")
    assert progress and progress.what == "writing"
    html = detail(page, run)
    assert "same next token" in html and "model.safetensors" in html
    answer = page.get(f"/runs/{run.name}/exports/merged/model.safetensors")
    stored = run.path / "export" / "merged" / "model.safetensors"
    assert answer.content == stored.read_bytes()
    assert page.get(f"/runs/{run.name}/exports/merged/README.md").status_code == 200


@pytest.mark.slow(minutes=0.5)
def test_a_job_goes_on_without_the_pages_server(light_jobs: LightJobs, serve: Serve) -> None:
    run = light_jobs.run()
    light_jobs.choose("endless")
    served = serve()
    address = f"/runs/{run.name}"
    httpx.post(f"{served.base}{address}/export", json={"choice": "merged"}).raise_for_status()
    command = light_jobs.command(run)
    served.kill()
    served = serve(port=served.port)
    answer = served.get(f"/live/en{address}?view=export")
    assert answer and "Exporting" in answer.text and command.is_running()
    httpx.post(f"{served.base}{address}/jobs/export/stop").raise_for_status()
    light_jobs.wait(run, "stopped")
