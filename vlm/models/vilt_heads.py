"""Losses of ViLT's heads from labels (arXiv 2102.03334 §3.2 and §4): pre-training's two, and those of fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vlm.errors import ConfigError, nearest
from vlm.models.vilt import HEADS, Vilt
from vlm.objectives.downstream import classes, ranking, soft_answers
from vlm.objectives.mlm import IGNORED, mlm


def head_loss(
    network: Vilt,
    head: str,
    pixels: Tensor,
    tokens: Mapping[str, Tensor],
    labels: Tensor,
    *,
    pixel_mask: Tensor | None = None,
) -> Tensor:
    """What one head's answers cost: a scalar, the mean over rows, queries or hidden tokens.

    Args:
        network: a ViLT with that head.
        head: one of `HEADS`.
        pixels: (B, 3, H, W) normalised; for ``nlvr2`` (B, 2, 3, H, W), two pictures a row.
        tokens: `input_ids` and `attention_mask`, each (B, L).
        labels: ``itm`` (B,) 1 = matched; ``mlm`` (B, L) ids of the hidden tokens, `IGNORED` elsewhere; ``rank`` (R,)
            for R queries with B / R candidates each, which stand in a row: the place of the one that fits; ``vqa``
            (B, A) in [0, 1], how right each answer is; ``nlvr2`` (B,) 1 = true.
        pixel_mask: (B, H, W), or (B, 2, H, W), true on pixels that aren't padding; None without padding.

    Raises:
        ConfigError: no head has that name.
        MissingVerbError: the network lacks it.
        ValueError: labels have another shape, or the queries don't divide the rows.
    """
    if head not in HEADS:
        raise ConfigError(f"unknown head {head!r}{nearest(head, HEADS)}; choose from {', '.join(HEADS)}")
    rows, length = len(pixels), tokens["input_ids"].shape[1]
    shapes = {"mlm": (rows, length), "vqa": (rows, len(network.config.answers)), "rank": (len(labels),)}
    if head in network.config.heads and tuple(labels.shape) != shapes.get(head, (rows,)):
        raise ValueError(f"labels of {head} have the shape {tuple(labels.shape)}, expected {shapes.get(head, (rows,))}")
    given = (pixels, tokens, pixel_mask)
    if head == "mlm":
        hidden = labels != IGNORED  # (B, L)
        logits, truth = network.mlm_logits(*given)[hidden], labels[hidden]  # (M, V), (M,)
        return mlm(logits, truth) / max(1, len(truth))
    if head == "vqa":
        return soft_answers(network.vqa_logits(*given), labels) / len(pixels)
    if head == "rank":
        if not len(labels) or rows % len(labels):
            raise ValueError(f"{len(labels)} queries don't divide {len(pixels)} pairs evenly; give each as many")
        return ranking(network.rank_scores(*given).unflatten(0, (len(labels), -1)), labels) / len(labels)
    logits = network.match(*given) if head == "itm" else network.nlvr2_logits(*given)
    return classes(logits, labels.long()) / len(pixels)
