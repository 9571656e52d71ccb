"""The benchmark of the service: its clients count rightly, and both sides answer the same on the same weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def moody() -> Iterator[int]:
    """A service on a port: every third request is told to come back at once, paths of /bad get 500."""
    seen: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            seen.append(self.rfile.read(int(self.headers["content-length"])))
            status = 500 if self.path == "/bad" else 429 if len(seen) % 3 == 0 else 200
            self.send_response(status)
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *words: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def test_every_request_is_counted_once(moody: int) -> None:
    from load import form, run_clients

    good = form(moody, "/good", b"picture", {"labels": "a,b"})
    outcome = run_clients(moody, [good], clients=4, seconds=0.3)
    found = outcome.summary()
    answers = found["requests"] + found["refused"]
    assert found["requests"] > 4 and abs(found["refused"] - answers / 3) <= 1 and found["lost"] == 0
    assert found["requests_per_second"] == pytest.approx(found["requests"] / found["seconds"])
    assert 0 < found["p50_ms"] <= found["p99_ms"]
    outcome = run_clients(moody, [form(moody, "/bad", b"", {})], clients=1, seconds=0.1)
    assert outcome.lost and outcome.lost[0].startswith("status 500") and not outcome.latencies


def test_a_service_that_goes_away_loses_requests() -> None:
    import socket

    from load import form, run_clients

    with socket.create_server(("127.0.0.1", 0)) as place:
        port = place.getsockname()[1]

        def hang_up() -> None:
            client, _ = place.accept()
            client.recv(10)
            client.close()

        Thread(target=hang_up, daemon=True).start()
        outcome = run_clients(port, [form(port, "/", b"", {})], clients=1, seconds=1.0)
    assert len(outcome.lost) == 1 and not outcome.latencies


def test_bad_options_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    import serve

    for words in (["--clients", "0"], ["--clients", "100000"], ["--seconds", "nan"]):
        with pytest.raises(SystemExit):
            serve.parse(words)
        assert f"{words[0]} must be above 0" in capsys.readouterr().err


@pytest.mark.slow
def test_both_sides_answer_alike_and_the_page_says_what_was_measured(tmp_path: Path, monkeypatch) -> None:
    import clip_sides
    import serve

    small = clip_sides.Shape(32, 16, 64, 2, 2, 64, 2, 2, 32, batch=1)
    monkeypatch.setitem(clip_sides.PRESETS, "vit-b-32", small)
    words = ["--labels", "3", "--clients", "2", "--rounds", "1", "--seconds", "0.3", "--out", str(tmp_path)]
    serve.main(words)
    result = json.loads((tmp_path / "serve-vit-b-32-3.json").read_text("utf-8"))
    assert result["largest_difference"] < 0.02
    ours, theirs = result["turns"]["vlm"][0], result["turns"]["transformers"][0]
    assert ours["lost"] == theirs["lost"] == 0 and theirs["requests"] >= 2
    assert result["ratio"]["each"] == [ours["requests_per_second"] / theirs["requests_per_second"]]
    assert all(50 < value < 20_000 for value in result["peak_mb"].values())
    assert f"**{result['ratio']['median']:.1f}**" in (tmp_path / "serve-vit-b-32-3.md").read_text("utf-8")


def test_a_load_is_written_too(tmp_path: Path) -> None:
    import serve

    words = ["--load", "--model", "tiny-clip", "--labels", "3", "--clients", "6", "--seconds", "1", "--queue", "2"]
    serve.main([*words, "--out", str(tmp_path)])
    found = json.loads((tmp_path / "serve-load-tiny-clip.json").read_text("utf-8"))["outcome"]
    assert found["requests"] > 6 and found["refused"] > 0 and found["lost"] == 0
