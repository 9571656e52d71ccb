"""Image-text contrast (ITC): softmax and sigmoid, exact over ranks, micro-batches and chunks.

Rows are what this rank owns, columns are everyone's; the mean over rows of all ranks' losses is the loss of
the joined batch. Pairs that share an id (a concept, a caption) are positives of each other, never negatives.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def positives(row_ids: Tensor, ids: Tensor) -> Tensor:
    """Mark which columns describe the same thing as a row.

    Args:
        row_ids: (b, K) integer ids of the rows; K kinds of id, such as concept and caption.
        ids: (B, K) ids of the columns.

    Returns:
        (b, B) boolean: true where any of the K ids agree.

    Raises:
        ValueError: rows and columns have different kinds of id.
    """
    if row_ids.shape[1:] != ids.shape[1:]:  # one kind would be compared with all others unnoticed
        raise ValueError(f"ids of shape {tuple(row_ids.shape)} and {tuple(ids.shape)} differ in their kinds")
    return (row_ids[:, None, :] == ids[None, :, :]).any(dim=-1)  # (b, B)


def cosines(rows: Tensor, columns: Tensor) -> Tensor:
    """(b, B) cosines of unit-norm features (b, D) and (B, D).

    On one side each may have Q features of its own, (b, Q, D) or (B, Q, D): then the greatest of the Q counts, as for
    the queries that an image becomes (BLIP-2, arXiv 2301.12597 §3.2).
    """
    if rows.dim() == 3:
        return (rows @ columns.T).max(dim=1).values
    if columns.dim() == 3:
        return cosines(columns, rows).T
    return rows @ columns.T


def soft_cross_entropy(logits: Tensor, positive: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy against a uniform target over each row's positives.

    Args:
        logits: (b, B).
        positive: (b, B) boolean with at least one true in each row.
        smoothing: share of the target that is spread evenly over all columns.

    Returns:
        (b,) losses: log-sum-exp of the row minus the mean of its positives' logits, unless smoothed.
    """
    share = positive.to(logits.dtype) / positive.sum(dim=1, keepdim=True)  # (b, B), rows sum to 1
    if smoothing:
        share = (1 - smoothing) * share + smoothing / logits.shape[1]
    return torch.logsumexp(logits, dim=1) - (share * logits).sum(dim=1)


def itc(
    image: Tensor,
    text: Tensor,
    images: Tensor,
    texts: Tensor,
    *,
    scale: Tensor,
    row_ids: Tensor,
    ids: Tensor,
    chunk: int = 0,
    smoothing: float = 0.0,
) -> Tensor:
    """Symmetric softmax contrast (CLIP, arXiv 2103.00020, figure 3; targets as in SupCon where ids agree).

    Args:
        image, text: (b, D) unit-norm features of the rows; images may have Q each, see `cosines`.
        images, texts: (B, D) unit-norm features of everyone, the rows among them.
        scale: scalar, the inverse temperature (already exponentiated).
        row_ids, ids: (b, K) and (B, K) ids; see `positives`.
        chunk: rows compared at a time; 0 compares all at once. With a chunk the logits are recomputed in
            the backward pass, so that chunk x B of them are alive instead of b x B.
        smoothing: share of each target that is spread over everyone.

    Returns:
        Scalar: mean over the rows of half image-to-text plus half text-to-image.
    """

    def total(image_part: Tensor, text_part: Tensor, ids_part: Tensor) -> Tensor:
        same = positives(ids_part, ids)  # (c, B)
        to_text = soft_cross_entropy(scale * cosines(image_part, texts), same, smoothing)
        to_image = soft_cross_entropy(scale * cosines(text_part, images), same, smoothing)
        return 0.5 * (to_text + to_image).sum()

    return _over_rows(total, image, text, row_ids, chunk=chunk)


def sigmoid_itc(
    image: Tensor,
    text: Tensor,
    texts: Tensor,
    *,
    scale: Tensor,
    bias: Tensor,
    row_ids: Tensor,
    ids: Tensor,
    chunk: int = 0,
) -> Tensor:
    """Pairwise sigmoid contrast (SigLIP, arXiv 2303.15343, algorithm 1).

    Args:
        image: (b, D) unit-norm features of the rows.
        text: (b, D) unit-norm features of the rows' texts; only their number is checked.
        texts: (B, D) everyone's text features.
        scale, bias: scalars; the logit of a pair is ``scale * cosine + bias``.
        row_ids, ids: as in `itc`.
        chunk: as in `itc`.

    Returns:
        Scalar: sum over the columns, mean over the rows.
    """

    def total(image_part: Tensor, _: Tensor, ids_part: Tensor) -> Tensor:
        sign = positives(ids_part, ids).to(image.dtype) * 2 - 1  # (c, B), +1 or -1
        return -F.logsigmoid(sign * (scale * image_part @ texts.T + bias)).sum()

    return _over_rows(total, image, text, row_ids, chunk=chunk)


def _over_rows(
    total: Callable[[Tensor, Tensor, Tensor], Tensor],
    image: Tensor,
    text: Tensor,
    row_ids: Tensor,
    *,
    chunk: int,
) -> Tensor:
    rows = len(image)
    if chunk <= 0 or chunk >= rows:
        return total(image, text, row_ids) / rows
    parts = zip(image.split(chunk), text.split(chunk), row_ids.split(chunk), strict=True)
    losses = [checkpoint(total, *part, use_reentrant=False) for part in parts]
    return torch.stack(losses).sum() / rows
