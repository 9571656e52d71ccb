"""What travels from the data to the engine: padded tokens, and a batch of pictures with their texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tokens(Mapping[str, Tensor]):
    """Texts as padded ids; a mapping with the keys ``input_ids`` and ``attention_mask``.

    input_ids: (B, L) int64, padded on the right. attention_mask: (B, L) bool, True on real tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor

    def __getitem__(self, key: str) -> Tensor:
        if key == "input_ids":
            return self.input_ids
        if key == "attention_mask":
            return self.attention_mask
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(("input_ids", "attention_mask"))

    def __len__(self) -> int:
        """Two: the number of keys, as for any mapping; the number of texts is `rows`."""
        return 2

    @property
    def rows(self) -> int:
        """Number of texts B."""
        return self.input_ids.shape[0]

    def select(self, rows: slice | Tensor) -> Tokens:
        """The chosen rows, with the padding that none of them needs cut off."""
        return Tokens(self.input_ids[rows], self.attention_mask[rows]).trim()

    def trim(self) -> Tokens:
        """Cut the columns that are padding in every row."""
        if self.rows == 0:
            return self
        longest = int(self.attention_mask.sum(dim=1).max())
        if longest == self.input_ids.shape[1]:
            return self
        return Tokens(self.input_ids[:, :longest], self.attention_mask[:, :longest])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Tokens:
        """Copy to a device."""
        return Tokens(
            self.input_ids.to(device, non_blocking=non_blocking),
            self.attention_mask.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Tokens:
        """Copy to page-locked memory (called by torch's DataLoader)."""
        return Tokens(self.input_ids.pin_memory(), self.attention_mask.pin_memory())


KINDS = ("concept", "caption", "text", "picture")
"""What the ids of a row are hashes of: the concept, the caption that was drawn, the text made of it, and the file of
the picture. Rows that share one say or show the same."""
ROWS = ("pixel_mask", "given", "seen")
TENSORS = ("pixels", "tokens", "ids", "masked_ids", "labels", *ROWS)


@dataclass(frozen=True, eq=False)
class Batch:
    """Pictures with one text each: the rows that one rank takes in one step."""

    pixels: Tensor
    """(B, 3, H, W) float32, normalised by the model's own preprocessing; (B, 3, 0, 0) where `seen` is there."""

    tokens: Tokens
    """The texts, padded to the longest of the batch."""

    ids: Tensor
    """(B, len(KINDS)) int64: see `KINDS`; rows that share one are positives."""

    keys: tuple[str, ...]
    """Key of each row in its source, for messages."""

    consumed: int = 0
    """Samples of the epoch used up by all ranks once this batch is done (unreadable ones included):
    what `skip_samples` takes to go on after it."""

    skipped: tuple[str, ...] = ()
    """What was wrong with pictures that could not be decoded on the way."""

    masked_ids: Tensor | None = None
    """(B, L) the texts' ids with some hidden, for MLM; None where nothing is to be guessed."""

    labels: Tensor | None = None
    """(B, L) the ids that were hidden there, -100 elsewhere; goes with `masked_ids`."""

    pixel_mask: Tensor | None = None
    """(B, H, W) bool, true on pixels that aren't padding; None where all pictures fill theirs."""

    given: Tensor | None = None
    """(B,) int64 leading tokens of each text that are read and not said, such as a prompt's or a question's, the start
    token counted; None for it alone."""

    seen: Tensor | None = None
    """(B, N, D) what a frozen image encoder made of the pictures before; None where it is to look at `pixels`."""

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """Copy the tensors to a device."""
        return self._changed(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Copy to page-locked memory (called by torch's DataLoader)."""
        return self._changed(lambda part: part.pin_memory())

    def split(self, parts: int) -> list[Batch]:
        """Cut into `parts` consecutive batches of nearly equal size (fewer when there are fewer rows).

        Each part's text is trimmed to its own longest. Raises ValueError when `parts` is below 1.
        """
        if parts < 1:
            raise ValueError(f"parts must be at least 1, got {parts}")
        rows, out, start = len(self), [], 0
        parts = min(parts, rows) or 1
        for part in range(parts):
            stop = start + rows // parts + (part < rows % parts)
            out.append(self._rows(slice(start, stop)))
            start = stop
        return out

    def with_masks(self, masked_ids: Tensor, labels: Tensor) -> Batch:
        """The batch with hidden tokens, each (B, L)."""
        return replace(self, masked_ids=masked_ids, labels=labels)

    def _rows(self, cut: slice) -> Batch:
        tokens = self.tokens.select(cut)
        length = tokens.input_ids.shape[1]
        found: dict[str, Any] = {"tokens": tokens, "keys": self.keys[cut]}
        found |= {"pixels": self.pixels[cut], "ids": self.ids[cut]}
        if self.masked_ids is not None and self.labels is not None:
            found |= {"masked_ids": self.masked_ids[cut, :length], "labels": self.labels[cut, :length]}
        found |= {name: part[cut] for name in ROWS if (part := getattr(self, name)) is not None}
        return replace(self, **found)

    def _changed(self, change: Callable[[Any], Any]) -> Batch:
        parts = {name: getattr(self, name) for name in TENSORS}
        return replace(self, **{name: change(part) for name, part in parts.items() if part is not None})
