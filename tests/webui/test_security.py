"""Access control: requests that each check refuses, and requests that must pass."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from jetson_ft.http_access import is_cross_origin, is_known_host
from jetson_ft.webui.security import AccessMiddleware, AccessPolicy

HOME = "http://127.0.0.1:7860"


async def root(request: Request) -> PlainTextResponse:
    return PlainTextResponse(f"inside {len(await request.body())} {request.url.query}")


async def chat(socket: WebSocket) -> None:
    await socket.accept()
    await socket.send_text("inside")
    await socket.close()


def client(token: str = "", names: tuple[str, ...] = ()) -> TestClient:
    app = Starlette(routes=[
        Route("/", root, methods=["GET", "POST"]), WebSocketRoute("/talk", chat),
    ])  # fmt: skip
    middleware = AccessMiddleware(app, AccessPolicy(token, names))
    return TestClient(middleware, base_url=HOME, follow_redirects=False)


# Host


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1:7860", "localhost", "LOCALHOST:1", "192.168.1.7:7860", "[::1]:7860", "[fe80::1]"],
)
def test_addresses_and_localhost_pass(host: str) -> None:
    assert client().get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "", "localhost.evil:1"]
)
def test_a_foreign_host_gets_400(host: str) -> None:
    answer = client().get("/", headers={"Host": host})
    assert answer.status_code == 400 and "--host-name" in answer.text


def test_an_accepted_host_name_passes() -> None:
    assert client(names=("Orin.local",)).get("/", headers={"Host": "orin.local:7860"}).is_success


@pytest.mark.parametrize("host", ["", ":80", " "])
def test_a_request_without_host_is_foreign_also_with_an_empty_name(host: str) -> None:
    assert not is_known_host(host, ("", "orin.local"))


@given(st.text(alphabet="ab.:[]019-", max_size=20))
def test_any_host_is_known_or_not_without_an_exception(host: str) -> None:
    assert is_known_host(host, ()) in (True, False)


def test_a_refusal_is_in_the_browsers_language() -> None:
    answer = client().get("/", headers={"Host": "evil.example", "Accept-Language": "zh-CN"})
    assert answer.status_code == 400 and answer.text.startswith("本页面不响应这个主机名")


# Other sites


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:8000"},
        {"Sec-Fetch-Site": "cross-site"}, {"Origin": HOME, "Sec-Fetch-Site": "same-site"},
    ],
)  # fmt: skip
def test_posts_from_other_sites_get_403(headers: dict[str, str]) -> None:
    assert client().post("/", headers=headers).status_code == 403


@pytest.mark.parametrize("headers", [{}, {"Origin": HOME}, {"Sec-Fetch-Site": "same-origin"}])
def test_posts_of_the_page_itself_and_of_programs_pass(headers: dict[str, str]) -> None:
    assert client().post("/", content=b"1234", headers=headers).text.startswith("inside 4")


def test_links_from_other_sites_pass() -> None:
    assert client().get("/", headers={"Sec-Fetch-Site": "cross-site"}).is_success


def test_websockets_of_other_sites_are_closed() -> None:
    with client().websocket_connect("/talk", headers={"Host": "127.0.0.1"}) as socket:
        assert socket.receive_text() == "inside"
    foreign = {"Host": "127.0.0.1", "Origin": "http://evil.example"}
    with pytest.raises(WebSocketDisconnect), client().websocket_connect("/talk", headers=foreign):
        pass


def test_the_origin_is_compared_with_its_port() -> None:
    headers = {"host": "[::1]:7860", "origin": "http://[::1]:7860"}
    assert not is_cross_origin(Headers(headers))


# The token


def test_a_request_without_the_token_gets_401() -> None:
    browser = client(token="secret")
    for path in ("/", "/?token=", "/?token=wrong", "/anything"):
        answer = browser.get(path)
        assert answer.status_code == 401 and "token" in answer.text and "令牌" in answer.text
    assert browser.get("/", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert browser.post("/", content=b"x").status_code == 401
    with pytest.raises(WebSocketDisconnect), browser.websocket_connect("/talk"):
        pass


def test_the_link_with_the_token_sets_a_cookie() -> None:
    browser = client(token="secret")
    answer = browser.get("/?token=secret&run=a%20b")
    assert (answer.status_code, answer.headers["location"]) == (303, "/?run=a+b")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=lax" in cookie and "jetson-ft-7860" in cookie
    assert browser.get("/").is_success and browser.post("/").is_success


def test_a_bearer_token_passes() -> None:
    assert client(token="secret").get("/", headers={"Authorization": "Bearer secret"}).is_success


def test_a_health_check_needs_no_token_but_a_known_host() -> None:
    assert client(token="secret").get("/healthz").text == "ok"
    assert client().get("/healthz", headers={"Host": "evil.example"}).status_code == 400
