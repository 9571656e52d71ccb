"""A service around a small model, in this process or in one of its own."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import uvicorn
from PIL import Image
from starlette.testclient import TestClient

from tests.tasks.small import colour_model
from vlm.apps.serve.app import create_app
from vlm.apps.serve.config import ServeConfig
from vlm.apps.serve.server import listen

ROOT = Path(__file__).resolve().parents[3]
LABELS = ["red", "green", "blue"]


def encoded(image: Image.Image, kind: str = "PNG", **more: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


def base64_of(image: Image.Image) -> str:
    return base64.b64encode(encoded(image)).decode()


def classify(client, *images, labels=LABELS, **more):
    """Ask for pictures in JSON."""
    return client.post(
        "/v1/classify", json={"images": [base64_of(image) for image in images], "labels": labels, **more}
    )


def code(response) -> tuple[int, str]:
    """Status and code of an error, whose form is checked."""
    body = response.json()["error"]
    assert body["message"] and body["request_id"] == response.headers["x-request-id"]
    return response.status_code, body["code"]


@contextlib.contextmanager
def service(model=None, **settings) -> Iterator[TestClient]:
    """A client of a service in this process, warm."""
    app = create_app(model or colour_model(), ServeConfig(**settings), templates=("{}",))
    with TestClient(app, raise_server_exceptions=False) as client:
        for _ in range(500):
            if client.get("/readyz").status_code == 200:
                break
            time.sleep(0.01)
        yield client


@contextlib.contextmanager
def listening(**settings) -> Iterator[str]:
    """The address of a service in a thread of this process, for clients that need a socket."""
    app = create_app(colour_model(), ServeConfig(**settings), templates=("{}",))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none", timeout_graceful_shutdown=1))
    with listen("127.0.0.1", 0) as place:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
        thread.start()
        try:
            yield "http://127.0.0.1:" + str(place.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(20)


class Process:
    """`vlm serve` in a process of its own, on a free port."""

    def __init__(self, model: str, *options: str, env: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "vlm.apps.cli", "serve", "--model", model, "--port", "0", *options]
        self.stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 - a pipe that nobody reads would stop the service
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self.stderr, text=True, cwd=ROOT, env=os.environ | (env or {})
        )
        line = self.process.stdout.readline()
        if " at http://" not in line:
            self.process.wait(30)
            raise RuntimeError(self.log())
        self.url = line.split(" at ")[1].split(" ")[0]
        self.port = int(self.url.rsplit(":", 1)[1])

    def wait_until_ready(self) -> Process:
        for _ in range(1200):
            if httpx.get(self.url + "/readyz").status_code == 200:
                return self
            time.sleep(0.05)
        raise RuntimeError("never ready: " + self.log())

    def count(self, name: str) -> float:
        """The value of a line of /metrics."""
        lines = httpx.get(self.url + "/metrics", timeout=30).text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(name + " "))

    def log(self) -> str:
        self.stderr.seek(0)
        return self.stderr.read()

    def logged(self) -> list[dict[str, object]]:
        """The requests in the log."""
        lines = [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]
        return [line for line in lines if line["message"] == "request"]

    def end(self) -> None:
        """Kill what still runs."""
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.stderr.close()
