"""Texts beside images: which pairs count, and what shares an image."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.models.small_albef import batch
from vlm.models.pairing import guess_sums, masked, match_sums, side_by_side, take_images
from vlm.models.transformer import KeyValues


def test_matching_by_hand() -> None:
    """Logits (0, x) cost ln(1 + e^-x) where matched and ln(1 + e^x) where not; each pair has its own x."""
    x = torch.tensor([[1.0, 2.0, -1.0], [3.0, 5.0, -2.0], [-4.0, 6.0, 7.0]])
    logits = torch.stack([torch.zeros(3, 3), x], dim=-1)
    partners = {"text": torch.tensor([0, -1, 2]), "image": torch.tensor([-1, -1, 0])}
    sums = match_sums(logits, partners)
    own = sum(math.log1p(math.exp(-value)) for value in (1.0, 2.0, -1.0))
    other = sum(math.log1p(math.exp(value)) for value in (3.0, -2.0, 7.0))  # texts of rows 0 and 2, image of row 2
    assert sums["itm"].item() == pytest.approx(own + other, rel=1e-6)
    assert sums["itm_accuracy"].item() == 3  # rows 0 and 1 matched, the text of row 2 told from its own


def test_guesses_by_hand() -> None:
    logits, truth = torch.tensor([[0.0, math.log(3.0)], [math.log(3.0), 0.0]]), torch.tensor([1, 1])
    sums = guess_sums(logits, truth, soft=None, alpha=0.4)
    assert sums["mlm"].item() == pytest.approx(-math.log(0.75) - math.log(0.25), rel=1e-6)
    assert sums["mlm_accuracy"].item() == 1
    taught = guess_sums(logits, truth, soft=torch.zeros(2, 2), alpha=0.5)
    even = -(math.log(0.75) + math.log(0.25)) / 2
    assert taught["mlm"].item() == pytest.approx(0.5 * sums["mlm"].item() + 0.5 * 2 * even, rel=1e-6)


def test_texts_of_a_row_follow_each_other() -> None:
    one, two = torch.arange(12.0).reshape(2, 3, 2), -torch.arange(8.0).reshape(2, 2, 2)
    masks = torch.ones(2, 3, dtype=torch.bool), torch.tensor([[True, False], [True, True]])
    states, mask = side_by_side([(one, masks[0]), (two, masks[1])])
    assert states.shape == (4, 3, 2)
    assert torch.equal(states[0::2], one) and torch.equal(states[1::2, :2], two) and not states[1::2, 2].any()
    assert mask.tolist() == [[True] * 3, [True, False, False], [True] * 3, [True, True, False]]


def test_images_are_taken_layer_by_layer() -> None:
    kv = KeyValues(torch.arange(3.0).reshape(3, 1, 1, 1), 10 + torch.arange(3.0).reshape(3, 1, 1, 1))
    plain, crossed = take_images([None, kv], torch.tensor([2, 0, 0]))
    assert plain is None and crossed is not None
    assert crossed.keys.flatten().tolist() == [2, 0, 0] and crossed.values.flatten().tolist() == [12, 10, 10]


def test_a_batch_without_hidden_tokens_is_named() -> None:
    with pytest.raises(ValueError, match="masked_ids and labels; let the loader mask tokens"):
        masked(replace(batch(2), labels=None))
