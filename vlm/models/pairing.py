"""Texts beside images: what the stages that fuse both share in making pairs and in counting their losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.models.transformer import KeyValues
from vlm.objectives.itm import itm
from vlm.objectives.mlm import mlm

Keys = Sequence[KeyValues | None]
"""Images' keys and values for each layer of a text transformer; None for layers that don't look at them."""


class Rows(Protocol):
    """What a stage with masked language modelling reads of a batch."""

    @property
    def pixels(self) -> Tensor:
        """(b, 3, H, W) normalised pixels."""

    @property
    def tokens(self) -> Mapping[str, Tensor]:
        """`input_ids` and `attention_mask`, each (b, L)."""

    @property
    def masked_ids(self) -> Tensor | None:
        """(b, L) the ids with some hidden; None where nothing is to be guessed."""

    @property
    def labels(self) -> Tensor | None:
        """(b, L) the ids that were hidden there, -100 elsewhere."""


def masked(batch: Rows) -> tuple[Tensor, Tensor]:
    """The ids with some hidden and their labels, (b, L) each. Raises ValueError when the batch has none."""
    if batch.masked_ids is None or batch.labels is None:
        raise ValueError("the batch has no masked_ids and labels; let the loader mask tokens, or set mlm_weight to 0")
    return batch.masked_ids, batch.labels


def begun(ids: Tensor, start: int | None) -> Tensor:
    """Texts (B, L) with another first token; None keeps it."""
    return ids if start is None else torch.cat([torch.full_like(ids[:, :1], start), ids[:, 1:]], dim=1)


def take_images(image: Keys, rows: Tensor | slice) -> Keys:
    """Keys and values of some of the images."""
    return [None if kv is None else KeyValues(kv.keys[rows], kv.values[rows]) for kv in image]


def side_by_side(texts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Put T texts of each row one after another, so that they share the row's image.

    texts: T times states (b, L, D) and their mask (b, L), of any L. Returns (b T, L, D) and (b T, L).
    """
    longest = max(mask.shape[1] for _, mask in texts)
    states = torch.stack([F.pad(one, (0, 0, 0, longest - one.shape[1])) for one, _ in texts], dim=1)
    masks = torch.stack([F.pad(mask, (0, longest - mask.shape[1])) for _, mask in texts], dim=1)
    return states.flatten(0, 1), masks.flatten(0, 1)


def meet(
    fuse: Callable[[Tensor, Tensor, Keys], Tensor],
    texts: tuple[Tensor, Tensor],
    image: Keys,
    partners: Mapping[str, Tensor],
    also: Sequence[tuple[Tensor, Tensor]] = (),
) -> tuple[Tensor, Tensor]:
    """Let each row's text and image meet, and each of them the other's partner (ALBEF §3.2).

    Args:
        fuse: states (B, L, D), their mask and images to fused states (B, L, D).
        texts: states (P, L, D) and mask (P, L) of the pool, the b rows first.
        image: keys and values of the pool's images.
        partners: `text` and `image` (b,) places in the pool; -1 for none, then the row is meaningless.
        also: T more texts of each row that meet its own image, as for `side_by_side`.

    Returns:
        First states (3, b, D) of the own pair, of the image with its partner text, of the text with its partner
        image; and fused states (b, T, L, D) of the other texts.
    """
    states, mask = texts
    rows, other = slice(len(partners["text"])), {kind: place.clamp(min=0) for kind, place in partners.items()}
    beside, real = side_by_side([(states[rows], mask[rows]), (states[other["text"]], mask[other["text"]]), *also])
    fused = fuse(beside, real, take_images(image, rows)).unflatten(0, (rows.stop, -1))  # (b, 2 + T, L, D)
    wrong = fuse(states[rows], mask[rows], take_images(image, other["image"]))  # (b, L, D)
    return torch.stack([fused[:, 0, 0], fused[:, 1, 0], wrong[:, 0]]), fused[:, 2:]


def match_sums(logits: Tensor, partners: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums of the ITM loss and of what it got right.

    Args:
        logits: (3, b, 2) of each row's own pair, its image with its partner text, its text with its partner
            image; index 1 = matched.
        partners: `text` and `image` (b,); -1 leaves the pair out.

    Returns:
        `itm` and `itm_accuracy`.
    """
    there = torch.stack([torch.ones_like(partners["text"]), partners["text"] + 1, partners["image"] + 1]) > 0  # (3, b)
    matched = torch.zeros_like(there)
    matched[0] = True
    right = (logits.argmax(dim=-1) == matched.long()) & there
    loss = itm(logits.flatten(0, 1), matched.flatten(), there.flatten().float())
    return {"itm": loss, "itm_accuracy": right.sum().float()}


def guess_sums(logits: Tensor, truth: Tensor, *, soft: Tensor | None, alpha: float) -> dict[str, Tensor]:
    """Sums of the MLM loss over hidden tokens and of what it got right.

    logits: (M, V); truth: (M,) ids; soft, alpha: the teacher's logits (M, V) and their share, as for `mlm`.
    Returns `mlm` and `mlm_accuracy`.
    """
    loss = mlm(logits, truth, soft=soft, alpha=alpha)
    return {"mlm": loss, "mlm_accuracy": (logits.argmax(dim=-1) == truth).sum().float()}
