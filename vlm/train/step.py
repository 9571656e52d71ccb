"""One exact step: the gradient of the joined batch over ranks and micro-batches, whatever its size.

A contrast couples every row with every other, so summing micro-batches' own gradients is wrong. Here the
features of all micro-batches and ranks are computed first, the loss is taken over all of them, and its
gradient with respect to the features is sent back through the network one micro-batch at a time
(GradCache, arXiv 2101.06983). Rows are gathered as values; the gradients that other ranks' losses have for
them come back by a sum over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vlm.train.distributed import Ranks, gather, gather_sizes, sum_, synchronised

Features = dict[str, Tensor]


class Rows(Protocol):
    """What the engine reads of a batch."""

    @property
    def ids(self) -> Tensor:
        """(b, K) int64; rows that share an id are positives of each other."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the rows for messages."""

    def __len__(self) -> int: ...

    def split(self, parts: int) -> list[Any]:
        """Micro-batches of nearly equal size."""


@dataclass(frozen=True)
class StepContext:
    """What a step needs besides the network and the batch."""

    here: Ranks
    contrast: Callable[..., dict[str, Tensor]]
    """The stage's losses: (features, everyone, row_ids=, ids=) to named scalars, `loss` the total."""

    autocast: Callable[[], AbstractContextManager[None]]
    seed: int
    accumulate: int


def shared_entries(features: Mapping[str, Tensor]) -> set[str]:
    """Names of the entries that are one learned number for all rows, of shape (1,), such as a temperature."""
    return {name for name, value in features.items() if value.shape == (1,)}


def backward(
    network: nn.Module, batch: Rows, context: StepContext, *, step: int, loss_scale: float
) -> dict[str, float]:
    """Leave the joined batch's gradient in the parameters, and return the losses' joint values.

    Gradients are multiplied by `loss_scale`. When the loss isn't finite nothing is sent back, so that the
    caller can stop with the weights untouched.
    """
    here = context.here
    sizes = gather_sizes(len(batch), here)
    # As many micro-batches on every rank, since FSDP2 gathers its shards in each forward.
    micros = batch.split(max(1, min(context.accumulate, *sizes)))
    passes = [_forward(network, micro, context, step, number, len(micros) == 1) for number, micro in enumerate(micros)]
    shared = shared_entries(passes[0])
    own = {
        name: passes[0][name].detach() if name in shared else torch.cat([one[name].detach() for one in passes])
        for name in passes[0]
    }
    start = sum(sizes[: here.rank])
    everyone = {name: own[name] if name in shared else gather(own[name].float(), sizes) for name in own}
    leaves = {name: value.float().requires_grad_() for name, value in everyone.items()}
    rows = {name: leaf if name in shared else leaf[start : start + sizes[here.rank]] for name, leaf in leaves.items()}
    ids = gather(batch.ids, sizes)
    losses = context.contrast(rows, leaves, row_ids=batch.ids, ids=ids)
    # DDP and FSDP2 average over ranks; with this weight the average is the joined batch's, also when the
    # last batch gives some ranks a row more than others.
    weight = sizes[here.rank] * here.count / sum(sizes)
    values = _joint(losses, weight / here.count, here)
    if not all(map(torch.isfinite, (torch.tensor(value) for value in values.values()))):
        return values
    (losses["loss"] * weight).backward()
    gradients = {}
    for name, leaf in leaves.items():
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        if name not in shared:
            gradient = sum_(gradient, here)[start : start + sizes[here.rank]]
        gradients[name] = gradient * loss_scale
    _send_back(network, micros, passes, gradients, shared, context, step)
    return values


def _send_back(
    network: nn.Module,
    micros: list[Any],
    passes: list[Features],
    gradients: Features,
    shared: set[str],
    context: StepContext,
    step: int,
) -> None:
    done = 0
    for number, micro in enumerate(micros):
        last = number == len(micros) - 1
        with synchronised(network, last):
            again = len(micros) > 1
            features = _forward(network, micro, context, step, number, True) if again else passes[0]
            tensors, given = [], []
            for name, value in features.items():
                if not value.requires_grad:
                    continue
                if name in shared:
                    # Its whole gradient arrives once; zero elsewhere keeps it in every graph for DDP.
                    gradient = gradients[name] if last else torch.zeros_like(gradients[name])
                else:
                    gradient = gradients[name][done : done + len(micro)]
                tensors.append(value)
                given.append(gradient.to(value.dtype))
            torch.autograd.backward(tensors, given)
        done += len(micro)


def _forward(
    network: nn.Module, micro: Any, context: StepContext, step: int, number: int, with_graph: bool
) -> Features:
    """Features of a micro-batch; the same seed gives the same dropped patches in the second pass."""
    mixed = hash((context.seed, step, context.here.rank, number)) & 0x7FFF_FFFF_FFFF_FFFF
    torch.manual_seed(mixed)
    with torch.set_grad_enabled(with_graph), context.autocast():
        return network(micro)


def _joint(losses: Mapping[str, Tensor], weight: float, here: Ranks) -> dict[str, float]:
    """Values over all ranks' rows."""
    names = sorted(losses)
    stacked = torch.stack([losses[name].detach().float().reshape(()) for name in names]) * weight
    return dict(zip(names, sum_(stacked, here).tolist(), strict=True))
