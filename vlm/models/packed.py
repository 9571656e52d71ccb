"""Linear layers in oneDNN's own layout, for a process that only ever runs its model forward on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """A linear layer (..., in) -> (..., out) whose weight was laid out once for oneDNN's kernels.

    torch's own fp32 product copies the bias into the result first and runs MKL, which on AMD processors takes
    nearly twice as long (measured on an EPYC with AVX-512 at 800 rows of 768 to 3072).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: (out, in). bias: (out,)."""
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self.bias = None if bias is None else bias.detach().clone()

    def forward(self, states: Tensor) -> Tensor:
        """Apply the layer."""
        return torch.ops.mkldnn._linear_pointwise(states, self.weight, self.bias, "none", [], "")


def pack_linears(network: nn.Module) -> int:
    """Replace the fp32 linear layers of a network on a CPU by packed ones; how many were replaced.

    Embeddings stay, since rows are looked up in them. A language model's head that shares its embedding's weight is a
    linear layer of its own, and is laid out a second time: every new token waits for its product. Where any were
    replaced, other fp32 tensors get memory of their own: one that lies in a mapped weights file keeps all of it.

    The network can't be trained, saved or moved any more. Elsewhere (a GPU, half precision, a torch without
    oneDNN) nothing is changed. Layers derived from nn.Linear stay, since others may look into them.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return 0
    count = 0
    # Of the layers themselves no list is kept, so that each one's weight is freed before the next is laid out.
    for parent in [module for module in network.modules() if type(module) is not nn.Linear]:
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and _packable(child.weight):
                setattr(parent, name, PackedLinear(child.weight, child.bias))
                count += 1
    if count:
        for tensor in [*network.parameters(), *network.buffers()]:
            if _packable(tensor):
                tensor.data = tensor.data.clone()
    return count


def _packable(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32
