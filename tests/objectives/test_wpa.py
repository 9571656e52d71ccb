"""Word-patch alignment against an exact solver of optimal transport, and what padding may not change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, linprog
from torch import Tensor
from torch.nn.functional import pad

from vlm.objectives.wpa import cosine_cost, ipot, wpa


def states(rows: int, length: int, width: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(rows, length, width, generator=torch.Generator().manual_seed(seed))


def full(rows: int, length: int) -> Tensor:
    return torch.ones(rows, length, dtype=torch.bool)


def exact_distance(cost: np.ndarray) -> float:
    """Optimal transport between even weights, as a linear programme."""
    words, patches = cost.shape
    rows = np.kron(np.eye(words), np.ones(patches))
    columns = np.kron(np.ones(words), np.eye(patches))
    sums = np.concatenate([np.full(words, 1 / words), np.full(patches, 1 / patches)])
    solved = linprog(cost.ravel(), A_eq=np.concatenate([rows, columns]), b_eq=sums, bounds=(0, None))
    assert solved.success
    return float(solved.fun)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 10_000))
def test_many_steps_reach_the_exact_distance(words: int, patches: int, seed: int) -> None:
    cost = cosine_cost(states(1, words, seed=seed), states(1, patches, seed=seed + 1))
    plan = ipot(cost, full(1, words), full(1, patches), iterations=2000)
    assert float((plan * cost).sum()) == pytest.approx(exact_distance(cost[0].double().numpy()), abs=2e-3)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 10_000))
def test_fifty_steps_come_near(words: int, patches: int, seed: int) -> None:
    """ViLT's own number of steps: close to the exact distance, far nearer than the even plan."""
    word_states, patch_states = states(1, words, seed=seed), states(1, patches, seed=seed + 1)
    cost = cosine_cost(word_states, patch_states)
    exact = exact_distance(cost[0].double().numpy())
    found = wpa(word_states, patch_states, full(1, words), full(1, patches)).item()
    assert abs(found - exact) <= 0.25 * (cost.mean().item() - exact) + 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_equal_numbers_give_an_assignment(seed: int) -> None:
    cost = cosine_cost(states(1, 5, seed=seed), states(1, 5, seed=seed + 50))
    plan = ipot(cost, full(1, 5), full(1, 5), iterations=3000)[0]
    rows, columns = linear_sum_assignment(cost[0].numpy())
    assert plan.argmax(dim=1).tolist() == columns.tolist()
    torch.testing.assert_close(plan[rows, columns], torch.full((5,), 0.2), rtol=0, atol=0.02)


def test_a_planted_alignment_is_found() -> None:
    patches = states(1, 9, 32)
    chosen = [7, 2, 5]
    words = patches[:, chosen] + 0.1 * states(1, 3, 32, seed=9)
    plan = ipot(cosine_cost(words, patches), full(1, 3), full(1, 9))
    # A word has the mass of three patches, so its own patch is filled by it alone.
    assert (plan[0, range(3), chosen] > 0.99 / 9).all()
    near = wpa(words, patches, full(1, 3), full(1, 9))
    assert near < wpa(states(1, 3, 32, seed=4), patches, full(1, 3), full(1, 9)) - 0.1


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States with random masks; a row may have no word at all."""
    rows, words, patches = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(1, 7))
    seed = draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    word_mask = torch.rand(rows, words, generator=generator) < draw(st.sampled_from([0.4, 1.0]))
    patch_mask = torch.rand(rows, patches, generator=generator) < draw(st.sampled_from([0.5, 1.0]))
    return states(rows, words, seed=seed), states(rows, patches, seed=seed + 1), word_mask, patch_mask


@settings(max_examples=60, deadline=None)
@given(batches())
def test_marginals(batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    words, patches, word_mask, patch_mask = batch
    plan = ipot(cosine_cost(words, patches), word_mask, patch_mask, iterations=500)
    assert plan.isfinite().all() and (plan >= 0).all()
    pairs = word_mask[:, :, None] & patch_mask[:, None, :]
    assert (plan[~pairs] == 0).all()
    both = (word_mask.any(dim=1) & patch_mask.any(dim=1)).float()[:, None]
    of_words = word_mask / word_mask.sum(dim=1, keepdim=True).clamp(min=1) * both
    of_patches = patch_mask / patch_mask.sum(dim=1, keepdim=True).clamp(min=1) * both
    torch.testing.assert_close(plan.sum(dim=2), of_words, rtol=0, atol=1e-5)
    torch.testing.assert_close(plan.sum(dim=1), of_patches, rtol=0, atol=1e-2)


@settings(max_examples=60, deadline=None)
@given(batches(), st.integers(0, 3), st.integers(0, 3))
def test_padding_changes_nothing(batch: tuple[Tensor, Tensor, Tensor, Tensor], more: int, further: int) -> None:
    """Neither what stands in left-out places nor how many there are."""
    words, patches, word_mask, patch_mask = batch
    plain = ipot(cosine_cost(words, patches), word_mask, patch_mask)
    cut = words.shape[1], patches.shape[1]
    words = torch.where(word_mask[:, :, None], words, 77.0)
    patches = torch.where(patch_mask[:, :, None], patches, -33.0)
    words, word_mask = pad(words, (0, 0, 0, more), value=5.0), pad(word_mask, (0, more))
    patches, patch_mask = pad(patches, (0, 0, 0, further), value=5.0), pad(patch_mask, (0, further))
    padded = ipot(cosine_cost(words, patches), word_mask, patch_mask)
    torch.testing.assert_close(padded[:, : cut[0], : cut[1]], plain, rtol=1e-5, atol=1e-6)
    assert padded.sum() == pytest.approx(plain.sum().item(), abs=1e-5)


def test_rows_are_summed_with_their_weights() -> None:
    words, patches, masks = states(3, 4), states(3, 5, seed=1), (full(3, 4), full(3, 5))
    single = [wpa(words[i : i + 1], patches[i : i + 1], full(1, 4), full(1, 5)).item() for i in range(3)]
    assert wpa(words, patches, *masks).item() == pytest.approx(sum(single), rel=1e-5)
    signed = wpa(words, patches, *masks, weights=torch.tensor([1.0, -1.0, 0.0]))
    assert signed.item() == pytest.approx(single[0] - single[1], rel=1e-4)


def test_the_gradient_goes_through_the_cost_alone() -> None:
    words, patches = states(2, 4).requires_grad_(), states(2, 5, seed=1).requires_grad_()
    masks = full(2, 4), full(2, 5)
    plan = ipot(cosine_cost(words, patches), *masks)
    assert not plan.requires_grad
    expected = torch.autograd.grad((plan * cosine_cost(words, patches)).sum(), (words, patches))
    found = torch.autograd.grad(wpa(words, patches, *masks), (words, patches))
    torch.testing.assert_close(found, expected)
    assert all(slope.abs().max() > 1e-3 for slope in found)


def test_left_out_places_get_no_gradient() -> None:
    words, patches = states(1, 4).requires_grad_(), states(1, 5, seed=1).requires_grad_()
    word_mask, patch_mask = torch.tensor([[0, 1, 1, 0]]).bool(), torch.tensor([[0, 1, 1, 1, 0]]).bool()
    slopes = torch.autograd.grad(wpa(words, patches, word_mask, patch_mask), (words, patches))
    for slope, mask in zip(slopes, (word_mask, patch_mask), strict=True):
        assert (slope[~mask] == 0).all() and (slope[mask].abs().amax(dim=-1) > 0).all()


def test_full_precision_under_autocast() -> None:
    words, patches, masks = states(2, 6, 64), states(2, 9, 64, seed=1), (full(2, 6), full(2, 9))
    plain = wpa(words, patches, *masks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ipot(cosine_cost(words, patches), *masks).dtype == torch.float32
        assert torch.equal(wpa(words, patches, *masks), plain)
    assert wpa(words.bfloat16(), patches.bfloat16(), *masks).dtype == torch.float32


def test_zero_states_stay_finite() -> None:
    words = torch.zeros(1, 3, 6, requires_grad=True)
    loss = wpa(words, states(1, 4), full(1, 3), full(1, 4))
    loss.backward()
    assert loss.isfinite() and words.grad is not None and words.grad.isfinite().all()
