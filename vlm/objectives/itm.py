"""Image-text matching (ITM): whether a picture and a text belong together, and how its negatives are drawn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def draw_negatives(weights: Tensor, positive: Tensor, draws: Tensor) -> Tensor:
    """One negative for each row, drawn in proportion to the weights of the columns that aren't its positives.

    ALBEF (arXiv 2107.07651 §3.2) draws hard negatives by the softmax of the contrastive similarity; equal
    weights give ViLT's random ones. Whatever a row shares an id with is never drawn.

    Args:
        weights: (b, B) at least 0, such as a softmax; a row may sum to anything.
        positive: (b, B) boolean, true where row and column describe the same thing.
        draws: (b,) uniform in [0, 1).

    Returns:
        (b,) column numbers; -1 where a row has no negative.
    """
    mass = weights.double().masked_fill(positive, 0.0)  # (b, B)
    # A softmax that is sure of its positives underflows: then every negative is as good as another.
    mass = torch.where((mass.sum(dim=1, keepdim=True) > 0) | positive, mass, 1.0)
    ends = mass.cumsum(dim=1)
    target = draws.double()[:, None] * ends[:, -1:]  # (b, 1)
    chosen = torch.searchsorted(ends, target, right=True).squeeze(1)  # (b,)
    # A rounded target can reach the last end: step back to the last column that has mass.
    last = torch.where(mass > 0, torch.arange(mass.shape[1], device=mass.device), -1).amax(dim=1)
    return torch.minimum(chosen, last)


def itm(logits: Tensor, matched: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum over pairs of the cross-entropy of "matched or not".

    Args:
        logits: (P, 2); index 1 means matched.
        matched: (P,) boolean.
        weights: (P,) of each pair, 0 to leave one out; None for all 1.
    """
    losses = F.cross_entropy(logits.float(), matched.long(), reduction="none")  # (P,)
    return losses.sum() if weights is None else (losses * weights).sum()
