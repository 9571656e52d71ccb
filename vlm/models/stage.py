"""What passes between a stage's network and whoever trains it: plain tensors with names.

A step has up to three parts, so that one engine can make it exact over ranks and micro-batches:

1. ``network(batch)`` encodes rows on their own (`Encoded`);
2. ``network.contrast`` compares their features with everyone's, and ``network.choose`` draws each row's
   partners for pairs that don't match (`Choice`);
3. ``network(batch, pairs)`` takes rows together with their partners' states (`Pairs`) to sums of losses.

A stage without pairs (CLIP) has no `choose`; one without a contrast (ViLT) gives no features.
Letters in shapes: B rows of the joined batch, b of these at hand, L text length, N patches + 1, Q queue or
queries, H heads, D width, K kinds of id, V vocabulary, M masked tokens, P rows in a pool of pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

Draws = Callable[[str, int], Tensor]
"""(name of a decision, n) to (b, n) uniform numbers in [0, 1), the same for a row whatever stands beside it."""


class Encoded(NamedTuple):
    """Rows encoded on their own."""

    features: dict[str, Tensor]
    """(b, D) each, compared with everyone's; and learned numbers of shape (1,), such as ``log_scale``."""
    states: dict[str, Tensor]
    """(b, ...) each, with gradient: what a pair is made of, such as image states (b, N, D)."""
    inputs: dict[str, Tensor]
    """(b, ...) each, without gradient: masks of the states, or raw pixels."""


@dataclass(frozen=True)
class Taught:
    """The teacher's features that a contrast is taken with (ALBEF §3.2)."""

    rows: Mapping[str, Tensor]
    """``image`` and ``text`` (b, D): the teacher's features of the rows themselves."""
    columns: Mapping[str, Tensor]
    """``image`` and ``text`` (B + Q, D): of everyone, then of the queue."""
    ids: Tensor
    """(B + Q, K)."""
    alpha: float
    """Share of the teacher's softmax in the targets."""


@dataclass(frozen=True)
class Choice:
    """Partners of some rows, drawn from the joined batch."""

    partners: dict[str, Tensor]
    """By the kind of partner (see `kind_of`), (b,) its row in the joined batch; -1 for none."""
    counts: dict[str, int]
    """By loss, how many terms these rows will add to its mean."""


@dataclass(frozen=True)
class Pairs:
    """Rows with the states of their partners."""

    states: dict[str, Tensor]
    """As in `Encoded`, (P, ...): the b rows' own first, then those of partners that stand elsewhere. P may
    differ from kind to kind (see `kind_of`)."""
    inputs: dict[str, Tensor]
    """Likewise."""
    partners: dict[str, Tensor]
    """By kind, (b,) places among that kind's P; -1 for none."""
    taught: Mapping[str, Tensor] = field(default_factory=dict)
    """The teacher's soft targets, from `teach` of the teacher's network; empty without a teacher."""
    alpha: float = 0.0
    """Their share in the targets."""


def kind_of(name: str) -> str:
    """The kind of partner that a state or input belongs to: ``text`` or ``own`` where it begins so, else ``image``.

    What is ``own`` goes to its own row alone: it has no partners.
    """
    return next((kind for kind in ("text", "own") if name.startswith(kind)), "image")


def can(network: Any, verb: str) -> bool:
    """Whether a network has a verb and, where that needs one, the head for it."""
    head = getattr(network, "verb_heads", {}).get(verb)
    return hasattr(network, verb) and (head is None or head in network.config.heads)


def any_draws(batch: Any) -> Draws:
    """Draws from torch's own generator, for a loss outside of a training run."""
    return lambda _, count: torch.rand(len(batch), count)


def weighted(parts: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The total of the losses that have a weight; the other parts are only watched."""
    found = [weight * parts[name].reshape(()) for name, weight in weights.items() if name in parts and weight]
    return torch.stack(found).sum() if found else torch.zeros(())


def joint_loss(
    network: Any, batch: Any, *, draws: Draws | None = None, taught: Taught | None = None, targets: Any = None
) -> dict[str, Tensor]:
    """All losses of one batch alone in one graph, without other ranks, micro-batches or an engine.

    network: a stage's network; batch: its rows. draws: for partners; torch's generator if None.
    taught, targets: the teacher's features and soft targets, if there is a teacher.

    Returns:
        ``loss``, the weighted total, and every part by its name without gradient: means over the batch.
    """
    features, states, inputs = network(batch)
    ids = {"row_ids": batch.ids, "ids": batch.ids}
    parts = dict(network.contrast(features, features, **ids, taught=taught))
    if hasattr(network, "choose"):
        choice = network.choose(batch, features, features, **ids, draws=draws or any_draws(batch))
        alpha = taught.alpha if taught is not None else 0.0
        sums = network(batch, Pairs(states, inputs, choice.partners, targets or {}, alpha))
        parts |= {name: value / max(1, choice.counts[name]) for name, value in sums.items()}
    loss = weighted(parts, network.loss_weights)
    return {"loss": loss, **{name: value.detach() for name, value in parts.items()}}
