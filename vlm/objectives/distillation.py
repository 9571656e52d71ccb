"""Momentum distillation (MoD, ALBEF, arXiv 2107.07651 §3.3): a slowly moving teacher softens the targets.

Web texts describe their pictures loosely: another text may fit better than the row's own, and many words fit
a gap. So part of each target is what a moving average of the network believes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.objectives.itc import positives


def soft_targets(taught: Tensor, positive: Tensor, alpha: float) -> Tensor:
    """Mix what is known with what the teacher believes (ALBEF §3.3, the targets of eq. 6).

    Args:
        taught: (b, C) the teacher's logits.
        positive: (b, C) boolean with at least one true in each row.
        alpha: the teacher's share, from 0 to 1.

    Returns:
        (b, C) rows that sum to 1: ``(1 - alpha)`` even over the positives, plus ``alpha`` of the softmax.
    """
    known = positive.to(taught.dtype) / positive.sum(dim=1, keepdim=True)  # (b, C)
    return (1 - alpha) * known + alpha * taught.softmax(dim=1)


def taught_cross_entropy(
    logits: Tensor, labels: Tensor, *, soft: Tensor | None, alpha: float, smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of classes or tokens against the label and a teacher's softmax (ALBEF §3.3, eq. 7).

    Args:
        logits: (M, V).
        labels: (M,) ids.
        soft: (M, V) the teacher's logits, or None.
        alpha: share of the teacher's softmax in the target.
        smoothing: share of the label's part that is spread evenly over all classes.

    Returns:
        (M,) losses.
    """
    losses = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing, reduction="none")
    if soft is None or alpha == 0.0:
        return losses
    taught = -(soft.float().softmax(dim=-1) * logits.float().log_softmax(dim=-1)).sum(dim=-1)
    return (1 - alpha) * losses + alpha * taught


def itc_taught(
    image: Tensor,
    text: Tensor,
    *,
    taught_image: Tensor,
    taught_text: Tensor,
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    row_ids: Tensor,
    ids: Tensor,
    alpha: float,
) -> Tensor:
    """Contrast of the student's rows with the teacher's features of everyone and the queue (ALBEF §3.2, eq. 6).

    The gradient goes to the student's rows and to the scale alone. The mean over all parts of a batch,
    weighted by their rows, is the loss of the whole, however it is cut.

    Args:
        image, text: (b, D) unit-norm features of the rows, the student's.
        taught_image, taught_text: (b, D) the teacher's features of the same rows.
        images, texts: (C, D) the teacher's features of the joined batch, then of the queue.
        scale: scalar or (1,), the inverse temperature (already exponentiated), also of the teacher's softmax.
        row_ids, ids: (b, K) and (C, K); equal ids are positives of each other, in the queue too.
        alpha: share of the teacher's softmax in the targets.

    Returns:
        Scalar: mean over the rows of half image-to-text plus half text-to-image.
    """
    same = positives(row_ids, ids)  # (b, C)

    def one_way(rows: Tensor, taught: Tensor, columns: Tensor) -> Tensor:
        columns = columns.detach()
        with torch.no_grad():
            targets = soft_targets(scale * taught @ columns.T, same, alpha)  # (b, C)
        logits = scale * rows @ columns.T  # (b, C)
        return -(targets * logits.log_softmax(dim=1)).sum(dim=1)  # (b,)

    return 0.5 * (one_way(image, taught_image, texts) + one_way(text, taught_text, images)).mean()
