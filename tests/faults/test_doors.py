"""Every endpoint of the page, called by hand with paths and addresses in every argument."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from jetson_ft.chat.client import ChatClient
from jetson_ft.errors import UserError
from jetson_ft.webui import page, previews, security
from jetson_ft.webui.allowed_paths import AllowedPaths
from jetson_ft.webui.security import AccessPolicy
from jetson_ft.webui.tabs import device, train_summary

pytestmark = pytest.mark.any_packages

QUEUED = 16  # calls at once: a longer queue is refused
CANARY = "canary-5d1f0c"
HOME = "http://127.0.0.1:7860"
ELSEWHERE = "elsewhere.invalid"  # Gradio refuses private addresses by itself, but not others


class Watch:
    """What this process opens and connects to while it is on."""

    def __init__(self) -> None:
        self.on, self.opened = False, list[str]()
        sys.addaudithook(self.hook)  # which can't be removed

    def hook(self, event: str, arguments: Any) -> None:
        if self.on and event in ("open", "os.listdir", "os.scandir", "shutil.copyfile"):
            if isinstance(arguments[0], str | bytes | os.PathLike):  # else an open file's number
                self.opened.append(os.path.realpath(os.fsdecode(arguments[0])))
        elif self.on and event in ("socket.connect", "socket.getaddrinfo"):
            self.opened.append(str(arguments))


@functools.cache
def installed_watch() -> Watch:
    return Watch()


@pytest.fixture
def watch() -> Iterator[Watch]:
    watch = installed_watch()
    watch.opened.clear()
    watch.on = True
    yield watch
    watch.on = False


class Outside:
    """Files and an address outside the folder of runs, and the ways to name them."""

    def __init__(self, folder: Path, runs: Path, port: int) -> None:
        folder.mkdir()
        self.secret = folder / ".secret.jsonl"
        self.secret.write_text(json.dumps({"instruction": CANARY, "output": CANARY}) + "\n")
        os.mkfifo(folder / "fifo")
        (runs / "uploads").mkdir(parents=True)
        (runs / "uploads" / "link.jsonl").symlink_to(self.secret)
        self.address = f"http://127.0.0.1:{port}/x.jsonl"
        self.names = [
            str(self.secret), str(folder / "fifo"), str(runs / "uploads" / "link.jsonl"),
            f"{runs}/uploads/../../{folder.name}/.secret.jsonl", f"file://{self.secret}",
            "/etc/passwd", "/proc/self/environ", "/proc/self/root/etc/passwd", "/dev/zero",
            "/dev/stdin", "~root/.ssh/id_rsa", self.address, self.address.removeprefix("http:"),
            f"https://{ELSEWHERE}/x.jsonl", f"http://{ELSEWHERE}/x.yaml",
        ]  # fmt: skip
        self.port = port

    def touched(self, watch: Watch) -> list[str]:
        """Return what was opened or connected to of all that."""
        own = f"/proc/{os.getpid()}"  # the server itself reads the machine's /proc/meminfo
        places = ("/etc/passwd", f"{own}/environ", f"{own}/root", "/dev/zero", "/dev/stdin",
                  "/root/.ssh", str(self.secret.parent), f"', {self.port})", ELSEWHERE)  # fmt: skip
        return [name for name in watch.opened if any(place in name for place in places)]


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Outside]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield Outside(tmp_path / "outside", tmp_path / "runs", listener.getsockname()[1])


@pytest.fixture
def visitor(
    tmp_path: Path, outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TestClient]:
    """A browser with the token of a page on a network; what starts a process is refused."""

    def refuse(*arguments: Any, **_named: Any) -> Any:
        for argument in map(str, arguments):
            assert CANARY not in argument
        raise UserError("No process here.")

    monkeypatch.setattr(previews, "run_json", refuse)
    monkeypatch.setattr(device, "run_cli_json", refuse)
    monkeypatch.setattr(ChatClient, "generate", refuse)
    monkeypatch.setattr(train_summary.manager, "launch", refuse)
    monkeypatch.setattr(security, "_REQUESTS", (10**6, 1.0))  # more than a browser makes
    runs = tmp_path / "runs"
    app = page.make_app(runs, AccessPolicy("secret", allowed=AllowedPaths((runs,))))
    headers = {"Authorization": "Bearer secret"}
    with TestClient(app, HOME, headers=headers, follow_redirects=False) as client:
        yield client


def shapes(name: str) -> list[Any]:
    """Return the forms in which a request can carry a file."""
    file = {"path": name, "meta": {"_type": "gradio.FileData"}}
    return [
        name, [name], file, [file], {"path": name}, {"url": name, **file},
        [{"role": "user", "content": [{"type": "file", "file": file}]}],
        [{"role": "user", "content": name, "metadata": {"title": name}}],
        [{"role": "assistant", "content": {"component": "image", "value": name, "props": {}}}],
        {"value": file, "__type__": "update"},
    ]  # fmt: skip


def call_all(client: TestClient, language: str, session: str, calls: list[tuple[int, Any]]) -> str:
    """Make all calls of a language's endpoints at once; return what comes back."""
    for number, data in calls:
        body = {"data": data, "fn_index": number, "session_hash": session}
        answer = client.post(f"/{language}/gradio_api/queue/join", json=body)
        assert answer.status_code in (200, 422, 500), answer.text
    stream = f"/{language}/gradio_api/queue/data?session_hash={session}"
    return client.get(stream).text


@pytest.mark.promise(38)
@pytest.mark.promise(20)
@pytest.mark.parametrize("language", ["en", "zh_CN"])
def test_no_argument_of_an_endpoint_opens_a_file_or_an_address(
    visitor: TestClient, outside: Outside, watch: Watch, language: str
) -> None:
    config = visitor.get(f"/{language}/config").json()
    values = {part["id"]: part["props"].get("value") for part in config["components"]}
    endpoints = [each for each in config["dependencies"] if each["backend_fn"]]
    assert len(endpoints) > 20
    answers, number = "", 0
    for name in outside.names if language == "en" else outside.names[::-4]:  # the same functions
        # All shapes with some of the names, the most dangerous ones with all.
        is_typical = language == "en" and name in outside.names[:3]
        for shape in shapes(name) if is_typical else shapes(name)[2:3] + shapes(name)[6:7]:
            number += 1
            calls = []
            for endpoint in endpoints:
                inputs = endpoint["inputs"]
                if len(inputs) > 20 and number % 8:  # the whole form, which takes long
                    continue
                # Alternate between all arguments and one, as the first that is wrong hides others.
                chosen = range(len(inputs)) if number % 16 < 8 else [number % max(1, len(inputs))]
                data = [shape if place in chosen else values[part]
                        for place, part in enumerate(inputs)]  # fmt: skip
                calls.append((endpoint["id"], data))
            for at in range(0, len(calls), QUEUED):
                session = f"session-{number}-{at}"
                answers += call_all(visitor, language, session, calls[at : at + QUEUED])
    assert answers.count("process_completed") > 10 * number
    assert CANARY not in answers and "root:" not in answers
    assert outside.touched(watch) == []
    assert visitor.get("/healthz").text == "ok"


@pytest.mark.promise(38)
@pytest.mark.parametrize("field", ["model", "data.train", "data.heldout", "data.chat_template"])
def test_path_in_a_recipe_of_the_form_is_refused(
    visitor: TestClient, outside: Outside, watch: Watch, field: str
) -> None:
    config = visitor.get("/en/config").json()
    props = {part["id"]: part["props"] for part in config["components"]}
    (plan,) = [each for each in config["dependencies"] if each["api_name"] == "plan"]
    element = f"field-{field.replace('.', '-')}"
    for number, name in enumerate(outside.names):
        data = [name if props[part].get("elem_id") == element else props[part].get("value")
                for part in plan["inputs"]]  # fmt: skip
        answer = call_all(visitor, "en", f"form-{number}", [(plan["id"], data)])
        is_address = name.startswith(("http", "file:"))  # a name of nothing
        assert is_address or "--allow-path" in answer, answer
    assert outside.touched(watch) == []


@pytest.mark.promise(39)
def test_chat_opens_no_model_outside(
    visitor: TestClient, outside: Outside, watch: Watch, tmp_path: Path
) -> None:
    """Neither by its path, nor as the base that an uploaded adapter names."""
    base = outside.secret.parent / "model"
    base.mkdir()
    (base / "config.json").write_text("{}")
    watch.opened.clear()
    adapter = tmp_path / "runs" / "uploads" / "0123abcd" / "adapter_config.json"
    adapter.parent.mkdir()
    config = visitor.get("/en/config").json()
    parts = {part["id"]: part for part in config["components"]}
    endpoints = {each["api_name"]: each for each in config["dependencies"]}
    models = [part for part in endpoints["send"]["inputs"] if parts[part]["type"] == "dropdown"]
    assert len(models) == 2
    text = next(part for part in endpoints["send"]["inputs"] if parts[part]["type"] == "textbox")
    for path in (str(base), str(outside.secret), "/dev/zero"):
        adapter.write_text(json.dumps({"base_model_name_or_path": path}))
        for model, name in itertools.product(models, (path, str(adapter.parent))):
            values = {model: name, text: "hi"}
            for api_name in ("send", "open", "choose"):
                inputs = endpoints[api_name]["inputs"]
                data = [values.get(part, parts[part]["props"].get("value")) for part in inputs]
                session = f"chat-{api_name}-{model}-{name}-{path}".replace("/", "-")
                answer = call_all(visitor, "en", session, [(endpoints[api_name]["id"], data)])
                assert api_name != "send" or "--allow-path" in answer, answer
    assert outside.touched(watch) == []


@pytest.mark.promise(38)
@pytest.mark.promise(20)
def test_no_route_serves_a_file_or_an_address(
    visitor: TestClient, outside: Outside, watch: Watch
) -> None:
    """Each route of each application, with each path in each of its parameters."""
    addresses = set(routes(visitor.app.app.app))  # type: ignore[attr-defined]
    assert len(addresses) > 100
    streams = "heartbeat", "queue/data", "startup-events", "dev/reload"  # the calls above read one
    statuses = []
    for method, pattern in sorted(addresses):
        if any(word in pattern for word in streams):
            continue
        for name in outside.names if "{" in pattern else outside.names[:1]:
            path, query = fill(pattern, name), {"path": name, "url": name}
            body = query if method == "POST" else None
            with contextlib.suppress(UnicodeError):
                answer = visitor.request(method, path, params=query, json=body)
                assert CANARY not in answer.text and "root:" not in answer.text, path
                assert answer.headers.get("location", "/").startswith(("/", HOME)), path
                statuses.append(answer.status_code)
    assert len(statuses) > 500
    assert outside.touched(watch) == []


def routes(app: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield method and path of every route, also those of mounted applications."""
    for route in app.routes:
        path = prefix + (getattr(route, "path", "") or "")
        if router := getattr(route, "original_router", None):  # of newer versions of FastAPI
            yield from routes(router, path + route.include_context.prefix)
        elif hasattr(route, "routes"):
            yield from routes(route, path)
        for method in getattr(route, "methods", None) or ():
            yield method, path


def fill(pattern: str, name: str) -> str:
    """Put the name in place of each parameter."""
    return re.sub(r"\{[^}]*\}", lambda _match: name, pattern)


@pytest.mark.promise(38)
def test_endless_file_does_not_hang_the_page(visitor: TestClient) -> None:
    """Of an upload that names one: each request is answered, in a bounded time."""
    answered = threading.Event()

    def ask() -> None:
        for language in ("en", "zh_CN"):
            visitor.post(f"/{language}/gradio_api/upload", files={"files": ("/dev/zero", b"x")})
            visitor.get(f"/{language}/gradio_api/file=/dev/zero")
        answered.set()

    threading.Thread(target=ask, daemon=True).start()
    assert answered.wait(10)


@pytest.mark.promise(39)
def test_visitors_of_a_network_name_only_what_is_allowed(tmp_path: Path) -> None:
    for name in ("runs", "shared", "other", "shared-not"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text("{}")
    (tmp_path / "shared" / "out").symlink_to(tmp_path / "other")
    (tmp_path / "in").symlink_to(tmp_path / "shared")
    allowed = AllowedPaths((tmp_path / "runs", tmp_path / "shared"))
    for name in ("runs/rows.jsonl", "shared/rows.jsonl", "shared", "in/rows.jsonl"):
        assert allowed.require(f"{tmp_path}/{name}")
    for name in ("other/rows.jsonl", "shared-not/rows.jsonl", "shared/out/rows.jsonl", "",
                 "shared/../other/rows.jsonl", "other/none.jsonl"):  # fmt: skip
        with pytest.raises(UserError, match="may not name files"):
            allowed.require(f"{tmp_path}/{name}")
    for name in ("/etc/passwd", "../x", "~", "~nobody-here/x", "a\0b", "/", "/tmp/../etc"):
        with pytest.raises(UserError, match="may not name files"):
            allowed.require(name)
    for name in ("embedded", "bundled", "auto", "chatml", "microsoft/phi-1_5", "owner/set/a.csv"):
        assert allowed.require(name) == name
    assert AllowedPaths().require("/etc/passwd") == "/etc/passwd"
