"""Masked language modelling (MLM): which tokens are hidden, and the loss of guessing them (BERT, 1810.04805)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vlm.objectives.distillation import taught_cross_entropy

IGNORED = -100
"""Label of a token that isn't to be guessed."""


class Masked(NamedTuple):
    """A text with hidden tokens."""

    input_ids: Tensor
    """(B, L) with some ids replaced."""
    labels: Tensor
    """(B, L): the id that stood there, or `IGNORED`."""


def mask_tokens(
    input_ids: Tensor,
    maskable: Tensor,
    *,
    draws: Tensor,
    mask_id: int,
    vocab_size: int,
    share: float = 0.15,
    starts: Tensor | None = None,
) -> Masked:
    """Choose a share of the tokens; 80 % of these become [MASK], 10 % another token, 10 % stay (BERT §3.1).

    Args:
        input_ids: (B, L).
        maskable: (B, L) boolean, true where a token may be chosen: not padding, [CLS] or [SEP].
        draws: (B, L, 3) uniform in [0, 1): whether chosen, what becomes of it, which other token.
        mask_id: id of [MASK].
        vocab_size: other tokens are drawn evenly from so many.
        share: chance of each token, or of each word.
        starts: (B, L) boolean, true where a word begins; then words are chosen whole (ViLT §3.2.1). None
            chooses each token by itself.
    """
    chance = draws[..., 0]
    if starts is not None:
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        first = torch.where(starts, place, 0).cummax(dim=1).values  # (B, L): where the token's word begins
        chance = chance.gather(1, first)
    chosen = maskable & (chance < share)
    fate = draws[..., 1]
    other = (draws[..., 2] * vocab_size).long().clamp(max=vocab_size - 1)
    replaced = torch.where(fate < 0.8, mask_id, torch.where(fate < 0.9, other, input_ids))
    return Masked(torch.where(chosen, replaced, input_ids), torch.where(chosen, input_ids, IGNORED))


def mlm(logits: Tensor, labels: Tensor, *, soft: Tensor | None = None, alpha: float = 0.0) -> Tensor:
    """Sum over masked tokens of the cross-entropy, against the label and a teacher's softmax.

    Args:
        logits: (M, V) of the masked tokens alone.
        labels: (M,) ids.
        soft: (M, V) the teacher's logits (ALBEF eq. 7), or None.
        alpha: share of the teacher's softmax in the target.
    """
    return taught_cross_entropy(logits, labels, soft=soft, alpha=alpha).sum()
