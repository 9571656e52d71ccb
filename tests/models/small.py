"""Small transformers with random, distinct weights, and inputs for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlm.models.transformer import Transformer, TransformerConfig

SMALL = TransformerConfig(vocab_size=50, context_length=16, width=32, layers=3, heads=4, mlp_width=64)
CAUSAL = replace(SMALL, causal=True, norm="pre", norm_eps=1e-5)
CROSS = replace(SMALL, token_types=2, cross_layers=(0, 2), cross_width=24)
ROUTES = replace(CROSS, self_routes=("text", "decode"), mlp_routes=("text", "query"))


def build(config: TransformerConfig, seed: int = 0) -> Transformer:
    """A network whose every tensor is random and large enough for each part to matter."""
    torch.manual_seed(seed)
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def words(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


def pictures(rows: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, 5, 24, generator=torch.Generator().manual_seed(seed))


def key_mask(lengths: list[int], total: int) -> Tensor:
    return torch.arange(total)[None] < torch.tensor(lengths)[:, None]


def far(a: Tensor, b: Tensor) -> bool:
    return float((a - b).detach().abs().max()) > 1e-3


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def check_finite(model: Any, some: Any) -> None:
    """A stage's losses of a batch are finite scalars with a gradient."""
    losses = model.loss(some)
    losses["loss"].backward()
    assert all(value.isfinite() and value.shape == () for value in losses.values())


def check_learns(model: Any, some: Any, names: Sequence[str]) -> None:
    """Sixty steps on one batch bring each of these losses well below where it began."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(0)
    first: dict[str, Tensor] = {}
    for step in range(60):
        optimiser.zero_grad()
        losses = model.loss(some)
        losses["loss"].backward()
        optimiser.step()
        model.clamp_()
        first = losses if step == 0 else first
    for name in names:
        assert losses[name] < 0.6 * first[name], name
