"""A folder of pictures to train on, and one thread for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Sixteen pictures of four colours with texts beside them, one of them broken."""
    root = tmp_path / "pictures"
    root.mkdir()
    colours = {"red": (220, 30, 30), "green": (20, 160, 40), "blue": (30, 40, 220), "black": (10, 10, 10)}
    for number in range(16):
        name, colour = list(colours.items())[number % 4]
        pixels = np.full((40, 30, 3), 255, np.uint8)
        pixels[8:30, 5:20] = colour
        Image.fromarray(pixels).save(root / f"{number:02d}.png")
        (root / f"{number:02d}.txt").write_text(f"a {name} box number {number}\n{name}\n")
    (root / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (root / "broken.txt").write_text("never seen")
    return root
