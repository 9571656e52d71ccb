"""`vlm serve` as a process: slow, leaving and many clients, signals in mid-load, no network, wrong options."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.apps.conftest import Run
from tests.apps.serve.small import Process, base64_of
from tests.tasks.small import noise, plain

PICTURE = base64_of(plain("red", 32))
# A process that reads this first can't look up a name or reach another machine, and says what it tried.
NO_NETWORK = """
import socket, sys
own = socket.socket.connect
def connect(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1"):
        print("reached out to", address, file=sys.stderr)
        raise OSError("no network")
    return own(self, address)
def lookup(host, *more, found=socket.getaddrinfo, **named):
    if host not in ("127.0.0.1", "::1", "localhost", None):
        print("looked up", host, file=sys.stderr)
        raise OSError("no network")
    return found(host, *more, **named)
socket.socket.connect, socket.getaddrinfo = connect, lookup
"""


def body(labels: list[str], picture: str = PICTURE) -> dict[str, Any]:
    return {"images": picture, "labels": labels, "top_k": len(labels)}


def slow(number: int) -> dict[str, Any]:
    """A request that keeps the text tower busy for a while: labels that no other request has."""
    return body([f"thing {number} {place}" for place in range(80)])


def raw(content: dict[str, Any]) -> bytes:
    data = json.dumps(content).encode()
    head = f"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    return head.encode() + b"\r\n\r\n" + data


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("it never came about")
        time.sleep(0.02)


@pytest.fixture(scope="module")
def shared(model: str) -> Iterator[Process]:
    """A small model behind impatient timeouts."""
    process = Process(model, "--head-timeout", "2.5", "--body-timeout", "2.5")
    yield process.wait_until_ready()
    process.end()


@pytest.fixture
def shipped() -> Iterator[Callable[..., Process]]:
    """Starts processes with the shipped model."""
    started: list[Process] = []

    def start(*options: str, **more: Any) -> Process:
        started.append(Process("tiny-clip", *options, **more))
        return started[-1].wait_until_ready()

    yield start
    for process in started:
        process.end()


def test_the_shipped_model_is_ready_in_seconds_without_network(shipped, tmp_path) -> None:
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
    start = time.monotonic()
    process = shipped(env={"PYTHONPATH": str(tmp_path)})
    took = time.monotonic() - start
    answer = httpx.post(process.url + "/v1/classify", json=body(["frog", "camel"]), timeout=30)
    assert answer.status_code == 200 and answer.json()["model"] == "tiny-clip"
    assert took < 30, took  # 6 s on two idle cores
    assert "reached out" not in process.log() and "looked up" not in process.log()


def drip(port: int, content: bytes, head: bytes = b"") -> bytes:
    """What the service answers to a client that sends `head` at once and the rest a byte a second."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(head)
        answer = b""
        client.settimeout(1.0)
        for place in range(len(content)):
            try:
                client.sendall(content[place : place + 1])
                part = client.recv(65536)
                if not part:
                    return answer
                answer += part
            except TimeoutError:
                continue
            except OSError:  # cut
                return answer
        raise AssertionError("the client was never cut")


def test_clients_that_send_a_byte_a_second_are_cut_and_hurt_nobody(shared: Process) -> None:
    head, _, rest = raw(body(["red"])).partition(b"\r\n\r\n")
    with ThreadPoolExecutor(20) as pool:
        heads = [pool.submit(drip, shared.port, head) for _ in range(10)]
        bodies = [pool.submit(drip, shared.port, rest, head + b"\r\n\r\n") for _ in range(10)]
        time.sleep(0.5)
        start = time.monotonic()
        for _ in range(20):
            assert httpx.post(shared.url + "/v1/classify", json=body(["red", "blue"])).status_code == 200
        assert time.monotonic() - start < 10
        assert not any(one.done() for one in heads + bodies if time.monotonic() - start < 1.5)
        assert [one.result() for one in heads] == [b""] * 10
        for one in bodies:
            answer, _, content = one.result().partition(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 408 ") and json.loads(content)["error"]["code"] == "too_slow"
    # A connection that only stays open between two requests is no slow client.
    with httpx.Client(base_url=shared.url) as client:
        client.get("/healthz")
        time.sleep(3)
        assert client.get("/healthz").status_code == 200


def test_the_rest_of_a_refused_body_is_not_taken_for_a_request(shared: Process) -> None:
    smuggled = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
    with socket.create_connection(("127.0.0.1", shared.port), timeout=20) as client:
        client.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n" + smuggled)
        answer = b""
        while part := client.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 413 ") and answer.count(b"HTTP/1.1") == 1


def test_answers_to_many_clients_at_once_are_those_to_one(shared: Process) -> None:
    requests = [body(["red", "green", "blue"], base64_of(image)) for image in noise(32)]

    def ask(request: dict[str, Any]) -> dict[str, float]:
        answer = httpx.post(shared.url + "/v1/classify", json=request, timeout=30).json()
        return {p["label"]: p["probability"] for p in answer["results"][0]["predictions"]}

    alone = [ask(request) for request in requests]
    before = shared.count("vlm_batch_size_count")
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, requests))
    assert shared.count("vlm_batch_size_count") - before < 32  # some of them ran together
    for one, other in zip(alone, together, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_signal_in_mid_load_answers_all_that_was_accepted(shipped) -> None:
    process = shipped()
    before = len(process.logged())

    def ask(number: int) -> dict[str, Any]:
        answer = httpx.post(process.url + "/v1/classify", json=slow(number), timeout=60)
        assert answer.status_code == 200
        return answer.json()

    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(ask, number) for number in range(16)]
        until(lambda: process.count("vlm_queue_length") + sum(one.done() for one in asked) >= 16)
        unanswered = sum(not one.done() for one in asked)
        process.process.send_signal(signal.SIGTERM)
        answers = [one.result() for one in asked]
    assert unanswered > 2
    for answer in answers:
        scores = [p["probability"] for p in answer["results"][0]["predictions"]]
        assert len(scores) == 80 and sum(scores) == pytest.approx(1, abs=1e-4)
    assert process.process.wait(30) == 0
    logged = [line for line in process.logged()[before:] if line["path"] == "/v1/classify"]
    assert [line["status"] for line in logged] == [200] * 16
    with pytest.raises(httpx.ConnectError):
        httpx.get(process.url + "/healthz")


def test_kill_in_mid_load_leaves_nothing_half_answered(shipped) -> None:
    process = shipped()
    whole: list[int] = []

    def ask(number: int) -> None:
        """Requests until the service is gone; whatever comes must be a whole answer."""
        with httpx.Client(base_url=process.url, timeout=30) as client:
            for turn in range(1000):
                labels = [f"thing {number} {turn} {place}" for place in range(20)]
                try:
                    answer = client.post("/v1/classify", json=body(labels))
                except httpx.TransportError:
                    return
                assert answer.status_code == 200
                assert len(answer.json()["results"][0]["predictions"]) == 20
                whole.append(number)
        raise AssertionError("the service was never gone")

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, number) for number in range(8)]
        until(lambda: len(whole) >= 16)
        process.process.kill()
        for one in asked:
            one.result()
    assert process.process.wait(10) == -signal.SIGKILL


def test_a_full_queue_loses_nobody_and_leavers_are_dropped(shipped) -> None:
    process = shipped("--queue", "3")
    refused: list[int] = []

    def ask(number: int) -> int:
        for _ in range(60):
            answer = httpx.post(process.url + "/v1/classify", json=slow(number), timeout=60)
            if answer.status_code != 429:
                return answer.status_code
            assert answer.json()["error"]["code"] == "queue_full"
            refused.append(number)
            time.sleep(int(answer.headers["retry-after"]))
        return 429

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [200] * 8
    assert refused
    clients = [socket.create_connection(("127.0.0.1", process.port), timeout=20) for _ in range(3)]
    for number, client in enumerate(clients):
        client.sendall(raw(slow(100 + number)))
    until(lambda: process.count("vlm_queue_length") > 0)
    for client in clients:
        client.close()
    until(lambda: process.count("vlm_queue_length") == 0)
    dropped = process.count("vlm_dropped_total")
    assert dropped >= 1
    assert sum(line["status"] == 499 for line in process.logged()) == dropped
    assert ask(200) == 200


def test_a_taken_port_is_named(run: Run, model: str, shared: Process) -> None:
    code, _, err = run("serve", "--model", model, "--port", shared.port)
    assert code == 2
    assert f"127.0.0.1 port {shared.port}: can't be listened on" in err and "--port" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "serve.port must be at most 65535"),
        (["--port", "-1"], "serve.port must be at least 0"),
        (["--queue", "0"], "serve.queue must be at least 1"),
        (["--batch-size", "0"], "serve.batch_size must be at least 1"),
        (["--max-bytes", "0"], "serve.max_bytes must be at least 1"),
        (["--body-timeout", "nan"], "serve.body_timeout must be at least 0.1"),
        (["--head-timeout", "0"], "serve.head_timeout must be at least 0.1"),
        (["--api-key", "two words"], "serve.api_key"),
        (["--templates", "drawing s"], "did you mean 'drawings'"),
        (["--model", "tiny-clap"], "tiny-clap"),
        (["--host", "no.such.host.invalid"], "no.such.host.invalid port 0: can't be listened on"),
        (["--max-labels", "many"], "should be a valid integer"),
    ],
)
def test_options_that_cannot_be_borne_are_refused(run: Run, options: list[str], message: str) -> None:
    code, _, err = run("serve", "--port", "0", *options)
    assert code == 2 and message in err


def test_the_environment_sets_options_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_MAX_IMAGES", "0")
    code, _, err = run("serve", "--port", "0")
    assert code == 2 and "serve.max_images must be at least 1" in err


def test_interrupt_ends_an_idle_service_at_once(shared: Process) -> None:
    with httpx.Client(base_url=shared.url) as client:
        client.get("/healthz")  # its connection stays open
        shared.process.send_signal(signal.SIGINT)
        assert shared.process.wait(10) == 0
