"""Single samples as the model will see them, and how they are joined to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlm.data.batch import Batch
from vlm.data.prompts import tokenised
from vlm.data.samples import caption_id, stable_id
from vlm.data.tokenizers import Tokenizer
from vlm.data.transforms import ImageTransform, pad_pictures


@dataclass(frozen=True)
class Row:
    """One sample as the model will see it."""

    key: str
    concept: str
    picture: int
    """`stable_id` of the picture's file."""
    image: torch.Tensor
    """(3, H, W) pixels, or (N, D) what a frozen encoder made of them, as in `Batch.seen`; float32."""
    text: str
    caption: str
    """What the text was made of."""
    prompt: str = ""
    """What a model reads before it says the text."""
    said: str = ""
    """What it says: the text, or an answer in its place."""
    cut: float = 0.0
    """Share of that which is given and isn't said either."""

    @property
    def ids(self) -> list[int]:
        """In the order of `vlm.data.batch.KINDS`."""
        return [stable_id(self.concept), caption_id(self.caption), caption_id(self.text), self.picture]


@dataclass(frozen=True)
class Unreadable:
    """In place of a batch without a readable picture; an exception would come wrapped in a worker's trace."""

    skipped: tuple[str, ...]


def collate(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    transform: ImageTransform,
    max_length: int,
    consumed: int,
    skipped: Sequence[str],
) -> Batch:
    """Rows as a batch, whose texts have `max_length` tokens at most; 0 for the tokenizer's own bound."""
    limit = min(max_length or tokenizer.max_length, tokenizer.max_length)
    images, seen, pixel_mask = [row.image for row in rows], None, None
    if images[0].dim() == 2:
        pixels, seen = torch.empty(len(rows), 3, 0, 0), torch.stack(images)
    else:
        # Ranks and micro-batches exchange pictures, so that all have a mask or none has.
        pixels, pixel_mask = pad_pictures(images, masked=transform.resize == "fit")
    tokens, given = tokenised(
        tokenizer, [(row.prompt, row.said or row.text, row.cut) for row in rows], max_length=limit
    )
    return Batch(
        pixels,
        tokens,
        torch.tensor([row.ids for row in rows], dtype=torch.int64),
        tuple(row.key for row in rows),
        consumed,
        tuple(skipped),
        pixel_mask=pixel_mask,
        given=given,
        seen=seen,
    )
