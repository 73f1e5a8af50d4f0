"""Jobs of a run: their keeper, their end in all ways, and what readers see."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import program
import psutil
import pytest
from light_jobs import LightJobs
from workbench import wait_for

from jetson_ft.child_process import PROGRESS_FILE
from jetson_ft.cli.output import ProgressBar
from jetson_ft.errors import Message, UserError
from jetson_ft.files import DiskFull
from jetson_ft.runs import job_process, jobs, manager
from jetson_ft.runs.jobs import Job, Progress


def test_a_job_that_ends_has_what_its_command_printed(light_jobs: LightJobs) -> None:
    run = light_jobs.run()
    assert jobs.read(run, "export") is None
    light_jobs.start(run, "brief")
    job = light_jobs.wait(run, "finished")
    assert job.result == {"exports": []} and job.error is None and job.ended >= job.started
    assert (jobs.job_folder(run, "export") / "log.txt").read_text() == "light work\n"
    progress = jobs.read_progress(run, "export")
    assert progress and (progress.what, progress.done, progress.total) == ("merging <b>", 1, 4)
    wait_for(lambda: not jobs.is_live(run, "export"))


def test_the_error_of_a_command_keeps_its_template(light_jobs: LightJobs) -> None:
    run = light_jobs.run()
    jobs.start(run, "export", ["export", str(run.path), "--format", "zip", "--json"])
    job = light_jobs.wait(run, "failed", seconds=60)
    error = jobs.error_of(job)
    assert error and "{values}" in error.what.template
    assert error.what.values["values"] == "'zip'"


def test_a_command_that_prints_nothing_is_a_failed_job(light_jobs: LightJobs) -> None:
    run = light_jobs.run()
    light_jobs.start(run).kill()
    job = light_jobs.wait(run, "failed")
    assert "ran out of memory" in str(jobs.error_of(job))
    jobs.start(run, "export", ["light"])  # at once: it waits for the keeper's end
    light_jobs.wait(run, "running")


def test_a_server_is_ready_once_it_has_printed_its_address(light_jobs: LightJobs) -> None:
    run = light_jobs.run()
    light_jobs.start(run, "server", "serve")
    job = wait_for(lambda: (job := jobs.read(run, "serve")) and job.result and job)
    assert job.is_live and job.result["models"] == ["a-run"]
    jobs.stop(run, "serve")
    light_jobs.wait(run, "stopped", name="serve")
    light_jobs.start(run, "broken-server", "serve")
    job = light_jobs.wait(run, "failed", name="serve")
    assert str(jobs.error_of(job)) == "The engine has ended." and job.result == {}


def test_a_job_ends_on_request(light_jobs: LightJobs) -> None:
    run = light_jobs.run()
    command = light_jobs.start(run)
    assert "stop requested" in program.invoke("runs", "stop", run.path)
    assert light_jobs.wait(run, "stopped").error is None
    assert not command.is_running()
    wait_for(lambda: not jobs.is_live(run, "export"))
    assert "nothing to stop" in program.invoke("runs", "stop", run.path)
    light_jobs.start(run)  # a former request to stop doesn't end it
    assert not (jobs.job_folder(run, "export") / "stop").exists()
    assert jobs.is_live(run, "export")


@pytest.mark.slow(minutes=0.3)
def test_a_command_that_ignores_the_request_is_killed(light_jobs: LightJobs) -> None:
    run = light_jobs.run()
    command = light_jobs.start(run, "stubborn")
    jobs.stop(run, "export")
    assert light_jobs.wait(run, "stopping").is_live
    light_jobs.wait(run, "stopped", seconds=20)
    assert not command.is_running()


def test_sigterm_of_the_container_ends_a_job(light_jobs: LightJobs) -> None:
    run = light_jobs.run()
    command = light_jobs.start(run)
    light_jobs.keeper(run).send_signal(signal.SIGTERM)
    light_jobs.wait(run, "stopped")
    assert not command.is_running()


def test_an_export_that_was_made_is_no_cancelled_one(light_jobs: LightJobs) -> None:
    """The request to stop came after the last moment."""
    run = light_jobs.run()
    light_jobs.start(run, "late")
    jobs.stop(run, "export")
    assert light_jobs.wait(run, "finished").result == {"exports": []}


def test_a_keeper_outlives_a_full_disk(
    light_jobs: LightJobs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = light_jobs.run()
    folder = jobs.job_folder(run, "serve")
    folder.mkdir(parents=True)
    write, failures = job_process.write_json, [DiskFull(Message("The disk is full."), "x")] * 2

    def write_if_there_is_room(path: Path, value: Any) -> None:
        if failures:
            raise failures.pop()
        write(path, value)

    light_jobs.choose("server")
    write(folder / "job.json", asdict(Job(["light"], time.time())))
    monkeypatch.setattr(job_process, "write_json", write_if_there_is_room)
    monkeypatch.setattr(job_process.signal, "signal", lambda *_: None)
    keeper = threading.Thread(target=job_process.keep, args=[folder, []])
    keeper.start()
    wait_for(lambda: jobs.read_record(folder).result)
    (folder / "stop").touch()
    keeper.join(20)
    assert jobs.read_record(folder).state == "stopped" and not failures


def test_a_keeper_leaves_no_zombie(light_jobs: LightJobs) -> None:
    run = light_jobs.run()
    light_jobs.start(run, "endless")
    keeper = light_jobs.keeper(run)
    jobs.stop(run, "export")
    wait_for(lambda: not psutil.pid_exists(keeper.pid), 10)


def test_a_command_ends_with_its_keeper(light_jobs: LightJobs) -> None:
    run = light_jobs.run()
    command, keeper = light_jobs.start(run), light_jobs.keeper(run)
    keeper.kill()
    psutil.wait_procs([command], 10)
    job = light_jobs.wait(run, "lost")
    assert not command.is_running() and not job.is_live
    assert "ended without a record" in str(jobs.error_of(job))
    light_jobs.start(run, "brief")
    light_jobs.wait(run, "finished")


def test_a_command_holds_the_lock_like_its_keeper(light_jobs: LightJobs) -> None:
    run = light_jobs.run()
    command, keeper = light_jobs.start(run), light_jobs.keeper(run)
    command.suspend()
    locks = [file.path for file in command.open_files() if file.path.endswith("export.lock")]
    assert locks == [str(run.path / "jobs" / "export.lock")]
    keeper.kill()


def test_a_second_job_is_refused(light_jobs: LightJobs) -> None:
    run, other = light_jobs.run(), light_jobs.run("20260102-000000-b")
    light_jobs.start(run)
    for second in (run, other):  # each may need most of the memory
        with pytest.raises(UserError, match=r"-a is being exported.*\n.*\n.*Stop that first"):
            jobs.start(second, "export", ["light"])
    assert jobs.read(other, "export") is None
    light_jobs.start(other, name="serve")
    with pytest.raises(UserError, match="-b is being served"):
        jobs.start(run, "serve", ["light"])


def test_a_run_without_an_adapter_has_no_jobs(light_jobs: LightJobs) -> None:
    run = light_jobs.run()
    run.adapter.rmdir()
    with pytest.raises(UserError, match="no adapter yet"):
        jobs.start(run, "export", ["light"])
    assert not (run.path / "jobs").exists()


def test_a_run_with_a_live_job_is_not_deleted(light_jobs: LightJobs) -> None:
    run = light_jobs.run()
    light_jobs.start(run)
    with pytest.raises(UserError, match="is being exported"):
        manager.delete(run)
    manager.stop(run)
    wait_for(lambda: not jobs.is_live(run, "export"))
    manager.delete(run)
    assert not run.path.exists()


def test_a_job_ends_with_its_folder(light_jobs: LightJobs) -> None:
    run = light_jobs.run()
    command, keeper = light_jobs.start(run), light_jobs.keeper(run)
    shutil.rmtree(run.path)
    psutil.wait_procs([command, keeper], 10)
    assert not command.is_running() and not keeper.is_running()
    assert not run.path.exists()


@pytest.mark.parametrize(
    "content", ["", "[]", '{"arguments": []}', '{"arguments": [], "started": "x"}', "\0",
                '{"arguments": [], "started": 1.0, "error": {"messages": {}}}',
                '{"arguments": [], "started": 1.0, "error": {"messages": []}}'],
)  # fmt: skip
def test_a_damaged_record_is_named_and_replaced(light_jobs: LightJobs, content: str) -> None:
    run = light_jobs.run()
    folder = jobs.job_folder(run, "export")
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(content)
    with pytest.raises(UserError, match=r"job\.json is damaged"):
        jobs.read(run, "export")
    if content == "\0":
        light_jobs.start(run, "brief")
        light_jobs.wait(run, "finished")


# Progress


def test_the_bar_writes_its_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "progress.json"
    monkeypatch.setenv(PROGRESS_FILE, str(path))
    with ProgressBar(live=False) as bar:
        written = []
        for done in (0, 1, 2, 1000):
            bar.show("merging", done, 1000)
            written.append(json.loads(path.read_text())["done"])
        since = json.loads(path.read_text())["since"]
        bar.show("checking", 0, None)
        values = json.loads(path.read_text())
    assert written == [0, 0, 0, 1000]  # at most twice a second, and the end
    assert values["what"] == "checking" and values["total"] is None and values["since"] >= since
    shutil.rmtree(tmp_path)
    with ProgressBar(live=False) as bar:
        bar.show("a disk without room", 1, 2)


def test_the_time_left_follows_from_the_part_so_far() -> None:
    assert Progress("x", 1, 4, since=100.0).seconds_left(110.0) == 30.0
    for done, total in ((0, 4), (4, 4), (5, 4), (1, None), (1, 0)):
        assert Progress("x", done, total, since=100.0).seconds_left(110.0) is None
    assert Progress("x", 1, 4, since=100.0).seconds_left(90.0) is None  # the clock was set back
