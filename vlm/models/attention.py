"""Attention over padded rows, and the rows without their padding."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.models.cache import KeyValues

_WORTH = 0.9
"""Share of real tokens up to which leaving padding out saves more than moving rows costs."""


class Real(NamedTuple):
    """Which of (B, L) places hold real tokens, so that linear layers run on these alone."""

    places: Tensor
    """(M,) places in the flattened (B L)."""
    batch: int
    length: int

    def pack(self, x: Tensor) -> Tensor:
        """(B, L, D) without its padding, as (M, D)."""
        return x.flatten(0, 1)[self.places]

    def pad(self, x: Tensor) -> Tensor:
        """(M, D) back in place, as (B, L, D); padding is zero."""
        room = x.new_zeros(self.batch * self.length, x.shape[1])
        return room.index_copy(0, self.places, x).unflatten(0, (self.batch, self.length))


def real_tokens(key_mask: Tensor) -> Real | None:
    """The real tokens of a (B, L) mask where leaving out the rest is worth it, else None.

    It is on a CPU, where a product's time goes with its rows: captions of one batch are of uneven length. On a GPU to
    ask how many there are would make the host wait, and a compiled or exported graph has fixed shapes.
    """
    if key_mask.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    index = key_mask.flatten().nonzero().squeeze(1)
    batch, length = key_mask.shape
    return Real(index, batch, length) if len(index) <= _WORTH * batch * length else None


def attention_mask(
    key_mask: Tensor | None, *, length: int, past: int, causal: bool, device: torch.device
) -> Tensor | None:
    """The boolean mask of a self-attention, true where a query may look.

    Args:
        key_mask: (B, past + length) true for real tokens, or None when none is padding.
        length: new tokens, the queries.
        past: tokens already in the cache, which every query may see. SDPA's own `is_causal` is aligned to
            the top left, so it would hide them.
        causal: whether a query sees only what stands before it.
        device: where the mask is built.

    Returns:
        (B or 1, 1, length, past + length), or None when everything is seen.
    """
    mask = None if key_mask is None else key_mask[:, None, None, :].bool()  # (B, 1, 1, S)
    if causal and length > 1:
        order = torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)  # (L, S)
        mask = order[None, None] if mask is None else mask & order
    return mask


class Attention(nn.Module):
    """Multi-head attention; keys and values come from the queries' own place (self) or another (cross)."""

    def __init__(
        self, width: int, heads: int, *, source_width: int = 0, dropout: float = 0.0, projects: bool = True
    ) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(source_width or width, 2 * width) if projects else None
        self.out = nn.Linear(width, width)

    def keys_values(self, states: Tensor, real: Real | None = None) -> KeyValues:
        """Project what is looked at, (B, S, D), once; every query that meets it can share the result.

        real: the states are these tokens' alone, (M, D); padding has zeros for keys and values.
        """
        both = cast(nn.Linear, self.kv)(states)
        both = both if real is None else real.pad(both)  # (B, S, 2 D)
        keys, values = both.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, S, D / H)
        return KeyValues(keys, values)

    def forward(self, x: Tensor, source: KeyValues, mask: Tensor | None = None, *, real: Real | None = None) -> Tensor:
        """Look from `x` at `source`.

        Args:
            x: (B, L, D); or (M, D) of the tokens in `real`.
            source: of B rows, or of fewer that divide B: then each serves several rows of `x` that stand in a row.
            mask: boolean, broadcast to (B, H, L, S), or with B and L of the source's rows.
            real: the tokens of `x`, where padding was left out.

        Returns:
            As `x`.

        Raises:
            ValueError: the rows of `source` don't divide those of `x`.
        """
        query = self.q(x) if real is None else real.pad(self.q(x))  # (B, L, D)
        batch, length, _ = query.shape
        sources = len(source.keys)
        if batch % sources:
            raise ValueError(f"{batch} texts can't share {sources} images evenly; repeat texts or images")
        # Several texts (beams, candidates) of one image stand in a row: they become more queries of the same
        # keys and values, so that these are never copied.
        query = query.reshape(sources, batch // sources * length, self.heads, -1).transpose(1, 2)
        drop = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, *source, attn_mask=mask, dropout_p=drop)
        mixed = mixed.transpose(1, 2).reshape(batch, length, -1)
        return self.out(mixed if real is None else real.pack(mixed))
