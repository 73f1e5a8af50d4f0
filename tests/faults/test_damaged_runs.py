"""A damaged run is shown with what is wrong, can be deleted, and hides no other."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from program import invoke
from program import run as run_program
from run_folders import make_run
from run_page import run_page
from starlette.testclient import TestClient
from typer.testing import CliRunner

from jetson_ft.chat import target
from jetson_ft.cli.app import app
from jetson_ft.errors import UserError
from jetson_ft.recipe import Recipe
from jetson_ft.runs import manager, monitor, store
from jetson_ft.runs.store import Run
from jetson_ft.webui import api
from jetson_ft.webui.fragments import VIEWS, Fragments

pytestmark = pytest.mark.promise(58)

GOOD, BAD = "20260101-000000-good", "20260102-000000-bad"
FILES = (
    "state.json", "plan.json", "events.jsonl", "about.json", "data.json", "processes.json",
    "report.json", "recipe.yaml", "log.txt",
)  # fmt: skip
SIDE = dict.fromkeys(
    ("loss", "bits_per_char", "chinese_share", "stop_rate", "repetition", "chrf", "bleu"), 0.5
) | {"samples": []}
REPORT = {
    "eval": {"rows": 1, "documents": 0, "before": SIDE, "after": SIDE}, "sensors": None,
    "train": {
        "steps": 3, "best_step": 3, "tokens": 9, "seconds": 1.0, "tokens_per_second": 9.0,
        "peak_memory_bytes": 1,
    },
}  # fmt: skip


def fill(run: Run) -> Run:
    """Give a run all files that one has."""
    contents: dict[str, Any] = {
        "plan.json": {"peak_memory_bytes": 1, "parts": {}}, "about.json": {"title": run.name},
        "data.json": {"sha256": "0", "recipe": Recipe().model_dump()}, "processes.json": {},
        "report.json": REPORT,
    }  # fmt: skip
    for name, content in contents.items():
        (run.path / name).write_text(json.dumps({"schema": 1, **content}))
    (run.path / "log.txt").write_text("loading\n")
    run.adapter.mkdir()
    (run.adapter / "adapter_config.json").write_text("{}")
    return run


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    for name in (GOOD, BAD):
        fill(make_run(folder, name))
    return folder


def page_of(root: Path) -> TestClient:
    app = FastAPI()
    app.include_router(api.router(root))
    app.add_exception_handler(UserError, api.error_response)
    return TestClient(app, follow_redirects=False)


def text(content: str | bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(path))


# Kinds of file that no reader may wait for, and contents of every file.
ODD_FILES: dict[str, Callable[[Path], None]] = {
    "folder": Path.mkdir, "dangling link": lambda path: path.symlink_to("nowhere"),
    "FIFO": os.mkfifo, "socket": make_socket, "device": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path.name),
}  # fmt: skip
CONTENTS: dict[str, Callable[[Path], None]] = {
    "empty": text(""), "half": text('{"state": "fini'), "list": text("[1, [2]]"),
    "null": text("null"), "number": text("1e308"), "NaN": text('{"attempt": NaN}'),
    "bytes": text(b"\xff\xfe\0\0"), "NUL": text(b"\0" * 4096), "deep": text("[" * 100_000),
    "future": text('{"schema": 2, "state": "finished"}'),
    "10 MB": text('{"a": "' + "x" * 10**7 + '"}'), "20 MB": text(b" " * (20 << 20)),
}  # fmt: skip
STATES: dict[str, Any] = {
    "attempt as text": {"attempt": "1"}, "negative attempt": {"attempt": -1},
    "huge attempt": {"attempt": 10**30}, "unknown state": {"state": "dreaming"},
    "null state": {"state": None}, "list": {"reason": ["x"]}, "huge time": {"updated": 1e400},
    "hostile message": {"message": {"template": "{a.__class__}", "values": {"a": 1}}},
    "endless message": {"message": {"template": "{a:999999999}", "values": {"a": 1}}},
    "wrong message": {"message": {"template": 3}}, "missing value": {
        "message": {"template": "{b}", "values": {"a": 1}}
    },
}  # fmt: skip


def assert_shown_and_deleted(root: Path, fault: str) -> None:
    """Every door shows the fault and the good neighbour; the damaged run can be deleted."""
    listed = invoke("runs", "list", "--runs", root)
    by_name = {line.split()[0]: line for line in listed.splitlines()[1:]}
    assert (
        "finished" in by_name[GOOD] and "3/10" in by_name[GOOD] and "damaged" not in by_name[GOOD]
    )
    assert f"{BAD}: {fault}" in listed
    assert fault in invoke("runs", "show", BAD, "--runs", root)
    assert "finished" in invoke("runs", "show", GOOD, "--runs", root)
    page = page_of(root)
    html = page.get("/live/en/runs").text
    assert html.count("damaged:") == 1 and html.count('data-choose="') == 2
    head = page.get(f"/live/en/runs/{BAD}/head").text
    assert 'data-do="delete"' in head and '<div class="fault"' in head
    assert '<div class="fault"' not in page.get(f"/live/en/runs/{GOOD}/head").text
    for name in (BAD, GOOD):
        for view in VIEWS:
            drawn = {"view": view, "drawn": [BAD, GOOD]}
            assert page.get(f"/live/en/runs/{name}", params=drawn).status_code == 200
    assert page.get("/live/en/runs", params={"view": "table"}).status_code == 200
    assert [run.name for run in store.runs_with_adapter(root)] == [BAD, GOOD]
    assert manager.resumable_runs(root) == []
    invoke("runs", "stop", BAD, "--runs", root)
    assert invoke("runs", "delete", BAD, "--yes", "--runs", root) == f"{BAD}: deleted\n"
    assert [run.name for run in store.list_runs(root)] == [GOOD]


@pytest.mark.parametrize("name", FILES)
def test_anything_in_a_files_place_is_named_without_waiting(
    root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.chdir(root)  # the path of a socket is short
    path = root / BAD / name
    for make in ODD_FILES.values():
        path.unlink()
        make(path)
        (fault,) = monitor.summarize(Run(root / BAD)).faults
        assert str(fault.what).startswith(f"{name} is damaged: it ")
        path.rmdir() if path.is_dir() else path.unlink()
        path.touch()
    path.unlink()
    os.mkfifo(path)
    assert_shown_and_deleted(root, f"{name} is damaged: it is not a regular file")


@pytest.mark.parametrize("step", [None, "3", {}])
def test_report_without_its_best_step_is_named_by_what_starts_from_the_run(
    root: Path, step: Any
) -> None:
    train = {**REPORT["train"], "best_step": step}
    if step == {}:
        del train["best_step"]
    (root / BAD / "report.json").write_text(json.dumps({**REPORT, "train": train}))
    recipe = Recipe.model_validate({"lora": {"initial_adapter": str(root / BAD)}})
    with pytest.raises(UserError, match=r"report.json is damaged: .*best_step"):
        manager.check_recipe(recipe)


@pytest.mark.parametrize("kind", ODD_FILES)
def test_odd_files_leave_no_file_open(
    root: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page reads a damaged run every few seconds, for weeks."""
    run, descriptors = Run(root / BAD), Path("/proc/self/fd")
    monkeypatch.chdir(root)  # the path of a socket is short
    for name in ("about.json", "log.txt", "supervisor.lock", "worker.lock"):
        (run.path / name).unlink(missing_ok=True)
        ODD_FILES[kind](run.path / name)
    monitor.summarize(run)  # what is opened once
    before = len(list(descriptors.iterdir()))
    for _time in range(3):
        monitor.summarize(run)
        with suppress(OSError, UserError):
            run.open_log().close()
    assert len(list(descriptors.iterdir())) == before


@pytest.mark.parametrize("name", [*FILES[:2], *FILES[3:8]])
def test_any_content_is_named(root: Path, name: str) -> None:
    run = Run(root / BAD)
    for kind, write in CONTENTS.items():
        write(run.path / name)
        faults = [str(fault.what) for fault in monitor.summarize(run).faults]
        if kind == "10 MB" and name in ("about.json", "plan.json", "processes.json"):
            assert not faults  # nothing that is read is wrong
        else:
            assert len(faults) == 1 and faults[0].startswith(f"{name} is damaged: ")
            assert ("has more than" in faults[0]) == (
                kind == "20 MB" or (kind == "10 MB" and name == "recipe.yaml")
            )


@pytest.mark.parametrize("kind", STATES)
def test_wrong_values_of_a_state_are_named(
    root: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    path = root / BAD / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **STATES[kind]}))
    assert_shown_and_deleted(root, "state.json is damaged: ")


def test_events_without_a_readable_line_are_named(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    (root / BAD / "events.jsonl").write_bytes(b'{"kind": "step"}\n\xff\n[]\n' + b"\0" * 2**21)
    assert_shown_and_deleted(root, "events.jsonl is damaged: its newest lines are not events")


def test_a_run_in_another_ones_hands_hides_no_other(root: Path) -> None:
    """The reader is another user: as root every file could be read."""
    if os.getuid():
        pytest.skip("needs root, to become another user")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        place.chmod(0o755)
        root.rename(place / "runs")
        names = {"closed": "20260103-000000-closed", "secret": "20260104-000000-secret"}
        for name in names.values():
            fill(make_run(place / "runs", name))
        (place / "runs" / names["closed"]).chmod(0o700)
        for path in (place / "runs" / names["secret"]).iterdir():
            path.chmod(0o700)
        listed, shown, html = in_fork_as_nobody(place / "runs", names["secret"])
    for name in names.values():
        assert f"{name}: state.json is damaged: it can't be read (Permission denied)" in listed
    assert GOOD in listed and f"{GOOD}: " not in listed
    assert "recipe.yaml is damaged: it can't be read" in shown
    assert html.count('class="state damaged"') == 2 and html.count('class="state finished"') == 2


def in_fork_as_nobody(root: Path, name: str) -> list[str]:
    """Return the list, one run, and the page's list as the user `nobody` sees them."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            os.environ["COLUMNS"] = "300"
            texts = [
                invoke("runs", "list", "--runs", root), invoke("runs", "show", root / name),
                page_of(root).get("/live/en/runs").text,
            ]  # fmt: skip
            with open(writing, "w") as file:
                json.dump(texts, file)
        except BaseException:
            traceback.print_exc()
        finally:  # whatever happens, this is no second test session
            os._exit(0)
    os.close(writing)
    with open(reading) as file:
        content = file.read()
    os.waitpid(child, 0)
    texts: list[str] = json.loads(content)
    return texts


# --- what a damaged run can still do -----------------------------------------------------------


def test_a_run_without_a_state_is_shown_and_resumed(
    light_runs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state is written anew, with the attempt after the newest event's."""
    run = light_runs.launch("endless")
    light_runs.worker(run)
    manager.stop(run)
    light_runs.wait(run, "stopped")
    for damage in ("", "{", '{"state": "sleeping"}'):
        state = run.path / "state.json"
        state.write_text(damage) if damage else state.unlink()
        before = run.events()[-1].attempt
        monkeypatch.setenv("COLUMNS", "300")
        assert f"{run.name}: state.json is damaged" in invoke(
            "runs", "list", "--runs", light_runs.root
        )
        page = Fragments(light_runs.root)
        assert 'data-do="resume"' in page.run_head("en", run.name, "overview")
        manager.resume(run)
        light_runs.worker(run)
        assert run.state().attempt == before + 1
        manager.stop(run)
        light_runs.wait(run, "stopped")


def test_a_live_run_with_a_damaged_state_is_stopped_and_recorded(light_runs: Any) -> None:
    run = light_runs.launch("endless")
    light_runs.worker(run)
    light_runs.wait(run, "running")
    (run.path / "state.json").write_text("{")
    assert 'data-do="stop"' in Fragments(light_runs.root).run_head("en", run.name, "overview")
    with pytest.raises(UserError, match="is running"):
        manager.delete(run)
    assert "damaged, stop requested" in invoke("runs", "stop", run.path)
    light_runs.until(lambda: not manager.is_live(run))
    assert run.state().state == "stopped"


def test_a_state_of_a_later_version_is_not_overwritten(root: Path) -> None:
    content = '{"schema": 2, "state": "finished"}'
    (root / BAD / "state.json").write_text(content)
    with pytest.raises(UserError, match="format 2 is not known here"):
        manager.resume(Run(root / BAD))
    assert (root / BAD / "state.json").read_text() == content


@pytest.mark.parametrize("name", ["recipe.yaml", "data.json", "processes.json"])
def test_resume_names_the_file_that_it_needs(root: Path, name: str) -> None:
    Run(root / BAD).write_state("stopped")
    (root / BAD / name).write_text("{,")
    result = CliRunner().invoke(app, ["train", "--resume", str(root / BAD)])
    assert result.exit_code and f"{name} is damaged" in str(result.exception or result.output)
    assert Run(root / BAD).state().state == "stopped"


def test_a_program_in_its_process_prints_one_message(root: Path) -> None:
    (root / BAD / "recipe.yaml").unlink()
    done = run_program("train", "--resume", str(root / BAD), cwd=root)
    assert done.returncode == 2 and done.stderr.count("error: ") == 1
    assert "recipe.yaml is damaged: it is missing" in done.stderr
    assert "Traceback" not in done.stderr and "fix:" in done.stderr


def test_the_chat_offers_the_good_adapter(root: Path) -> None:
    (root / BAD / "recipe.yaml").unlink()
    (root / BAD / "about.json").write_text("[")
    assert [run.title() for run in store.runs_with_adapter(root)] == [BAD, GOOD]
    with pytest.raises(UserError, match=r"recipe\.yaml is damaged: it is missing"):
        target.resolve_target(BAD, root)
    assert target.resolve_target(GOOD, root).adapter_dir == root / GOOD / "adapter"


def test_a_damaged_adapter_is_not_zipped_for_ever(root: Path) -> None:
    os.mkfifo(root / BAD / "adapter" / "more")
    with pytest.raises(UserError, match="more is damaged: it is not a regular file"):
        manager.zip_adapter(Run(root / BAD), root / "x.zip")
    assert not list(root.glob("*x.zip*"))


def test_a_recipe_alone_is_a_run_unless_it_is_being_launched(tmp_path: Path) -> None:
    run = store.create_run(Recipe(output_dir=str(tmp_path)), "x")
    assert store.list_runs(tmp_path) == []
    old = time.time() - 60
    os.utime(run.path / "recipe.yaml", (old, old))
    assert "state.json is damaged: it is missing" in invoke("runs", "list", "--runs", tmp_path)


# --- any content -------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
KEYS = st.sampled_from(
    ["schema", "state", "message", "attempt", "title", "notes", "eval", "train", "before", "rows",
     "sensors", "parts", "peak_memory_bytes", "nnodes", "nproc_per_node", "recipe", "kind", "step",
     "loss", "template", "values", "over_current", "messages", "text"]
)  # fmt: skip
OBJECT = st.dictionaries(KEYS, JSON | st.dictionaries(KEYS, JSON, max_size=3), max_size=6)
EVENT = st.fixed_dictionaries(
    {"kind": st.sampled_from(["step", "eval", "warning", "error", "download", "phase", "sensors"])},
    optional={"step": st.integers(), "attempt": st.integers(-1, 3), "loss": JSON, "lr": st.floats(),
              "text": OBJECT, "messages": OBJECT, "message": st.text(), "name": st.text()},
)  # fmt: skip
CONTENT = (
    st.binary(max_size=200)
    | OBJECT
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.lists(EVENT, max_size=4).map(
        lambda lines: b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    )
)


@pytest.fixture(scope="module")
def shared_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("any") / "runs"
    fill(make_run(folder, GOOD))
    yield folder


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(FILES), CONTENT, min_size=1, max_size=3))
def test_any_content_leaves_all_doors_open(
    shared_root: Path, contents: dict[str, bytes | dict[str, Any]]
) -> None:
    """A dictionary changes values of the JSON that is there."""
    bad = fill(make_run(shared_root, f"{BAD}-{time.monotonic_ns()}"))
    for name, content in contents.items():
        path = bad.path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            old = json.loads(path.read_text()) if name.endswith(".json") else {}
            path.write_text(json.dumps(old | content))
    fragments = Fragments(shared_root)
    try:
        html = fragments.run_list("zh_CN", "", ())
        html += run_page(fragments, "zh_CN", bad.name, GOOD)
        html += run_page(fragments, "en", GOOD, bad.name)
        html.encode()
        assert monitor.summarize(Run(shared_root / GOOD)).faults == ()
        invoke("runs", "list", "--runs", shared_root)
        result = CliRunner().invoke(app, ["runs", "show", str(bad.path)])
        assert result.exit_code == 0, result.exception
        manager.resumable_runs(shared_root)
    finally:
        manager.delete(bad)
