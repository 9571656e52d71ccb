"""An average of the weights over the steps, evaluated and exported in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Exponential moving average of a network's trained parameters (sharded as they are)."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self._live = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.average: dict[str, Tensor] = {name: p.detach().clone() for name, p in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the weights after an optimiser step; faster at first, when the average is young."""
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 10))
        for name, value in self.average.items():
            value.lerp_(self._live[name].detach(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the network holds the average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, value in self.average.items():
            live = self._live[name]
            kept = live.detach().clone()
            live.copy_(value)
            value.copy_(kept)
