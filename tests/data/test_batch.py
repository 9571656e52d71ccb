"""Batches: splitting, trimming, mapping."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlm.data.batch import Batch, Tokens


def make_batch(lengths, width=9):
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    ids = torch.randint(1, 99, mask.shape) * mask
    rows = len(lengths)
    return Batch(
        pixels=torch.randn(rows, 3, 4, 4),
        tokens=Tokens(ids, mask),
        ids=torch.arange(rows * 2).reshape(rows, 2),
        keys=tuple(f"k{row}" for row in range(rows)),
        consumed=70,
    )


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 15))
def test_split_keeps_every_row_in_order(lengths, parts):
    batch = make_batch(lengths)
    pieces = batch.split(parts)
    sizes = [len(piece) for piece in pieces]
    assert len(pieces) == min(parts, len(lengths)) and max(sizes) - min(sizes) <= 1
    assert sum((piece.keys for piece in pieces), ()) == batch.keys
    assert torch.equal(torch.cat([piece.pixels for piece in pieces]), batch.pixels)
    assert torch.equal(torch.cat([piece.ids for piece in pieces]), batch.ids)
    start = 0
    for piece in pieces:
        longest = max(lengths[start : start + len(piece)])
        assert piece.tokens.input_ids.shape == (len(piece), longest) == piece.tokens.attention_mask.shape
        assert torch.equal(piece.tokens.input_ids, batch.tokens.input_ids[start : start + len(piece), :longest])
        assert piece.consumed == 70
        start += len(piece)


def test_split_refuses_no_parts():
    with pytest.raises(ValueError, match="at least 1"):
        make_batch([3]).split(0)


def test_tokens_are_a_mapping():
    tokens = make_batch([3, 5]).tokens
    assert set(tokens) == set(dict(**tokens)) == {"input_ids", "attention_mask"}
    assert tokens["input_ids"] is tokens.input_ids and tokens.rows == 2
    with pytest.raises(KeyError):
        tokens["token_type_ids"]


def test_trim_and_select():
    tokens = make_batch([2, 5, 4]).tokens
    assert tokens.trim().input_ids.shape == (3, 5)
    assert tokens.select(torch.tensor([0, 2])).input_ids.shape == (2, 4)
    assert tokens.select(torch.tensor([], dtype=torch.long)).rows == 0


def test_to_moves_every_tensor_and_batches_are_frozen():
    batch = make_batch([2, 3])
    moved = batch.to("meta")
    tensors = [moved.pixels, moved.ids, moved.tokens.input_ids, moved.tokens.attention_mask]
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert moved.keys == batch.keys and moved.consumed == 70
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.keys = ()
