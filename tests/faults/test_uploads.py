"""Files that clients of the page upload: limits, names, their folder, and what is left of them."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from page_client import PageClient
from served import Served
from workbench import wait_for

from jetson_ft.errors import UserError
from jetson_ft.files import printable
from jetson_ft.recipe import Recipe
from jetson_ft.runs import store
from jetson_ft.webui import server, uploads
from jetson_ft.webui.tabs.train_data import sources_of
from jetson_ft.webui.uploads import Incoming, safe_file_name

pytestmark = pytest.mark.any_packages

FORM = {"Content-Type": "multipart/form-data; boundary=B"}
UPLOAD = "/en/gradio_api/upload"
DAY = 24 * 3600


def form(content: bytes, name: str = "rows.jsonl", count: int = 1) -> list[bytes]:
    """Return the parts of a form with one file, whose content comes so many times."""
    head = f'--B\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    return [head.encode(), *[content] * count, b"\r\n--B--\r\n"]


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir()]


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then), follow_symlinks=False)


class Page:
    """A server, and the folder of its uploads."""

    def __init__(self, folder: Path) -> None:
        self.served = Served(folder)
        self.folder = folder / "runs" / "uploads"

    def post(self, content: Any, **headers: str) -> httpx.Response:
        return httpx.post(self.served.base + UPLOAD, content=content, headers={**FORM, **headers})

    def upload(self, content: bytes, name: str) -> str:
        """Upload a file as the form does; return the path that the form has then."""
        (path,) = self.post(b"".join(form(content, name))).raise_for_status().json()
        client = PageClient(self.served.base)
        meta = {"_type": "gradio.FileData"}
        file = {"path": path, "orig_name": name, "meta": meta}
        text = client.call(client.dependency("add_files"), [[file], "bundled"])[0]
        (source,) = sources_of(text)
        return source.source


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    page = Page(tmp_path_factory.mktemp("page"))
    yield page
    page.served.kill()


# Limits


@pytest.fixture
def small_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a client of the whole application, whose uploads may have 100,000 bytes."""
    from starlette.testclient import TestClient

    from jetson_ft.webui.page import make_app
    from jetson_ft.webui.security import AccessPolicy

    incoming = Incoming(tmp_path)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(incoming.folder))
    app = make_app(tmp_path, AccessPolicy(upload_bytes=100_000, incoming=incoming))
    return TestClient(app, base_url="http://127.0.0.1")


@pytest.mark.promise(21)
@pytest.mark.promise(45)
def test_upload_over_the_limit_gets_413_and_leaves_nothing(
    small_page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = form(b"x" * 10_000, count=20)
    for content in (b"".join(large), iter(large)):
        response = small_page.post(UPLOAD, content=content, headers=FORM)
        assert response.status_code == 413 and "larger than" in response.text
        assert files_in(tmp_path / "uploads") == []
    several = [part for _number in range(9) for part in form(b"x" * 20_000)[:2]]
    assert small_page.post(UPLOAD, content=iter(several), headers=FORM).status_code == 413
    assert files_in(tmp_path / "uploads") == []
    # What is damaged, or names nothing.
    for content in (b"", b"--B", b"\r\n--B\r\n", form(b"x", "..")[0] + b"x\r\n--B--\r\n"):
        assert small_page.post(UPLOAD, content=content, headers=FORM).status_code in (200, 400)
        assert files_in(tmp_path / "uploads") == []
    assert small_page.post(UPLOAD, content=b"".join(form(b"x")), headers=FORM).status_code == 200
    # A disk that such a file would fill.
    disk = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(uploads.shutil, "disk_usage", lambda _path: disk)
    for content in (b"".join(form(b"x" * 60_000)), iter(form(b"x" * 10_000, count=6))):
        response = small_page.post(UPLOAD, content=content, headers=FORM)
        assert response.status_code == 507 and "half of the free space" in response.text
    assert small_page.post(UPLOAD, content=b"".join(form(b"x")), headers=FORM).status_code == 200


@pytest.mark.promise(21)
@pytest.mark.promise(45)
@pytest.mark.parametrize("size", [2**31 + 1, 10**17])
def test_size_over_the_limit_is_refused_before_the_file_comes(page: Page, size: int) -> None:
    with socket.create_connection(("127.0.0.1", page.served.port), 5) as connection:
        head = f"POST {UPLOAD} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {size}\r\n"
        connection.sendall(f"{head}Content-Type: {FORM['Content-Type']}\r\n\r\n".encode())
        status = connection.recv(100).split(b"\r\n")[0]
    assert b" 413 " in status or b" 507 " in status


@pytest.mark.promise(21)
@pytest.mark.promise(45)
def test_upload_that_its_client_aborts_leaves_nothing(page: Page) -> None:
    before = set(files_in(page.folder))
    with socket.create_connection(("127.0.0.1", page.served.port), 5) as connection:
        head = f"POST {UPLOAD} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n"
        connection.sendall(f"{head}Content-Type: {FORM['Content-Type']}\r\n\r\n".encode())
        connection.sendall(b"".join(form(b"x" * 100_000)[:2]))
        wait_for(lambda: set(files_in(page.folder)) - before)
    wait_for(lambda: set(files_in(page.folder)) == before)


# Names


@pytest.mark.promise(21)
@pytest.mark.promise(22)
@pytest.mark.promise(45)
@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("数据 1.jsonl", "数据 1.jsonl"),
        ("../../../etc/x.jsonl", "x.jsonl"),
        ("C:\\dir\\rows.json", "rows.json"),
        ("-rf.jsonl", "rf.jsonl"),
        ("a\u202egnp.jsonl", None),
        ("<img src=x onerror=alert(1)>.json", None),
        ("数" * 100 + ".jsonl", None),
    ],
)
def test_name_of_a_file_is_its_last_part(page: Page, name: str, stored: str | None) -> None:
    path = Path(page.upload(b'{"text": "a"}\n', name))
    assert path.parent.parent == page.folder and path.read_bytes() == b'{"text": "a"}\n'
    assert path.name == (stored or path.name) and path.suffix == Path(name).suffix
    assert not path.name.startswith(("-", ".")) and len(path.name.encode()) <= 200
    assert not set(path.name) & {"/", "\\", "<", ">", "\u202e"}
    assert path.stat().st_mode & 0o077 == 0 and path.parent.stat().st_mode & 0o077 == 0


@pytest.mark.promise(21)
@pytest.mark.promise(22)
@given(st.text(st.characters(), max_size=300), st.sampled_from(["", ".json", ".jsonl.gz"]))
def test_any_name_becomes_one_of_a_file(name: str, suffix: str) -> None:
    safe = safe_file_name(name + suffix)
    assert Path("/folder", safe).resolve() == Path("/folder") / safe
    assert 0 < len(safe.encode()) <= 200 and not safe.startswith(("-", ".", "~"))
    assert printable(safe) == safe and not set(safe) & set("\n\t/\\")
    assert safe_file_name(safe) == safe
    if name.strip(" .-~").isalnum():
        assert safe.endswith(suffix)


# The folder


@pytest.mark.promise(45)
def test_uploads_are_closed_to_other_users(page: Page) -> None:
    for folder in (page.folder, *page.folder.glob("incoming-*")):
        assert folder.stat().st_mode & 0o777 == 0o700
        assert folder.owner() == Path.home().owner() or folder.stat().st_uid == os.geteuid()
    environment = Path(f"/proc/{page.served.process.pid}/cwd").resolve()
    assert page.folder.is_relative_to(environment)
    (path,) = page.post(b"".join(form(b"x"))).json()
    assert page.folder in Path(path).parents


@pytest.mark.promise(45)
@pytest.mark.parametrize("how", ["link", "foreign"])
def test_folder_that_another_user_made_is_refused(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    runs = tmp_path / "runs"
    runs.mkdir()
    if how == "link":
        (runs / "uploads").symlink_to(elsewhere)
    else:
        (runs / "uploads").mkdir()
        monkeypatch.setattr(uploads.os, "geteuid", lambda: os.getuid() + 1)
    (tmp_path / "rows.jsonl").write_text("")
    for act in (
        lambda: Incoming(runs).prepare(),
        lambda: uploads.store(runs, tmp_path / "rows.jsonl"),
    ):
        with pytest.raises(UserError, match="a link, or belongs to another user") as caught:
            act()
        assert str(runs / "uploads") in str(caught.value.where)
    assert files_in(elsewhere) == [] and files_in(runs / "uploads") == []


@pytest.mark.promise(45)
def test_page_with_a_link_for_uploads_serves_all_else(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "uploads").symlink_to(tmp_path / "elsewhere")
    served = Served(tmp_path)
    try:
        response = served.get("/en/")
        assert response and response.status_code == 200
        refused = httpx.post(served.base + UPLOAD, content=b"".join(form(b"x")), headers=FORM)
        assert refused.status_code == 503 and "belongs to another user" in refused.text
        assert files_in(tmp_path / "elsewhere") == []
    finally:
        served.kill()


@pytest.mark.promise(45)
def test_link_in_the_place_of_an_upload_is_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    (tmp_path / "rows.jsonl").symlink_to(secret)
    with pytest.raises(UserError, match="not a file"):
        uploads.store(tmp_path / "runs", tmp_path / "rows.jsonl")
    assert secret.exists() and files_in(tmp_path / "runs") == []


# What is swept


@pytest.mark.promise(45)
def test_files_that_no_run_names_are_swept_after_a_day(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    paths = []
    for number in range(3):
        source = tmp_path / f"{number}.jsonl"
        source.write_text('{"text": "a"}\n')
        paths.append(uploads.store(runs, source))
    unused, used, new = paths
    recipe = Recipe.model_validate({"output_dir": str(runs), "data": {"train": str(used)}})
    run = store.create_run(recipe, "uploaded")
    foreign = runs / "uploads" / "mine"
    foreign.mkdir()
    for path in (unused, used, foreign / "x"):
        age(path.parent, DAY + 60)
    Incoming(runs).prepare()
    assert used.exists() and new.exists() and foreign.exists() and not unused.parent.exists()
    (run.path / "recipe.yaml").write_text("damaged")  # it may name any file
    (run.path / "recipe.yaml").unlink()
    (run.path / "recipe.yaml").mkdir()
    Incoming(runs).prepare()
    assert used.exists()
    shutil.rmtree(run.path)
    Incoming(runs).prepare()
    assert not used.exists() and new.exists()


@pytest.mark.promise(45)
def test_folders_of_ended_servers_are_swept_at_the_start(tmp_path: Path) -> None:
    living, dead = Incoming(tmp_path), tmp_path / "uploads" / "incoming-0123"
    living.prepare()
    dead.mkdir()
    for folder in (living.folder, dead):
        (folder / "half").write_text("x")
    Incoming(tmp_path).prepare()
    assert (living.folder / "half").exists() and not dead.exists()


@pytest.mark.promise(45)
def test_received_file_that_no_form_took_is_swept_when_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    incoming = Incoming(tmp_path)
    incoming.prepare()
    for name in ("old", "new"):
        (incoming.folder / name).mkdir()
    age(incoming.folder / "old", 3700)
    later = time.monotonic() + 3700
    monkeypatch.setattr(uploads.time, "monotonic", lambda: later)
    incoming.prepare()
    assert [path.name for path in incoming.folder.iterdir()] == ["new"]


@pytest.mark.promise(45)
def test_folder_of_a_server_is_removed_at_its_end_and_made_again_when_lost(tmp_path: Path) -> None:
    incoming = Incoming(tmp_path)
    incoming.prepare()
    incoming.close()
    assert not incoming.folder.exists()
    incoming.prepare()
    assert incoming.folder.is_dir()


@pytest.mark.promise(21)
def test_uploads_at_the_same_time_leave_room_on_the_disk(tmp_path: Path) -> None:
    incoming = uploads.Incoming(tmp_path / "runs")
    incoming.prepare()
    total, taken = shutil.disk_usage(tmp_path).free, 0
    with ExitStack() as stack:
        for _upload in range(20):
            share = incoming.free_bytes()
            stack.enter_context(incoming.receiving(share))
            taken += share
    assert 0.9 * total < taken < total


@pytest.mark.promise(45)
def test_uploads_that_are_refused_at_the_start_stay_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradio receives in another folder then, without a bound."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "runs" / "uploads"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "elsewhere")
    incoming = uploads.Incoming(tmp_path / "runs")
    error = server._prepare_uploads(incoming)
    assert error and "start the page again" in str(error.fix)
    link.unlink()
    with pytest.raises(UserError, match="Uploads are refused"):
        incoming.prepare()
    Path(os.environ["GRADIO_TEMP_DIR"]).rmdir()
