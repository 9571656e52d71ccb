"""Losses of fine-tuned heads: answers, classes, ranking. Sums over rows, like those of pre-training."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def soft_answers(logits: Tensor, scores: Tensor) -> Tensor:
    """Binary cross-entropy of every answer (VQA as ViLT and BUTD have it: several answers may be right).

    Args:
        logits: (B, A) of A answers.
        scores: (B, A) in [0, 1], how right each answer is.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), scores.float(), reduction="sum")


def classes(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of (B, C) logits against (B,) labels (NLVR2, visual entailment)."""
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def ranking(scores: Tensor, matched: Tensor) -> Tensor:
    """Cross-entropy over candidates of which one matches (retrieval as ViLT is fine-tuned for it, §4.3).

    Args:
        scores: (B, k) rank scores of one picture with k texts, or of one text with k pictures.
        matched: (B,) place of the one that belongs to it.
    """
    return F.cross_entropy(scores.float(), matched, reduction="sum")
