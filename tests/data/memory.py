"""A source in memory for tests of what reads sources."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

from vlm.data.samples import Problems, Sample
from vlm.errors import DataError


class Memory:
    """A source in memory: picture i has two captions, the second as long as i says."""

    def __init__(self, count: int, broken: Iterable[int] = (), gone: Iterable[int] = ()) -> None:
        self.name, self.problems, self.broken, self.gone = "memory", Problems(), set(broken), set(gone)
        self.keys = [f"k{i}" for i in range(count)]
        self.concepts = [f"concept {i % 7}" for i in range(count)]
        self.lengths = np.array([5 + 7 * (i * 37 % 20) for i in range(count)], dtype=np.int32)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, number: int) -> Sample:
        if number in self.gone:
            raise DataError(f"k{number}: its file has gone")
        image = b"not a picture" if number in self.broken else encoded(number)
        return Sample(self.keys[number], image, self.meta(number))

    def meta(self, number: int) -> dict[str, Any]:
        """Two captions and tags."""
        long = "word " * (int(self.lengths[number]) // 5)
        return {"captions": [f"thing {number}", f"{long}{number}"], "tags": ["a", "b", "c"]}

    def fingerprint(self) -> str:
        """Not asked for here."""
        raise NotImplementedError


@functools.cache
def encoded(number: int) -> bytes:
    """A PNG or WebP of 20 x 14, another colour for each number."""
    file = io.BytesIO()
    image = Image.new("RGB", (20, 14), "white")
    image.paste((number * 7 % 256, number * 13 % 256, number // 256), (4, 3, 15, 11))
    image.save(file, "PNG" if number % 2 else "WEBP", lossless=True)
    return file.getvalue()
