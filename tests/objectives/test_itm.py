"""Negatives for matching, and the matching loss: what is drawn, how often, and what it adds up to."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlm.objectives.itc import positives
from vlm.objectives.itm import draw_negatives, itm


def uniform(rows: int, seed: int = 0) -> Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(seed))


@st.composite
def tables(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of any size, zeros among them; some positives; draws with the ends of [0, 1)."""
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    weights = torch.rand(rows, columns, generator=generator) * draw(st.sampled_from([1.0, 1e-30, 1e30]))
    weights = weights * (torch.rand(rows, columns, generator=generator) < draw(st.sampled_from([0.3, 1.0])))
    positive = torch.rand(rows, columns, generator=generator) < draw(st.sampled_from([0.2, 0.7, 1.0]))
    last = math.nextafter(1.0, 0.0)
    draws = draw(st.lists(st.sampled_from([0.0, 0.5, 0.999999, last]), min_size=rows, max_size=rows))
    return weights, positive, torch.tensor(draws, dtype=torch.float64)


@settings(max_examples=300, deadline=None)
@given(tables())
def test_a_positive_is_never_drawn_and_a_negative_always_is(table: tuple[Tensor, Tensor, Tensor]) -> None:
    weights, positive, draws = table
    chosen = draw_negatives(weights, positive, draws)
    assert chosen.shape == draws.shape
    for row, column in enumerate(chosen.tolist()):
        if positive[row].all():
            assert column == -1
            continue
        assert 0 <= column < positive.shape[1] and not positive[row, column]
        if weights[row][~positive[row]].sum() > 0:
            assert weights[row, column] > 0


def test_rows_that_share_a_concept_or_a_caption_are_no_negatives() -> None:
    ids = torch.tensor([[1, 10], [1, 11], [2, 11], [3, 12]])
    positive = positives(ids, ids)
    many = positive.repeat(500, 1)
    drawn = draw_negatives(torch.ones(many.shape), many, uniform(len(many)))
    seen = [set(drawn[row::4].tolist()) for row in range(4)]
    assert seen == [{2, 3}, {3}, {0, 3}, {0, 1, 2}]


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e20])
def test_shares_are_those_of_the_weights(scale: float) -> None:
    """Chi-square over 40,000 draws; the row's sum plays no part, however small the negatives' share is."""
    weights = torch.tensor([0.5, 0.1, 0.0, 0.25, 0.05, 0.1]) * scale
    positive = torch.tensor([True, False, False, False, False, False])
    count = 40_000
    drawn = draw_negatives(weights.expand(count, 6), positive.expand(count, 6), uniform(count, 3))
    found = torch.bincount(drawn, minlength=6).double()
    assert found[0] == 0 and found[2] == 0
    expected = torch.tensor([0.2, 0.5, 0.1, 0.2], dtype=torch.float64) * count
    chi = ((found[[1, 3, 4, 5]] - expected) ** 2 / expected).sum()
    assert chi < 16.3  # 0.1 % level, 3 degrees of freedom


def test_a_softmax_that_underflows_draws_evenly() -> None:
    logits = torch.full((30_000, 4), -1000.0)
    logits[:, 1] = 1000.0
    positive = torch.tensor([False, True, False, False]).expand(30_000, 4)
    found = torch.bincount(draw_negatives(logits.softmax(dim=1), positive, uniform(30_000)), minlength=4)
    assert found[1] == 0
    assert ((found[[0, 2, 3]] - 10_000).abs() < 400).all()


def test_half_precision_weights() -> None:
    weights = torch.tensor([[0.0, 6e-8, 1.0, 0.0]], dtype=torch.float16)
    positive = torch.tensor([[False, False, True, False]])
    assert draw_negatives(weights, positive, torch.tensor([0.7])).tolist() == [1]


def test_a_draw_is_that_rows_alone() -> None:
    """What stands beside a row doesn't change what it draws, so ranks and micro-batches draw alike."""
    weights, draws = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)), uniform(5)
    positive = torch.eye(5, 7, dtype=torch.bool)
    whole = draw_negatives(weights, positive, draws)
    alone = [draw_negatives(weights[i : i + 1], positive[i : i + 1], draws[i : i + 1]) for i in range(5)]
    assert torch.equal(whole, torch.cat(alone))


def test_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, math.log(3.0)], [2.0, 2.0]])
    matched = torch.tensor([True, False, True])
    expected = [-math.log(0.75), -math.log(0.25), -math.log(0.5)]
    assert itm(logits, matched).item() == pytest.approx(sum(expected), abs=1e-6)
    weighted = itm(logits, matched, torch.tensor([1.0, 0.0, 2.0]))
    assert weighted.item() == pytest.approx(expected[0] + 2 * expected[2], abs=1e-6)


def test_gradient_raises_the_right_logit_and_spares_left_out_pairs() -> None:
    logits = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    matched = torch.tensor([True, False, True, False])
    (slope,) = torch.autograd.grad(itm(logits, matched, torch.tensor([1.0, 1.0, 0.0, 1.0])), logits)
    assert slope[0, 1] < 0 < slope[0, 0]
    assert slope[1, 0] < 0 < slope[1, 1]
    assert (slope[2] == 0).all()


def test_no_pairs_and_half_precision() -> None:
    none = torch.zeros(0, 2, requires_grad=True)
    loss = itm(none, torch.zeros(0, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    half = itm(torch.tensor([[40000.0, -40000.0]], dtype=torch.float16), torch.tensor([True]))
    assert half.dtype == torch.float32 and half.item() == pytest.approx(80000, rel=1e-3)


def test_sums_of_parts_are_the_sum() -> None:
    logits = torch.randn(6, 2, generator=torch.Generator().manual_seed(2))
    matched = torch.tensor([True, False, False, True, True, False])
    parts = itm(logits[:2], matched[:2]) + itm(logits[2:], matched[2:])
    torch.testing.assert_close(parts, itm(logits, matched))
