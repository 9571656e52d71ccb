"""What of an earlier stage can't be taken over as it is: positions of another grid, another common space."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from timm.layers import resample_abs_pos_embed
from torch import Tensor

logger = logging.getLogger("vlm.weights")

POSITIONS = "image.trunk.pos_embed"
"""(1, side * side + 1, D), [CLS] first."""
PROJECTIONS = ("image_projection", "text_projection")
TEMPERATURE = "log_scale"


def refit(
    tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], *, given: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """An earlier stage's tensors, those of image positions and common space fitted to a network; each change is logged.

    Positions of a grid of another side are interpolated, as timm does it for pictures of another size. Projections of
    another shape, or with a bias on one side alone, aren't taken over, neither of them, nor the temperature of their
    features: what would be left is no common space.

    Args:
        tensors: under the names that the network has for them.
        own: the network's.
        given: the same under the earlier stage's names, whole.
        where: for messages.
    """
    out = dict(tensors)
    old, new = tensors.get(POSITIONS), own.get(POSITIONS)
    if old is not None and new is not None and old.shape != new.shape and old.shape[-1] == new.shape[-1]:
        before, after = _side(old), _side(new)
        if before and after:
            out[POSITIONS] = resample_abs_pos_embed(old, [after, after], [before, before], num_prefix_tokens=1)
            logger.info(
                "%s: image positions of %d x %d patches are interpolated to %d x %d",
                *(where, before, before, after, after),
            )
    shared = [part for part in PROJECTIONS if _shapes(tensors, part) and _shapes(own, part)]
    other = [part for part in shared if _shapes(given, part) != _shapes(own, part)]
    if other:
        found = "; ".join(f"{part} {_shapes(given, part)}, here {_shapes(own, part)}" for part in other)
        logger.info("%s: another common space (%s): projections and temperature begin afresh", where, found)
        out = {name: value for name, value in out.items() if name.split(".")[0] not in (*PROJECTIONS, TEMPERATURE)}
    return out


def _side(positions: Tensor) -> int:
    """Of a square grid beside [CLS]; 0 where it is none."""
    patches = positions.shape[1] - 1 if positions.ndim == 3 else -1
    return math.isqrt(patches) if patches > 0 and math.isqrt(patches) ** 2 == patches else 0


def _shapes(tensors: Mapping[str, Tensor], part: str) -> dict[str, tuple[int, ...]]:
    names = sorted(name for name in tensors if name.startswith(f"{part}."))
    return {name.removeprefix(f"{part}."): tuple(tensors[name].shape) for name in names}
