"""Both services of serve.py: their weights, their processes and the requests that they are asked."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from load import HOST, form

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve().parent
TEMPLATE = "This is a photo of {}."
"""The pipeline's own."""
SIDE = 384
"""Pixels of a picture's sides."""


class Server:
    """A service in a process of its own, on a free port of this machine."""

    def __init__(self, command: Sequence[str], port: int, ready: str, path: str) -> None:
        """ready: address that answers 200 once requests can be sent to `path`."""
        self.port, self.path = port, path
        settings = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, *command], env=settings, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._wait(ready)

    def _wait(self, ready: str) -> None:
        for _ in range(1200):
            if self.process.poll() is not None:
                raise SystemExit(f"the service ended with status {self.process.returncode} before it was ready")
            try:
                with urllib.request.urlopen(f"http://{HOST}:{self.port}{ready}") as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        self.end()
        raise SystemExit("the service was not ready in two minutes")

    def peak_mb(self) -> float:
        """Highest memory of the process so far, in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6

    def cpu_seconds(self) -> float:
        """Processor time of all its threads so far, which other work on the machine distorts less than the clock."""
        after = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(after[11]) + int(after[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        """Stop the process."""
        self.process.kill()
        self.process.wait()


def our_server(model: str, *options: str) -> Server:
    """`vlm serve` with its defaults but for `options`."""
    port = free_port()
    command = ["-m", "vlm.apps.cli", "serve", "--model", model, "--port", str(port), *options]
    return Server(command, port, "/readyz", "/v1/classify")


def peer_server(folder: str) -> Server:
    """The plain handler around the pipeline."""
    port = free_port()
    return Server([str(HERE / "serve_peer.py"), folder, str(port)], port, "/openapi.json", "/classify")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server((HOST, 0)) as place:
        return int(place.getsockname()[1])


def make_folder(preset: str, folder: Path) -> str:
    """A CLIPModel folder with random weights of a preset's shape, which both sides can load."""
    import torch
    from clip_sides import CONTEXT, PRESETS, our_network

    from vlm.data.tokenizers import clip_bpe
    from vlm.data.transforms import ImageTransform
    from vlm.weights.export import export_hf
    from vlm.weights.loaded import VisionLanguageModel

    torch.manual_seed(0)
    shape = PRESETS[preset]
    transform = ImageTransform(shape.image_size, resize="crop")
    model = VisionLanguageModel(
        our_network(shape).eval(), clip_bpe(max_length=CONTEXT), transform, name=preset, family="clip"
    )
    export_hf(model, folder)
    return str(folder)


def pictures() -> list[bytes]:
    """The repository's example pictures as JPEG files of SIDE x SIDE pixels."""
    from PIL import Image

    found = []
    for path in sorted((ROOT / "data" / "examples").glob("*.png")):
        buffer = io.BytesIO()
        Image.open(path).convert("RGB").resize((SIDE, SIDE)).save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


def label_set(count: int) -> list[str]:
    """Names of the repository's concepts."""
    from vlm.data.sources import open_source

    source = open_source("human-train")
    names = dict.fromkeys(str(source.meta(number)["name"]).replace(",", "") for number in range(len(source)))
    return list(names)[:count]


def requests_for(server: Server, labels: Sequence[str]) -> list[bytes]:
    """One request for each picture; both sides answer all labels."""
    fields = {"labels": ",".join(labels)}
    if server.path == "/v1/classify":
        fields |= {"top_k": str(len(labels)), "templates": TEMPLATE}
    return [form(server.port, server.path, picture, fields) for picture in pictures()]
