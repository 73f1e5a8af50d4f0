"""The hub: the real client with a local server."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path

import pytest
from fake_hub import (
    BIG,
    CUT,
    FETCH,
    FILES,
    FakeHub,
    closed_port,
    run_client,
    start,
    wait_for_part,
)

from jetson_ft import hub
from jetson_ft.errors import UserError


def test_files_are_listed_and_matching_ones_downloaded(fake_hub: FakeHub, tmp_path: Path) -> None:
    listed, fetched = run_client(fake_hub.address, tmp_path, ("list_files", "o/n", "model"), FETCH)
    assert listed["value"] == sorted(FILES)
    folder = Path(fetched["value"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: FILES[name] for name in ("config.json", "model.safetensors")
    }
    assert not list(tmp_path.rglob("*.part"))
    assert len(fake_hub.requests_for("model.safetensors")) == 1
    assert not fake_hub.requests_for("README.md")


PROGRESS = """
import json, sys
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 1 << 18
from jetson_ft import hub
hub._REPORT_SECONDS, calls = 0.0, []
class Enough(Exception): pass
def callback(*arguments):
    calls.append(arguments)
    if len(calls) == 2: raise Enough
for _ in range(2):
    try:
        with hub.download_progress(callback): hub.fetch("o/n", "model", ["*.safetensors"])
    except Enough: calls.append(None)
print(json.dumps(calls))
"""


def test_progress_callback_can_end_the_download(fake_hub: FakeHub, tmp_path: Path) -> None:
    with start(fake_hub.address, tmp_path, script=PROGRESS) as client:
        out, errors = client.communicate(timeout=60)
    assert client.returncode == 0, errors
    first, second, ended, *later = json.loads(out)
    assert ended is None and second[1] == 2 << 18
    assert [call[1] for call in later] == [3 << 18, 4 << 18], "the second resumes"
    for name, done, total, left in (first, second, *later):
        assert name == "model.safetensors" and 0 < done <= total == len(BIG) and left >= 0


def test_models_with_cached_weights_are_listed(fake_hub: FakeHub, tmp_path: Path) -> None:
    listed, config = ("downloaded_models",), ("fetch", "o/n", "model", ["config.json"])
    answers = run_client(fake_hub.address, tmp_path, listed, config, listed, FETCH, listed)
    assert [answer["value"] for answer in answers[::2]] == [[], [], ["o/n"]]


def test_the_token_is_sent(fake_hub: FakeHub, tmp_path: Path) -> None:
    run_client(fake_hub.address, tmp_path, FETCH, HF_TOKEN="hf_secret")
    sent = [headers.get("authorization") for _, path, headers in fake_hub.requests if "o/n" in path]
    assert sent
    assert set(sent) == {"Bearer hf_secret"}


def test_cached_files_work_without_the_hub(fake_hub: FakeHub, tmp_path: Path) -> None:
    run_client(fake_hub.address, tmp_path, FETCH)
    more = ("fetch", "o/n", "model", ["*"])
    listed, fetched, incomplete = run_client(
        closed_port(), tmp_path, ("list_files", "o/n", "model"), FETCH, more
    )
    assert listed["value"] == ["config.json", "model.safetensors"]
    assert (Path(fetched["value"]) / "model.safetensors").read_bytes() == BIG
    assert "the Hub can't be reached" in incomplete["what"]


def test_cached_folder_is_returned_without_the_hub(fake_hub: FakeHub, tmp_path: Path) -> None:
    call = ("cached_folder", "o/n", "model")
    before, fetched = run_client(fake_hub.address, tmp_path, call, FETCH)
    after, impossible = run_client(
        closed_port(), tmp_path, call, ("cached_folder", "o/n--x", "model")
    )
    assert before["value"] is None and after["value"] == fetched["value"]
    assert "Model 'o/n--x' not found" in impossible["what"]


def test_each_refusal_has_its_message(fake_hub: FakeHub, tmp_path: Path) -> None:
    gated, missing, forbidden, impossible = run_client(
        fake_hub.address,
        tmp_path,
        ("list_files", "o/gated", "model"),
        ("list_files", "o/missing", "dataset"),
        ("list_files", "o/forbidden", "model"),
        ("list_files", "o/n--x", "model"),
    )
    assert gated["what"] == "'o/gated' is gated on the Hub."
    assert "HF_TOKEN" in gated["fix"]
    assert missing["what"] == "Data set 'o/missing' not found on the Hub, or it is private."
    assert "HF_TOKEN" in missing["fix"]
    assert missing["where"] == f"{fake_hub.address}/datasets/o/missing"
    assert "answered with error 403" in forbidden["what"]
    assert "HF_TOKEN" in forbidden["fix"]
    assert "Model 'o/n--x' not found" in impossible["what"]


def test_unreachable_hub_is_reported_with_what_works_offline(tmp_path: Path) -> None:
    address = closed_port()
    answers = run_client(
        address, tmp_path, ("list_files", "o/x", "model"), ("fetch", "o/x", "model", ["*"])
    )
    for answer in answers:
        assert answer["what"] == "'o/x' can't be downloaded: the Hub can't be reached."
        assert answer["where"] == f"{address}/o/x"
        for words in (
            "HF_ENDPOINT",
            "HF_TOKEN",
            "These work offline: `model: embedded`",
            "HF_HOME",
        ):
            assert words in answer["fix"]
        assert answer["seconds"] < 10


def test_impossible_name_is_refused_without_the_hub(tmp_path: Path) -> None:
    (answer,) = run_client(closed_port(), tmp_path, ("list_files", "o/n--x", "model"))
    assert "not found" in answer["what"]


def test_offline_setting_is_reported(fake_hub: FakeHub, tmp_path: Path) -> None:
    (answer,) = run_client(
        fake_hub.address, tmp_path, ("list_files", "o/n", "model"), HF_HUB_OFFLINE="1"
    )
    assert "HF_HUB_OFFLINE is set" in answer["what"]
    assert not fake_hub.requests


@pytest.mark.slow
def test_hub_that_never_answers_takes_seconds(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hole:
        address = f"http://127.0.0.1:{hole.getsockname()[1]}"
        (answer,) = run_client(address, tmp_path, ("fetch", "o/x", "model", ["*"]))
    assert "can't be reached" in answer["what"]
    assert answer["seconds"] < 10


def test_killed_download_resumes(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.stall = True
    with start(fake_hub.address, tmp_path, FETCH) as client:
        try:
            assert fake_hub.stalled.wait(20)
            (part,) = wait_for_part(tmp_path, CUT // 2)
        finally:
            client.kill()
    kept = part.stat().st_size
    fake_hub.stall = False
    (fetched,) = run_client(fake_hub.address, tmp_path, FETCH)
    assert (Path(fetched["value"]) / "model.safetensors").read_bytes() == BIG
    assert fake_hub.requests_for("model.safetensors")[-1]["Range"] == f"bytes={kept}-"
    assert not list(tmp_path.rglob("*.part"))


def test_download_cut_off_within_a_call_resumes(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.stall = True
    fake_hub.released.set()  # the connection closes instead of standing still
    (fetched,) = run_client(fake_hub.address, tmp_path, FETCH)
    assert (Path(fetched["value"]) / "model.safetensors").read_bytes() == BIG
    first, second = fake_hub.requests_for("model.safetensors")
    assert "Range" not in first
    assert int(second["Range"].removeprefix("bytes=").rstrip("-")) >= CUT // 2


def test_damaged_download_is_deleted(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.contents["model.safetensors"] = BIG[:-1] + b"x"
    (answer,) = run_client(fake_hub.address, tmp_path, FETCH)
    assert "download was damaged" in answer["what"]
    assert not [
        path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 9999
    ]
    fake_hub.contents.clear()
    (fetched,) = run_client(fake_hub.address, tmp_path, FETCH)
    assert (Path(fetched["value"]) / "model.safetensors").read_bytes() == BIG


def test_cache_that_cant_be_written_is_reported(fake_hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (answer,) = run_client(fake_hub.address, tmp_path / "file" / "hf", FETCH)
    assert answer["what"] == "Expected a folder, found a file."
    assert str(tmp_path / "file") in answer["where"]


# In this process: the address, and whether it answers.


def test_endpoint_is_the_mirror_if_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    assert hub.endpoint() == "https://mirror.example"
    monkeypatch.setenv("HF_ENDPOINT", "")
    assert hub.endpoint() == "https://huggingface.co"


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("no_proxy", "*")


@pytest.mark.usefixtures("online")
def test_hub_that_answers_anything_is_reachable(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", fake_hub.address)
    assert hub.reachable()
    monkeypatch.setenv("HF_ENDPOINT", f"{fake_hub.address}/nothing/here")
    assert hub.reachable()
    monkeypatch.setenv("HF_HUB_OFFLINE", "true")
    assert not hub.reachable()


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:1", "nonsense", "http://[", "http://\u4e2d "]
)
def test_wrong_address_is_not_reachable(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert not hub.reachable()


@pytest.mark.usefixtures("online")
def test_name_lookup_that_hangs_ends_at_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    hung = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: hung.wait(20))
    started = time.monotonic()
    assert not hub.reachable(timeout=0.2)
    assert time.monotonic() - started < 5
    hung.set()


def test_other_exceptions_pass_unchanged() -> None:
    with pytest.raises(ZeroDivisionError), hub.hub_errors("o/n", "model"):
        _ = 1 / 0


def test_full_disk_is_not_reported_as_the_network(tmp_path: Path) -> None:
    full = OSError(28, "No space left on device", str(tmp_path / "blob"))
    with pytest.raises(UserError, match="disk is full"), hub.hub_errors("o/n", "model"):
        raise full


@pytest.mark.parametrize(
    ("error", "what", "where"),
    [
        (
            ConnectionError("Network error: HTTP status client error (403 Forbidden), domain: x"),
            "the access token may not write to 'o/n'",
            "/o/n",
        ),
        (ConnectionError("Network error: HTTP status server error (500 x)"), "error 500", "/o/n"),
        (ConnectionError("refused"), "can't be reached", "/o/n"),
        (ValueError("Invalid metadata in README.md."), "refuses the files (Invalid", "/o/n"),
        (PermissionError(13, "no", "/x/card"), "can't be written or read", "/x/card"),
    ],
)
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_errors_of_uploads_have_a_message(
    error: Exception, what: str, where: str, is_wrapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(UserError) as caught, hub._upload_errors("o/n"):
        if is_wrapped:
            raise RuntimeError("Error while uploading 'x' to the Hub.") from error
        raise error
    assert what in str(caught.value.what) and str(caught.value.where).endswith(where)
    assert str(caught.value.fix)


def test_a_fault_while_uploading_stays_one() -> None:
    with pytest.raises(RuntimeError, match="ours"), hub._upload_errors("o/n"):
        raise RuntimeError("ours")
