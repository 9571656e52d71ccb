"""Bytes that are no request, or one without end: what a client is told before the application hears of it."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.apps.serve.small import Process, base64_of
from tests.tasks.small import plain


@pytest.fixture(scope="module")
def process(model: str) -> Iterator[Process]:
    started = Process(model)
    yield started.wait_until_ready()
    started.end()


def answer_to(process: Process, *parts: bytes) -> tuple[bytes, bytes]:
    """Head and body of what comes until the service closes the connection."""
    found = b""
    with (
        socket.create_connection(("127.0.0.1", process.port), timeout=20) as client,
        contextlib.suppress(ConnectionError),  # closed while bytes were under way: what came before is the answer
    ):
        for part in parts:
            client.sendall(part)
        while part := client.recv(65536):
            found += part
    head, _, body = found.partition(b"\r\n\r\n")
    return head, body


def error_in(head: bytes, body: bytes) -> str:
    error = json.loads(body)["error"]
    assert error["message"] and f"x-request-id: {error['request_id']}".encode() in head
    return error["code"]


@pytest.mark.parametrize(
    "content",
    [
        b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_not_http_gets_the_one_form_of_errors(process: Process, content: bytes) -> None:
    head, body = answer_to(process, content)
    assert head.startswith(b"HTTP/1.1 400 ") and error_in(head, body) == "bad_request"


def test_a_head_without_end_is_cut(process: Process) -> None:
    with socket.create_connection(("127.0.0.1", process.port), timeout=20) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nX: ")
        sent, found = 0, b""
        client.settimeout(0.01)
        while not found and sent < 5_000_000:
            try:
                sent += client.send(b"a" * 10_000)
                found = client.recv(65536)
            except TimeoutError:
                continue
    head, _, body = found.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ") and error_in(head, body) == "head_too_large"
    assert sent < 2_000_000


def test_long_lives_and_long_bodies_are_no_long_heads(process: Process) -> None:
    one = b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 20_000 + b"\r\n\r\n"
    with httpx.Client(base_url=process.url) as client:
        for _ in range(8):  # more than the bound in all
            assert client.get("/healthz", headers={"X-Long": "a" * 20_000}).status_code == 200
            answer = client.post("/v1/classify", content=b" " * 300_000, headers={"content-type": "application/json"})
            assert answer.json()["error"]["code"] == "invalid_request"
    pipelined = one * 8 + one.replace(b"X:", b"Connection: close\r\nX:")
    head, body = answer_to(process, pipelined)
    assert head.startswith(b"HTTP/1.1 200 ") and body.count(b'{"status":"ok"}') == 9


def test_who_sends_too_much_before_reading_still_learns_why(process: Process) -> None:
    whole = 24 * 2**20
    post = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    chunk = b"%x\r\n" % whole + b" " * whole + b"\r\n0\r\n\r\n"
    for parts in (
        (post + b"Content-Length: %d\r\n\r\n" % whole, b" " * whole),
        (post + b"Transfer-Encoding: chunked\r\n\r\n", chunk),
    ):
        start = time.monotonic()
        with socket.create_connection(("127.0.0.1", process.port), timeout=20) as client:
            for part in parts:
                client.sendall(part)  # raises where the service has cut the connection
            found = b""
            while part := client.recv(65536):
                found += part
        head, _, body = found.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 413 ") and error_in(head, body) == "body_too_large"
        assert time.monotonic() - start < 10


def test_head_is_get_without_the_body(process: Process) -> None:
    for path in ("/", "/docs", "/healthz", "/readyz", "/metrics", "/v1/models"):
        answer = httpx.head(process.url + path)
        assert answer.status_code == 200 and answer.content == b"" and int(answer.headers["content-length"]) > 0
    assert httpx.head(process.url + "/v1/classify").status_code == 405
    assert any(line["method"] == "HEAD" and line["path"] == "/healthz" for line in process.logged())


def test_wrong_addresses_and_methods_are_named(process: Process) -> None:
    for method, path, status, word in (
        ("GET", "/v1/clasify", 404, "/v1/clasify"),
        ("POST", "/v1/classify/", 404, "/docs lists the calls"),
        ("GET", "/v1/classify", 405, "only POST"),
        ("DELETE", "/", 405, "only GET"),
    ):
        answer = httpx.request(method, process.url + path)
        assert answer.status_code == status and word in answer.json()["error"]["message"]


def test_an_offer_of_http2_is_not_taken_and_costs_no_body(process: Process) -> None:
    offer = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAAQAAP__"}
    content = {"images": base64_of(plain("red")), "labels": ["red", "blue"]}
    with httpx.Client(base_url=process.url, headers=offer) as client:
        for _ in range(2):
            assert client.post("/v1/classify", json=content).status_code == 200
        assert client.get("/healthz").status_code == 200
    assert "upgrade" not in process.log().lower()
