"""Language modelling: which tokens are to be said, and the smoothed loss, by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.objectives.lm import lm, next_tokens, with_prompt
from vlm.objectives.mlm import IGNORED

IDS = torch.tensor([[1, 11, 12, 13, 2], [1, 14, 2, 0, 0]])
MASK = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])


def test_each_token_is_followed_by_the_next_and_padding_by_nothing() -> None:
    expected = [[11, 12, 13, 2], [14, 2, IGNORED, IGNORED]]
    assert next_tokens(IDS, MASK).tolist() == expected
    assert next_tokens(IDS, MASK.long()).tolist() == expected
    assert IDS[0, 0] == 1  # the ids themselves stay


def test_a_prompt_is_given_and_not_to_be_said() -> None:
    assert next_tokens(IDS, MASK, given=3).tolist() == [[IGNORED, IGNORED, 13, 2], [IGNORED] * 4]


def test_a_prompt_stands_behind_the_start_token() -> None:
    ids, mask = with_prompt(IDS, MASK, (7, 8))
    assert ids.tolist() == [[1, 7, 8, 11, 12, 13, 2], [1, 7, 8, 14, 2, 0, 0]]
    assert mask.sum(dim=1).tolist() == [7, 5] and mask[1].tolist() == [True] * 5 + [False] * 2
    ids, mask = with_prompt(IDS, MASK.long(), ())
    assert torch.equal(ids, IDS) and torch.equal(mask, MASK)


def test_smoothed_loss_by_hand() -> None:
    """Probabilities 1/2, 1/4, 1/4: the label has 0.9 of the target and a third of the other 0.1."""
    logits = torch.tensor([[2.0, 1.0, 1.0]]).log()
    share = 0.1 / 3
    expected = (0.9 + share) * math.log(2) + 2 * share * math.log(4)
    assert lm(logits, torch.tensor([0])).item() == pytest.approx(expected, rel=1e-6)
    assert lm(logits, torch.tensor([0]), smoothing=0.0).item() == pytest.approx(math.log(2), rel=1e-6)
    assert lm(logits, torch.tensor([IGNORED])).item() == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(2, 9), st.floats(0, 0.5), st.integers(0, 10_000))
def test_sum_over_count_is_torchs_mean(rows: int, vocabulary: int, smoothing: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=generator)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[1:][torch.rand(rows - 1, generator=generator) < 0.4] = IGNORED
    mean = F.cross_entropy(logits, labels, ignore_index=IGNORED, label_smoothing=smoothing)
    torch.testing.assert_close(lm(logits, labels, smoothing=smoothing).sum() / (labels != IGNORED).sum(), mean)


def test_half_precision_logits_are_taken_in_full() -> None:
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.tensor([0, 3, 7, 29])
    assert lm(logits, labels).dtype == torch.float32
    torch.testing.assert_close(lm(logits, labels), lm(logits.float(), labels))
