"""Losses of fine-tuned heads, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from vlm.objectives.downstream import classes, ranking, soft_answers


def test_soft_answers() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, -math.log(3.0)]])
    scores = torch.tensor([[1.0, 0.0], [0.6, 0.0]])
    expected = -math.log(0.75) - math.log(0.5) - math.log(0.5) - math.log(0.75)
    assert soft_answers(logits, scores).item() == pytest.approx(expected, abs=1e-6)


def test_soft_answers_pull_to_their_scores() -> None:
    scores = torch.tensor([[0.3, 0.9, 0.5]])
    logits = torch.logit(scores).requires_grad_()
    soft_answers(logits, scores).backward()
    assert logits.grad is not None and logits.grad.abs().max() < 1e-6


@pytest.mark.parametrize("loss", [classes, ranking])
def test_one_of_several(loss) -> None:  # type: ignore[no-untyped-def]
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(4.0), 0.0]], dtype=torch.float16)
    found = loss(logits, torch.tensor([1, 1]))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(-math.log(0.75) - math.log(0.2), abs=2e-3)
