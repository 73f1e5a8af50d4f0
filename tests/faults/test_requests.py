"""Requests to the page's server: foreign ones, floods, large bodies, guesses, redirects."""

from __future__ import annotations

import http.client
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_folders import make_run
from served import Served
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from jetson_ft import http_access
from jetson_ft.http_access import RateLimit, client_address, is_cross_origin
from jetson_ft.webui import security
from jetson_ft.webui.security import AccessMiddleware, AccessPolicy, stays_on_host
from jetson_ft.webui.theme import STATIC

pytestmark = pytest.mark.any_packages

MIB = 2**20


class TokenPage:
    """A server that needs a token, and clients of it at addresses of their own (127.0.0.0/8)."""

    def __init__(self, folder: Path) -> None:
        make_run(folder / "runs", "20260101-000000-a")
        self.served = Served(folder, "--host", "0.0.0.0")
        self.token = self.served.link.partition("token=")[2]
        self.base = f"http://127.0.0.1:{self.served.port}"
        self._addresses = iter(range(2, 250))

    @contextmanager
    def client(self, logged_in: bool = True) -> Iterator[httpx.Client]:
        """Open a client at an address of its own."""
        transport = httpx.HTTPTransport(local_address=f"127.0.0.{next(self._addresses)}")
        with httpx.Client(base_url=self.base, transport=transport, timeout=20) as client:
            if logged_in:
                assert client.get("/", params={"token": self.token}).status_code == 303
            yield client


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TokenPage]:
    page = TokenPage(tmp_path_factory.mktemp("page"))
    yield page
    page.served.kill()


# Foreign requests


@pytest.mark.promise(17)
@pytest.mark.parametrize("path", ["/", "/en/", "/healthz", "/en/config", f"{STATIC}/shell.js"])
def test_foreign_host_gets_400(page: TokenPage, path: str) -> None:
    with page.client() as client:
        for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example"):
            assert client.get(path, headers={"Host": host}).status_code == 400
        assert client.get(path).status_code < 400


@pytest.mark.promise(18)
@pytest.mark.parametrize(
    "path", ["/runs/20260101-000000-a/delete", "/en/gradio_api/queue/join", "/en/gradio_api/upload"]
)
def test_request_from_another_sites_page_gets_403(page: TokenPage, path: str) -> None:
    foreign: list[dict[str, str]] = [
        {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"},
        {"Origin": f"http://127.0.0.1:{page.served.port + 1}"},
    ]  # fmt: skip
    with page.client() as client:
        for headers in foreign:
            assert client.post(path, headers=headers).status_code == 403
        assert "20260101-000000-a" in client.get("/live/en/runs").text


@pytest.mark.promise(18)
@given(st.text(max_size=30))
def test_origin_of_any_text_is_judged_without_an_exception(origin: str) -> None:
    headers = Headers(raw=[(b"host", b"a:1"), (b"origin", origin.encode("utf-8", "replace"))])
    assert is_cross_origin(headers) is (origin != "")


@pytest.mark.promise(19)
def test_page_on_a_network_needs_the_token_of_the_link(page: TokenPage) -> None:
    assert len(page.token) == 32
    with page.client(logged_in=False) as client:
        for path in ("/", "/en/", "/en/config", "/live/en/runs"):
            assert client.get(path).status_code == 401
            bearer = {"Authorization": f"Bearer {page.token}"}
            assert client.get(path, headers=bearer).status_code < 400
        assert client.get("/", headers={"Cookie": f"jetson-ft-{page.served.port}={page.token}"}
                          ).status_code == 401  # fmt: skip
        link = client.get("/en/", params={"token": page.token, "run": "a"})
        assert (link.status_code, link.headers["location"]) == (303, "/en/?run=a")
        assert link.headers["cache-control"] == "no-store"
        assert link.headers["referrer-policy"] == "no-referrer"
        assert page.token not in str(link.headers)
        assert client.get("/en/").status_code == 200


POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)


@pytest.mark.promise(18)
def test_no_other_site_can_frame_the_page(page: TokenPage) -> None:
    with page.client() as client:
        for path in ("/en/", "/live/en/runs", f"{STATIC}/shell.js", "/nothing"):
            headers = client.get(path).headers
            assert headers["content-security-policy"] == POLICY
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["referrer-policy"] == "same-origin"


# Bodies


def chunks(count: int) -> Iterator[bytes]:
    for _number in range(count):
        yield b" " * 65536


@pytest.mark.promise(41)
@pytest.mark.promise(36)
@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/en/gradio_api/queue/join", "application/json"),
        ("/en/gradio_api/run/start", "text/plain"),
        ("/runs/20260101-000000-a/about", "application/json"),
        ("/en/gradio_api/process_recording", "multipart/form-data; boundary=x"),
        ("/nothing", ""),
    ],
)
def test_body_over_a_megabyte_gets_413_before_it_is_parsed(
    page: TokenPage, path: str, kind: str, is_chunked: bool
) -> None:
    with page.client() as client:
        large: Any = chunks(160) if is_chunked else b" " * (10 * MIB)
        process = psutil.Process(page.served.process.pid)
        before = process.memory_info().rss
        response = client.post(path, content=large, headers={"Content-Type": kind})
        if path.endswith("recording"):
            assert response.status_code in (404, 413)
        else:
            assert response.status_code == 413 and "larger than 1 MiB" in response.text
        assert process.memory_info().rss - before < 8 * MIB
        assert client.get("/healthz").status_code == 200


@pytest.mark.promise(41)
def test_body_of_a_declared_terabyte_is_not_waited_for(page: TokenPage) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", page.served.port, timeout=10)
    connection.putrequest("POST", "/runs/20260101-000000-a/about")
    for name, value in (("Authorization", f"Bearer {page.token}"), ("Content-Length", 2**40)):
        connection.putheader(name, str(value))
    connection.endheaders(b"{")
    response = connection.getresponse()
    assert response.status == 413 and b"larger than 1 MiB" in response.read()
    connection.close()


@pytest.mark.promise(41)
@pytest.mark.parametrize("is_chunked", [False, True])
def test_body_below_a_megabyte_reaches_its_action_whole(page: TokenPage, is_chunked: bool) -> None:
    notes = "n" * 19_999
    body = b'{"notes": "' + notes.encode() + b'"}' + b" " * 500_000
    with page.client() as client:
        response = client.post(
            "/runs/20260101-000000-a/about", headers={"Content-Type": "application/json"},
            content=iter([body[:9], body[9:]]) if is_chunked else body,
        )  # fmt: skip
        assert response.json() == {"done": True}
        assert notes in client.get("/live/en/runs/20260101-000000-a/head").text


# Floods


@pytest.mark.promise(36)
def test_flood_of_one_address_gets_429_and_others_are_answered(page: TokenPage) -> None:
    with page.client() as flooding, page.client() as other:
        statuses = Counter(flooding.get("/healthz").status_code for _ in range(800))
        assert statuses[200] >= 400 and statuses[429] > 50
        # A single request can come so late that it is answered.
        answers = (flooding.get("/live/en/runs") for _ in range(100))
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert "Too many requests" in refused.text
        assert other.get("/live/en/runs").status_code == 200
        time.sleep(1.0)
        assert flooding.get("/live/en/runs").status_code == 200


@pytest.mark.promise(36)
def test_flood_of_large_bodies_gets_429(page: TokenPage) -> None:
    body = b'{"notes": "n"}' + b" " * 900_000
    address, kind = "/runs/20260101-000000-a/about", {"Content-Type": "application/json"}
    with page.client() as client:
        statuses = Counter(
            client.post(address, content=body, headers=kind).status_code for _ in range(60)
        )
    assert statuses[200] >= 20 and statuses[429] >= 5


@pytest.mark.promise(36)
def test_rate_of_ten_open_pages_is_no_flood() -> None:
    limit = RateLimit(*security._REQUESTS)
    assert all(limit.take("a") for _asset in range(300))
    assert limit._per_second >= 10 * 2 / 2.5


@pytest.mark.promise(36)
def test_table_of_addresses_is_bounded() -> None:
    limit = RateLimit(2, 1.0, max_addresses=10)
    for number in range(1000):
        assert limit.take(str(number))
    assert len(limit._buckets) == 10
    assert limit.take("999") and not limit.take("999") and limit.seconds_left("999") > 0


@pytest.mark.promise(36)
def test_one_network_of_ipv6_is_one_client() -> None:
    first, second = (client_address((f"2001:db8::{number}", 1)) for number in (1, 2))
    assert first == second != client_address(("2001:db8:1::1", 1))
    assert client_address(("::ffff:10.0.0.1", 1)) == client_address(("10.0.0.1", 2)) == "10.0.0.1"
    assert client_address(None) == "" and client_address(("testclient", 1)) == "testclient"


@pytest.mark.promise(36)
def test_open_requests_of_one_address_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "_OPEN_REQUESTS", 2)
    release, arrived = threading.Event(), threading.Semaphore(0)

    def wait(_request: Request) -> PlainTextResponse:
        arrived.release()
        release.wait(10)
        return PlainTextResponse("done")

    client = TestClient(
        AccessMiddleware(Starlette(routes=[Route("/", wait)]), AccessPolicy()),
        base_url="http://127.0.0.1",
    )
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(client.get, "/") for _ in range(2)]
        for _request in waiting:
            assert arrived.acquire(timeout=10)
        assert client.get("/").status_code == 429
        release.set()
        assert [request.result().status_code for request in waiting] == [200, 200]
    assert client.get("/").status_code == 200


# The token


@pytest.mark.promise(43)
@pytest.mark.parametrize("door", ["query", "bearer"])
def test_guesses_are_slowed_and_do_not_lock_others_out(page: TokenPage, door: str) -> None:
    def guess(client: httpx.Client, token: str) -> int:
        if door == "query":
            return client.get("/en/", params={"token": token}).status_code
        return client.get("/en/", headers={"Authorization": f"Bearer {token}"}).status_code

    with page.client(logged_in=False) as guessing, page.client() as other:
        statuses = [guess(guessing, f"{number:032x}") for number in range(40)]
        assert statuses.count(401) <= 12 and statuses[-1] == 429
        assert guess(guessing, page.token) == 429  # it is not compared, so nothing is learned
        assert other.get("/en/").status_code == 200
        assert guess(other, "wrong") in (200, 303)  # logged in already
        # Behind one address, those who are logged in are not locked out.
        guessing.cookies.update(other.cookies)
        assert guessing.get("/live/en/runs").status_code == 200


@pytest.mark.promise(43)
def test_cookie_of_an_earlier_server_is_no_guess(page: TokenPage) -> None:
    with page.client(logged_in=False) as client:
        stale = {"Cookie": f"jetson-ft-{page.served.port}={'0' * 43}"}
        for _poll in range(40):
            assert client.get("/live/en/runs", headers=stale).status_code == 401
        assert client.get("/", params={"token": page.token}).status_code == 303


@pytest.mark.promise(43)
@pytest.mark.parametrize("token", ["%e4%bb%a4", "%00", "%ff", "%ed%a0%80", "a&token=b"])
def test_tokens_of_any_bytes_are_compared(page: TokenPage, token: str) -> None:
    with page.client(logged_in=False) as client:
        assert client.get(f"/?token={token}").status_code == 401
        bearer = {"Authorization": b"Bearer \xff\xe4"}
        assert client.get("/", headers=bearer).status_code == 401


@pytest.mark.promise(43)
def test_secrets_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(first: bytes, second: bytes) -> bool:
        compared.append(second)
        return first == second

    monkeypatch.setattr(http_access.hmac, "compare_digest", compare)
    middleware = AccessMiddleware(Starlette(), AccessPolicy("secret"))
    client = TestClient(middleware, base_url="http://127.0.0.1")
    assert client.get("/?token=wrong").status_code == 401
    assert compared == [middleware._cookie.encode(), b"secret"]


# Redirects

HOSTILE = [
    "//evil.example", "///evil.example", "/\\evil.example", "\\\\evil.example", "/%2f/evil.example",
    "/%5cevil.example", "/%09/evil.example", "/%0d%0aLocation:%20http://evil.example",
    "http://evil.example/", "//evil.example/%2e%2e", "/;@evil.example", "/.//evil.example",
]  # fmt: skip
ADDRESSES = st.lists(
    st.sampled_from(["/", "//", "\\", "%2f", "%5c", "%09", "%0a", "evil.example", "@", ":", "http",
                     "https:", "..", ".", "?", "&", "#", "token=x", "en", "a", "中"]),
    max_size=8,
).map("".join)  # fmt: skip


def assert_stays(location: str, base: str) -> None:
    """A browser drops tabs and line breaks, and reads a backslash as a slash."""
    seen = location.replace("\\", "/").replace("\t", "").replace("\n", "").replace("\r", "")
    joined = urlsplit(str(httpx.URL(base).join(seen)))
    assert joined.netloc == urlsplit(base).netloc and joined.scheme == "http", location
    assert not seen.startswith("//"), location


def raw_get(client: httpx.Client, base: str, target: str) -> httpx.Response:
    """Send the target as it is: httpx would change it."""
    url = httpx.URL(base + "/")
    request = client.build_request("GET", url, extensions={"target": target.encode()})
    return client.send(request)


@pytest.mark.promise(44)
@pytest.mark.parametrize("path", HOSTILE)
def test_no_redirect_of_the_server_leaves_it(page: TokenPage, path: str) -> None:
    with page.client() as client:
        for query in (f"?token={page.token}", "", "?next=//evil.example&view=//evil.example"):
            response = raw_get(client, page.base, path + query)
            location = response.headers.get("location", "/")
            assert_stays(location, page.base)
            assert page.token not in location


@pytest.mark.promise(44)
@settings(deadline=None, max_examples=200)
@given(ADDRESSES)
def test_redirect_with_the_token_stays_on_the_host(path: str) -> None:
    base = "http://127.0.0.1:7860"
    assert_stays(security.local_path(path), base)


@pytest.mark.promise(44)
@settings(deadline=None, max_examples=200)
@given(ADDRESSES)
def test_redirect_that_is_let_through_stays_on_the_host(location: str) -> None:
    if stays_on_host(location, "127.0.0.1:7860"):
        assert_stays(location, "http://127.0.0.1:7860")


@pytest.mark.promise(44)
@pytest.mark.parametrize(
    ("location", "passes"),
    [("/en/?a=b", True), ("http://127.0.0.1/x", True), ("//evil.example", False),
     ("https://evil.example/", False), ("javascript:alert(1)", False), ("/\\evil", False)],
)  # fmt: skip
def test_redirect_of_a_library_to_another_site_is_dropped(location: str, passes: bool) -> None:
    def redirect(_request: Request) -> RedirectResponse:
        response = RedirectResponse("/")
        response.headers["location"] = location
        return response

    app = Starlette(routes=[Route("/", redirect)])
    client = TestClient(
        AccessMiddleware(app, AccessPolicy()), base_url="http://127.0.0.1", follow_redirects=False
    )
    response = client.get("/")
    assert (response.status_code, "location" in response.headers) == (
        (307, True) if passes else (404, False)
    )
