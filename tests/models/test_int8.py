"""int8 weights: close to the layer that they were made of, forward and in the gradient, and nothing kept for it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vlm.models.int8 import Int8Linear, hold_in_int8


@pytest.mark.parametrize("bias", [True, False])
def test_close_to_the_layer_that_it_was_made_of(bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 48, bias=bias)
    layer.weight.data[3] *= 100  # a row of its own size keeps its own scale
    small = Int8Linear(layer.weight, layer.bias)
    whole = small.weight * small.scale[:, None]
    assert ((whole - layer.weight).abs() <= small.scale[:, None] / 2 + 1e-7).all()
    x, y = (torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    exact = nn.functional.linear(x, whole, layer.bias)
    torch.testing.assert_close(small(y), exact, rtol=1e-5, atol=1e-5)
    (exact**2).sum().backward()
    (small(y) ** 2).sum().backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-4, atol=1e-4)


def test_rows_of_zeros_and_other_types() -> None:
    layer = nn.Linear(8, 4, bias=False)
    layer.weight.data[0] = 0
    small = Int8Linear(layer.weight, None).to(torch.bfloat16)
    out = small(torch.ones(1, 8, dtype=torch.bfloat16))
    assert small.weight.dtype is torch.int8 and out.dtype is torch.bfloat16 and float(out[0, 0]) == 0


def test_all_layers_but_one() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 2))
    assert hold_in_int8(network, but=network[2]) == 2
    assert type(network[2]) is nn.Linear and isinstance(network[1][0], Int8Linear)
    assert not list(network[0].parameters())
