"""Who may send requests, and how large they may be."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import httpx
import openai
import pytest
from openai import OpenAI
from served_api import ServedApi, lora_models, serve_api

from jetson_ft.http_access import RateLimit
from jetson_ft.serve import access
from jetson_ft.serve.access import BODY_BYTES
from jetson_ft.serve.engine import Engine

KEY = "0123456789abcdef"
BODY = b'{"model": "base", "prompt": "abc", "max_tokens": 2}'


@pytest.fixture(scope="module")
def closed(make_engine: Callable[..., Engine]) -> Iterator[ServedApi]:
    """Return a server with a key, which pages of one other site may use."""
    with serve_api(make_engine(), lora_models(), KEY, origins=("http://app.example",)) as api:
        yield api


@pytest.fixture(autouse=True)
def _fresh_guesses(closed: ServedApi, monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch the limit of wrong keys off."""
    monkeypatch.setattr(RateLimit, "seconds_left", lambda *_: 0.0)


def headers(**more: str) -> dict[str, str]:
    """Return headers with the right key."""
    return {"Authorization": f"Bearer {KEY}", **{k.replace("_", "-"): v for k, v in more.items()}}


def test_the_key_is_needed_for_all_but_the_health_check(closed: ServedApi) -> None:
    assert closed.complete("base", "abc")
    for path in ("/v1/models", "/v1/models/base", "/", "/nothing"):
        assert httpx.get(closed.url + path).status_code == 401
    assert httpx.get(f"{closed.url}/healthz").status_code == 200
    response = closed.post("/v1/completions", content=BODY)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("key", ["x", KEY[:-1], KEY + "0", KEY.upper(), "é"])
def test_a_wrong_key_is_refused(closed: ServedApi, key: str) -> None:
    response = closed.post(
        "/v1/completions", content=BODY, headers={"Authorization": f"Bearer {key}".encode()}
    )
    assert response.status_code == 401
    assert KEY not in response.text


def test_the_client_raises_its_error_for_a_wrong_key(closed: ServedApi) -> None:
    client = OpenAI(base_url=f"{closed.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError) as caught:
        client.models.list()
    assert caught.value.code == "invalid_api_key"


def test_guesses_are_slowed_and_the_right_key_from_that_address_is_not(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    guess = {"Authorization": "Bearer wrong"}
    with serve_api(make_engine(), lora_models(), KEY) as served:
        address = f"{served.url}/v1/models"
        statuses = [httpx.get(address, headers=guess).status_code for _ in range(12)]
        assert statuses[0] == 401 and statuses[-1] == 429
        last = httpx.get(address, headers=guess)
        assert last.status_code == 429 and int(last.headers["retry-after"]) > 0
        assert httpx.get(address, headers=headers()).status_code == 200


def test_the_key_is_compared_in_constant_time(
    closed: ServedApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[str] = []
    monkeypatch.setattr(access, "is_equal", lambda guess, key: compared.append(guess) or True)
    assert httpx.get(f"{closed.url}/v1/models", headers=headers()).status_code == 200
    assert compared == [KEY]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "", "localhost.evil.example"])
def test_a_foreign_host_is_refused(closed: ServedApi, host: str) -> None:
    assert httpx.get(f"{closed.url}/healthz", headers={"Host": host}).status_code == 400


@pytest.mark.parametrize(
    "foreign",
    [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}],
)
def test_another_sites_page_is_refused(closed: ServedApi, foreign: dict[str, str]) -> None:
    response = closed.post("/v1/completions", content=BODY, headers=headers() | foreign)
    assert response.status_code == 403
    assert "access-control-allow-origin" not in response.headers


def test_an_allowed_sites_page_can_ask(closed: ServedApi) -> None:
    origin = {"Origin": "http://app.example", "Sec-Fetch-Site": "cross-site"}
    asked = {"Method": "POST", "Headers": "authorization,content-type,x-stainless-lang"}
    preflight = httpx.options(
        f"{closed.url}/v1/completions",
        headers=origin | {f"Access-Control-Request-{name}": asked[name] for name in asked},
    )
    assert preflight.status_code == 200
    response = closed.post("/v1/completions", content=BODY, headers=headers() | origin)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "http://app.example"


def test_a_large_body_is_refused_declared_or_in_chunks(closed: ServedApi) -> None:
    large = b" " * (BODY_BYTES + 1)
    for content in (large, iter([large[: 2**19]] * 3)):
        response = closed.post("/v1/completions", content=content, headers=headers())
        assert response.status_code == 413
    padded = BODY + b" " * (BODY_BYTES - len(BODY))
    response = closed.post("/v1/completions", content=padded, headers=headers())
    assert response.status_code == 200


def test_a_body_that_stops_to_come_is_given_up(
    closed: ServedApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "_BODY_SECONDS", 0.3)
    host, port = closed.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: 99\r\n"
        connection.sendall(f"{head}Authorization: Bearer {KEY}\r\n\r\n{{".encode())
        assert b" 408 " in connection.recv(4096)


def test_open_requests_are_bounded(closed: ServedApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "_OPEN_REQUESTS", 0)
    response = httpx.get(f"{closed.url}/v1/models", headers=headers())
    assert response.status_code == 429
    assert httpx.get(f"{closed.url}/healthz").status_code == 200  # a full server is not a dead one


def test_open_requests_are_counted_down(closed: ServedApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "_OPEN_REQUESTS", 3)
    for _ in range(8):
        assert httpx.get(f"{closed.url}/v1/models", headers=headers()).status_code == 200
