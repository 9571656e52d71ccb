"""The cache: room made once, rows reordered, images kept apart from rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlm.models.cache import DecoderState, KeyValues, KVCache


def pair(rows: int, length: int) -> KeyValues:
    return KeyValues(torch.randn(rows, 2, length, 4), torch.randn(rows, 2, length, 4))


def same(found: KeyValues, keys: list[Tensor], values: list[Tensor]) -> None:
    assert torch.equal(found.keys, torch.cat(keys, dim=2))
    assert torch.equal(found.values, torch.cat(values, dim=2))


@pytest.mark.parametrize("capacity", [0, 3, 12])
def test_tokens_are_joined_with_and_without_room(capacity: int) -> None:
    cache, parts = KVCache(capacity), [pair(3, length) for length in (2, 1, 4, 1)]
    places = []
    for number, part in enumerate(parts, 1):
        for layer in (0, 5):
            found = cache.append(layer, part)
            same(found, [p.keys for p in parts[:number]], [p.values for p in parts[:number]])
        places.append(cache.layers[5].keys.data_ptr())
    assert cache.length == 8
    assert (len(set(places)) == 1) == (capacity == 12)


def test_rows_are_reordered_repeated_and_dropped() -> None:
    cache, first, second, third = KVCache(6), pair(3, 2), pair(6, 1), pair(2, 1)
    cache.append(0, first)
    rows = torch.tensor([0, 0, 1, 1, 2, 2])
    cache.reorder(rows)
    cache.append(0, second)
    left = torch.tensor([5, 1])
    cache.reorder(left)
    found = cache.append(0, third)
    same(found, *([first[i][rows][left], second[i][left], third[i]] for i in (0, 1)))


def test_rows_in_place_are_not_copied() -> None:
    cache = KVCache(6)
    cache.append(0, pair(3, 2))
    place = cache.layers[0].keys.data_ptr()
    cache.reorder(torch.arange(3))
    assert cache.layers[0].keys.data_ptr() == place
    cache.reorder(torch.arange(2))
    assert len(cache.layers[0].keys) == 2


def test_gradients_pass_through() -> None:
    cache, leaf = KVCache(8), torch.randn(1, 2, 3, 4, requires_grad=True)
    cache.append(0, KeyValues(leaf * 2, leaf * 3))
    found = cache.append(0, KeyValues(leaf, leaf))
    (found.keys.square().sum() + found.values.square().sum()).backward()
    torch.testing.assert_close(leaf.grad, 2 * leaf.detach() * (4 + 9 + 1 + 1))


def test_the_state_keeps_images_apart_from_rows() -> None:
    image, mask = [pair(3, 5), None], torch.rand(3, 1, 1, 5) > 0.5
    state = DecoderState(image, image_mask=mask)
    rows = pair(3, 2)
    state.cache.append(0, rows)
    state.reorder(torch.tensor([0, 0, 1, 1, 2, 2]))
    assert state.image[0] is image[0]
    state.reorder(torch.tensor([5, 4, 0, 1]), torch.tensor([2, 0]))
    assert torch.equal(state.cache.layers[0].keys, rows.keys[[2, 2, 0, 0]])
    assert torch.equal(state.image[0].values, image[0].values[[2, 0]]) and state.image[1] is None
    assert torch.equal(state.image_mask, mask[[2, 0]])
    assert len(image[0].keys) == 3, "the caller's own stay"
