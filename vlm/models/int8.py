"""Linear layers whose frozen weights are held in int8, a quarter of fp32's memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Int8Linear(nn.Module):
    """A frozen linear layer (..., in) -> (..., out); weights are rounded to 255 steps, with a scale for each row.

    Activations stay as they are (LLM.int8(), arXiv 2208.07339 §2.1, without its outlier columns).
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: (out, in). bias: (out,)."""
        super().__init__()
        largest = weight.detach().float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12)  # (out, 1)
        self.register_buffer("weight", (weight.detach() * (127 / largest)).round().to(torch.int8))
        self.register_buffer("scale", (largest / 127)[:, 0])
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, states: Tensor) -> Tensor:
        """Apply the layer."""
        out = _Product.apply(states, self.weight, self.scale)
        return out if self.bias is None else out + self.bias


class _Product(torch.autograd.Function):
    """A product with int8 weights; the gradient needs no whole weights kept from the forward pass."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.kind = states.dtype
        return F.linear(states, weight.to(states.dtype)).mul_(scale.to(states.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        (gradient,) = gradients
        return ((gradient * scale.to(gradient.dtype)) @ weight.to(gradient.dtype)).to(ctx.kind), None, None


def hold_in_int8(network: nn.Module, *, but: nn.Module | None = None) -> int:
    """Replace a network's linear layers, `but` excepted, by ones with int8 weights, in place; how many there were."""
    count = 0
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not but:
                setattr(parent, name, Int8Linear(child.weight, child.bias))
                count += 1
    return count
