"""Word-patch alignment (WPA): how cheaply a text's words can be carried to a picture's patches.

ViLT (arXiv 2102.03334 §3.2) as in UNITER (1909.11740 §3.2): an optimal transport plan by IPOT (1802.04307,
algorithm 1), the inexact proximal point method. Without autocast's lower precision, as the iterations need it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_cost(words: Tensor, patches: Tensor) -> Tensor:
    """Map (B, L, D) and (B, N, D) states to the cost of carrying each to each: (B, L, N), 1 - cosine, float32."""
    with torch.autocast(words.device.type, enabled=False):
        unit = (F.normalize(states.float(), dim=-1, eps=1e-5) for states in (words, patches))
        return 1 - torch.einsum("bld,bnd->bln", *unit)


@torch.no_grad()
def ipot(cost: Tensor, word_mask: Tensor, patch_mask: Tensor, *, beta: float = 0.5, iterations: int = 50) -> Tensor:
    """Transport plan between evenly weighted words and evenly weighted patches.

    Args:
        cost: (B, L, N) finite.
        word_mask: (B, L) boolean, true on words that take part.
        patch_mask: (B, N) boolean, true on patches that take part.
        beta: step of the proximal point method; smaller comes nearer to the exact plan in a step.
        iterations: steps.

    Returns:
        (B, L, N) float32, at least 0, without gradient. A word's row sums to 1 / words, a patch's
        column nearly to 1 / patches; everything is 0 outside of the masks and in a row without words or patches.
    """
    with torch.autocast(cost.device.type, enabled=False):
        pairs = word_mask[:, :, None] & patch_mask[:, None, :]  # (B, L, N)
        words, patches = (mask.sum(dim=1, keepdim=True).clamp(min=1) for mask in (word_mask, patch_mask))  # (B, 1)
        kernel = torch.exp(-cost.float() / beta) * pairs  # (B, L, N)
        plan, word_scale = pairs.float(), word_mask / words  # (B, L, N), (B, L)
        for _ in range(iterations):
            plan = kernel * plan
            patch_scale = _inverse(patches * torch.einsum("bln,bl->bn", plan, word_scale))  # (B, N)
            word_scale = _inverse(words * torch.einsum("bln,bn->bl", plan, patch_scale))  # (B, L)
            plan = word_scale[:, :, None] * plan * patch_scale[:, None, :]
        return plan


def wpa(words: Tensor, patches: Tensor, word_mask: Tensor, patch_mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum over rows of the transport distance between words and patches.

    The gradient goes through the cost alone: at the optimum the plan's own is zero (envelope theorem).

    Args:
        words, patches: (B, L, D) and (B, N, D) states of the last layer.
        word_mask, patch_mask: (B, L) and (B, N) boolean, as in `ipot`; without [CLS] and [SEP].
        weights: (B,) of each row, None for all 1. The official ViLT gives pairs that match 1 and the others
            -1, so that words come near to the patches of their own picture and not to any.
    """
    cost = cosine_cost(words, patches)
    distance = (ipot(cost, word_mask, patch_mask) * cost).sum(dim=(1, 2))  # (B,)
    return distance.sum() if weights is None else (distance * weights).sum()


def _inverse(x: Tensor) -> Tensor:
    """1 / x where x is positive, 0 where nothing is carried."""
    return torch.where(x > 0, x, torch.inf).reciprocal()
