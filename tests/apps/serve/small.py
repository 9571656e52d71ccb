"""A service around a small model, in this process or in one of its own."""

from __future__ import annotations

import base64
import contextlib
import io
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from PIL import Image
from starlette.testclient import TestClient

from tests.tasks.small import colour_model
from vlm.apps.serve.app import create_app
from vlm.apps.serve.config import ServeConfig

ROOT = Path(__file__).resolve().parents[3]


def encoded(image: Image.Image, kind: str = "PNG", **more: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


def base64_of(image: Image.Image) -> str:
    return base64.b64encode(encoded(image)).decode()


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


class Process:
    """`vlm serve` in a process of its own."""

    def __init__(self, model: str, *options: str) -> None:
        command = [sys.executable, "-m", "vlm.apps.cli", "serve", "--model", model, "--port", "0", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        line = self.process.stdout.readline()
        if " at http://" not in line:
            raise RuntimeError(self.process.communicate()[1])
        self.url = line.split(" at ")[1].split(" ")[0]
        self.port = int(self.url.rsplit(":", 1)[1])

    def wait_until_ready(self) -> Process:
        for _ in range(600):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(self.url + "/readyz").status_code == 200:
                    return self
            time.sleep(0.05)
        raise RuntimeError("never ready")

    def end(self) -> str:
        """Kill what still runs; its log."""
        self.process.kill()
        return self.process.communicate()[1]
