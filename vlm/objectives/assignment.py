"""Text assignment (TA), ALBEF's pre-training for two images (arXiv 2107.07651 §5, NLVR2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vlm.objectives.itm import draw_negatives
from vlm.objectives.mlm import IGNORED


class Assignment(NamedTuple):
    """Two images for each text, and which of them it belongs to."""

    first: Tensor
    """(b,) row of the first image."""
    second: Tensor
    """(b,) row of the second image."""
    label: Tensor
    """(b,) 0 for the first, 1 for the second, 2 for neither; `IGNORED` where the batch holds no other image."""


def assign_texts(positive: Tensor, draws: Tensor) -> Assignment:
    """Put each text before two images of which at most one is its own.

    Args:
        positive: (b, b) boolean, true where a row's image fits another row's text; the diagonal is true.
        draws: (b, 3) uniform in [0, 1): the label, and two images that don't fit, which differ where the batch
            holds two.
    """
    rows, even = torch.arange(len(positive), device=positive.device), torch.ones_like(positive, dtype=torch.float32)
    label = (draws[:, 0] * 3).long().clamp(max=2)
    one = draw_negatives(even, positive, draws[:, 1])
    taken = rows[None] == one[:, None]  # (b, b)
    other = draw_negatives(even, positive | taken, draws[:, 2])
    other = torch.where(other < 0, one, other)
    first = torch.where(label == 0, rows, one)
    second = torch.where(label == 1, rows, torch.where(label == 0, one, other))
    alone = one < 0
    return Assignment(
        torch.where(alone, rows, first), torch.where(alone, rows, second), torch.where(alone, IGNORED, label)
    )
