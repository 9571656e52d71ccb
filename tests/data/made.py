"""Small pictures and shards for tests."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from PIL import Image

from vlm.data.shards import ShardWriter


def picture(shade: int = 0) -> bytes:
    """A small PNG."""
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (shade, 10, 20)).save(file, "PNG")
    return file.getvalue()


def write(pattern: Path, count: int = 5, samples: int = 2) -> list[Path]:
    """Shards of samples k0, k1, ..."""
    with ShardWriter(str(pattern), samples=samples) as writer:
        for i in range(count):
            writer.write(f"k{i}", picture(i), "png", {"captions": [f"thing {i}"], "concept": f"c{i % 2}"})
    return writer.shards


def tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar with members of any kind."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def said(text: str) -> bytes:
    """A sample's JSON."""
    return json.dumps({"captions": [text]}).encode()
