"""Masking of tokens, checked by counting, and the loss of guessing them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlm.objectives.mlm import IGNORED, Masked, mask_tokens, mlm

PAD, START, END, MASK, VOCAB = 0, 1, 2, 3, 1000
SIGMAS = 4.5  # a right share fails less than once in 100,000 seeds


def texts(rows: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Ids with start, end and padding; which of them may be masked; where words begin."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, VOCAB, (rows, length), generator=generator)
    ends = torch.randint(min(2, length - 1), length, (rows, 1), generator=generator)
    place = torch.arange(length)[None]
    ids = torch.where(place == ends, END, torch.where(place > ends, PAD, ids))
    ids[:, 0] = START
    starts = (torch.rand(rows, length, generator=generator) < 0.6) | (place <= 1) | (place >= ends)
    return ids, (place > 0) & (place < ends), starts


def masked(ids: Tensor, maskable: Tensor, seed: int = 1, **options: object) -> Masked:
    draws = torch.rand(*ids.shape, 3, generator=torch.Generator().manual_seed(seed))
    return mask_tokens(ids, maskable, draws=draws, mask_id=MASK, vocab_size=VOCAB, **options)  # type: ignore[arg-type]


def near(found: int, total: int, share: float) -> bool:
    return abs(found - total * share) < SIGMAS * math.sqrt(total * share * (1 - share))


def test_fifteen_in_a_hundred_and_of_these_eighty_ten_ten() -> None:
    ids, maskable, _ = texts(4000, 30)
    hidden, labels = masked(ids, maskable)
    chosen = labels != IGNORED
    count = int(chosen.sum())
    assert near(count, int(maskable.sum()), 0.15)
    now, was = hidden[chosen], labels[chosen]
    # Another token is by chance the old one, or [MASK], once in a thousand times each.
    assert near(int((now == MASK).sum()), count, 0.8 + 0.1 / VOCAB)
    assert near(int((now == was).sum()), count, 0.1 + 0.1 / VOCAB)
    others = now[(now != MASK) & (now != was)]
    assert near(len(others), count, 0.1 - 0.2 / VOCAB)
    assert others.float().mean().item() == pytest.approx(
        (VOCAB - 1) / 2, abs=SIGMAS * VOCAB / math.sqrt(12 * len(others))
    )
    assert int(others.min()) < 10 and int(others.max()) > VOCAB - 10 and int(others.max()) < VOCAB


def test_whole_words_keep_the_shares() -> None:
    ids, maskable, starts = texts(6000, 30)
    _, labels = masked(ids, maskable, starts=starts)
    words = starts & maskable
    assert near(int(((labels != IGNORED) & words).sum()), int(words.sum()), 0.15)
    hidden, chosen = masked(ids, maskable, starts=starts)[0], labels != IGNORED
    assert near(int((hidden[chosen] == MASK).sum()), int(chosen.sum()), 0.8 + 0.1 / VOCAB)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.integers(2, 20), st.integers(0, 10_000), st.sampled_from([0.0, 0.15, 0.5, 1.0]))
def test_a_word_is_never_split(rows: int, length: int, seed: int, share: float) -> None:
    ids, maskable, starts = texts(rows, length, seed)
    chosen = masked(ids, maskable, seed, starts=starts, share=share).labels != IGNORED
    for row in range(rows):
        for place in range(1, length):
            if maskable[row, place] and maskable[row, place - 1] and not starts[row, place]:
                assert chosen[row, place] == chosen[row, place - 1]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.integers(2, 20), st.integers(0, 10_000), st.sampled_from([0.15, 1.0]), st.booleans())
def test_specials_and_padding_stay_and_labels_are_what_was_there(
    rows: int, length: int, seed: int, share: float, whole: bool
) -> None:
    ids, maskable, starts = texts(rows, length, seed)
    before = ids.clone()
    hidden, labels = masked(ids, maskable, seed, share=share, starts=starts if whole else None)
    assert torch.equal(ids, before)
    assert torch.equal(hidden[~maskable], ids[~maskable])
    assert (labels[~maskable] == IGNORED).all()
    chosen = labels != IGNORED
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(hidden[~chosen], ids[~chosen])
    if share == 1.0:
        assert torch.equal(chosen, maskable)


def test_words_and_tokens_are_chosen_apart() -> None:
    """Tokens of one word share a fate only where words are asked for."""
    ids, maskable, starts = texts(2000, 20)
    inner = maskable & ~starts
    inner[:, 1:] &= maskable[:, :-1]
    alone = masked(ids, maskable).labels != IGNORED
    apart = alone[:, 1:] != alone[:, :-1]
    assert near(int((apart & inner[:, 1:]).sum()), int(inner.sum()), 2 * 0.15 * 0.85)


def test_the_ends_of_the_draws() -> None:
    ids = torch.tensor([[START, 500, END]])
    maskable = torch.tensor([[False, True, False]])
    draws = torch.zeros(1, 3, 3)
    draws[0, 1] = torch.tensor([0.0, 0.85, 1.0])  # a rounded 1 must not give an id outside
    hidden, labels = mask_tokens(ids, maskable, draws=draws, mask_id=MASK, vocab_size=VOCAB)
    assert hidden.tolist() == [[START, VOCAB - 1, END]]
    assert labels.tolist() == [[IGNORED, 500, IGNORED]]
    draws[0, 1, 0] = 0.15
    assert mask_tokens(ids, maskable, draws=draws, mask_id=MASK, vocab_size=VOCAB).labels.max() == IGNORED


def test_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(2.0), math.log(5.0)], [math.log(6.0), 0.0, 0.0]])
    expected = -math.log(5 / 8) - math.log(1 / 8)
    assert mlm(logits, torch.tensor([2, 1])).item() == pytest.approx(expected, abs=1e-6)


def test_soft_targets_by_hand() -> None:
    """ALBEF eq. 7: (1 - alpha) one-hot + alpha teacher."""
    generator = torch.Generator().manual_seed(0)
    logits, soft = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    labels, alpha = torch.tensor([0, 3, 6, 3, 1]), 0.4
    target = (1 - alpha) * torch.nn.functional.one_hot(labels, 7) + alpha * soft.softmax(dim=1)
    expected = -(target * logits.log_softmax(dim=1)).sum()
    assert mlm(logits, labels, soft=soft, alpha=alpha).item() == pytest.approx(expected.item(), rel=1e-6)
    plain = mlm(logits, labels)
    assert torch.equal(mlm(logits, labels, soft=soft, alpha=0.0), plain)
    assert mlm(logits, labels, soft=soft, alpha=alpha) != plain


def test_gradient_vanishes_at_the_target() -> None:
    soft = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    logits = soft.clone().requires_grad_()
    (slope,) = torch.autograd.grad(mlm(logits, torch.tensor([0, 1, 2]), soft=soft, alpha=1.0), logits)
    assert slope.abs().max() < 1e-6
    (slope,) = torch.autograd.grad(mlm(logits, torch.tensor([0, 1, 2])), logits)
    assert (slope.diag() < 0).all() and slope.abs().max() > 0.1


def test_no_masked_tokens() -> None:
    logits = torch.zeros(0, 9, requires_grad=True)
    loss = mlm(logits, torch.zeros(0, dtype=torch.long), soft=torch.zeros(0, 9), alpha=0.4)
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None
