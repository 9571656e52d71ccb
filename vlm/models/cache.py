"""What attention keeps: projected keys and values, of the tokens so far and of the images looked at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class KeyValues(NamedTuple):
    """Projected keys and values, each (B, H, S, D / H)."""

    keys: Tensor
    values: Tensor


class KVCache:
    """Self-attention keys and values of the tokens seen so far, a pair for each layer that ran."""

    def __init__(self, capacity: int = 0) -> None:
        """capacity: tokens that room is made for at once; more of them make it grow by doubling."""
        self.layers: dict[int, KeyValues] = {}
        self.capacity = capacity
        self._rooms: dict[int, KeyValues] = {}

    @property
    def length(self) -> int:
        """Tokens held."""
        return next((kv.keys.shape[2] for kv in self.layers.values()), 0)

    def append(self, layer: int, new: KeyValues) -> KeyValues:
        """Join `new` to what layer number `layer` holds and return the whole."""
        old = self.layers.get(layer)
        if torch.is_grad_enabled() and new.keys.requires_grad:
            # Writing into what a graph holds would spoil its gradient.
            self.layers[layer] = new if old is None else _joined(old, new)
            return self.layers[layer]
        past, end = (0 if old is None else old.keys.shape[2]), new.keys.shape[2]
        end += past
        room = self._rooms.get(layer)
        if room is None or room.keys.shape[2] < end:
            size = max(self.capacity, end if old is None else 2 * end)
            room = self._rooms[layer] = KeyValues(*(_room(tensor, len(tensor), size) for tensor in new))
            if old is not None:
                _write(room, 0, old)
        _write(room, past, new)
        self.layers[layer] = KeyValues(*(tensor[:, :, :end] for tensor in room))
        return self.layers[layer]

    def reorder(self, rows: Tensor) -> None:
        """Keep the batch rows named in `rows` (B',), as beam search does after choosing its beams."""
        for layer, held in self.layers.items():
            batch, length = len(held.keys), held.keys.shape[2]
            if len(rows) == batch and torch.equal(rows, torch.arange(batch, device=rows.device)):
                return
            # Only what is filled is copied, and of one layer at a time.
            size = self._rooms[layer].keys.shape[2] if layer in self._rooms else length
            room = KeyValues(*(_room(tensor, len(rows), size) for tensor in held))
            _write(room, 0, KeyValues(held.keys[rows], held.values[rows]))
            self._rooms[layer] = room
            self.layers[layer] = KeyValues(*(tensor[:, :, :length] for tensor in room))


class DecoderState:
    """What a decoder's rows keep from token to token: their own past and the images that they look at.

    Rows of one image stand in a row and share its keys and values.
    """

    def __init__(
        self, image: Sequence[KeyValues | None] | None, *, image_mask: Tensor | None = None, capacity: int = 0
    ) -> None:
        """image: from `Transformer.image_states`. image_mask: (images, 1, 1, N). capacity: as for `KVCache`."""
        self.image = None if image is None else list(image)
        self.image_mask = image_mask
        self.cache = KVCache(capacity)

    def reorder(self, rows: Tensor, images: Tensor | None = None) -> None:
        """Keep the rows named in `rows` (B',) and the images named in `images`, in that order; None keeps all."""
        self.cache.reorder(rows)
        if images is None:
            return
        if self.image_mask is not None:
            self.image_mask = self.image_mask[images]
        for layer, held in enumerate(self.image or []):
            if held is not None:
                self.image[layer] = KeyValues(held.keys[images], held.values[images])  # type: ignore[index]


def _joined(old: KeyValues, new: KeyValues) -> KeyValues:
    return KeyValues(torch.cat([old.keys, new.keys], dim=2), torch.cat([old.values, new.values], dim=2))


def _room(like: Tensor, rows: int, size: int) -> Tensor:
    return like.new_empty(rows, like.shape[1], size, like.shape[3])


def _write(room: KeyValues, past: int, new: KeyValues) -> None:
    for place, tensor in zip(room, new, strict=True):
        place[:, :, past : past + tensor.shape[2]] = tensor
