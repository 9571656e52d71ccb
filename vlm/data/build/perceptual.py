"""When two pictures count as the same: a test that both the split and its check use."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

GRID = 16
HASH_BITS_APART = 10
COLOUR_APART = 16.0


def signatures(images: Sequence[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    """Perceptual hashes (n, 64) bool and colour grids (n, 16 * 16 * 3) float32, of RGB pictures.

    The hash is the sign of the low frequencies (an 8 x 8 corner of the DCT of a 32 x 32 grey picture)
    against their median.
    """
    basis = _dct_basis(32)[:9]
    hashes, grids = [], []
    for image in images:
        grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX), dtype=np.float32)
        low = (basis @ grey @ basis.T)[1:9, :8].ravel()
        hashes.append(low > np.median(low))
        small = image.resize((GRID, GRID), Image.Resampling.BOX)
        grids.append(np.asarray(small, dtype=np.float32).ravel())
    return np.array(hashes), np.array(grids)


def near_identical(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray], *, block: int = 2048
) -> list[tuple[int, int]]:
    """Pairs (i, j) of pictures i of `first` and j of `second` that look the same.

    Two pictures are near-identical when at most 10 of the 64 bits of their hashes differ and their 16 x 16
    colour grids are at most 16 grey levels (of 255) apart, root mean square. Either alone is not enough:
    line drawings have grids alike, recoloured drawings hashes alike.
    """
    pairs: list[tuple[int, int]] = []
    hashes, grids = second
    squares = (grids**2).sum(axis=1)
    limit = COLOUR_APART**2 * grids.shape[1]
    for start in range(0, len(first[0]), block):
        part = first[1][start : start + block]
        distance = (part**2).sum(axis=1)[:, None] + squares[None] - 2 * part @ grids.T
        for i, j in np.argwhere(distance <= limit):
            if np.count_nonzero(first[0][start + i] != hashes[j]) <= HASH_BITS_APART:
                pairs.append((int(start + i), int(j)))
    return pairs


def _dct_basis(size: int) -> np.ndarray:
    """Orthogonal cosines, a frequency a row."""
    positions = (np.arange(size) + 0.5) * np.pi / size
    return np.cos(np.arange(size)[:, None] * positions[None]).astype(np.float32)
