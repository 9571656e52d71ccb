"""The prediction head: the same logits for few rows and for many, with and without gradient."""

from __future__ import annotations

import pytest
import torch

from vlm.models.heads import FEW, MlmHead


@pytest.mark.parametrize("shape", [(1,), (FEW,), (FEW + 1,), (2, 2), (1, 1), (2, 3), ()], ids=str)
def test_few_rows_give_what_many_give(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    head, embedding = MlmHead(8, 30), torch.randn(30, 8)
    torch.nn.init.normal_(head.bias)
    states = torch.randn(*shape, 8)
    expected = head(states, embedding)
    assert expected.requires_grad and expected.shape == (*shape, 30)
    with torch.inference_mode():
        torch.testing.assert_close(head(states, embedding), expected.detach(), rtol=1e-5, atol=1e-5)
