"""One exact step: the gradient of the joined batch over ranks and micro-batches, whatever its size.

A contrast couples every row with every other, and a pair with a hard negative couples two rows, so summing
micro-batches' own gradients is wrong. Here all rows are encoded first; the losses are taken on what was
encoded; and the gradient with respect to it is sent back through the network one micro-batch at a time
(GradCache, arXiv 2101.06983). Rows are gathered as values; the gradients that other ranks' losses have for
them come back by a sum over ranks. See `vlm.models.stage` for the parts of a step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vlm.models.stage import Choice, Encoded, Pairs, Taught, weighted
from vlm.train.distributed import (
    Ranks,
    average_gradients,
    gather,
    gather_objects,
    gather_sizes,
    order,
    reshard,
    sum_,
    synchronised,
)
from vlm.train.draws import uniform
from vlm.train.partners import Partners, joined
from vlm.train.teacher import Teaching

Features = dict[str, Tensor]


class Rows(Protocol):
    """What the engine reads of a batch."""

    @property
    def ids(self) -> Tensor:
        """(b, K) int64; rows that share an id are positives of each other."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the rows, for messages and for what is drawn for each."""

    def __len__(self) -> int: ...

    def split(self, parts: int) -> list[Any]:
        """Micro-batches of nearly equal size."""


@dataclass(frozen=True)
class StepContext:
    """What a step needs besides the network and the batch."""

    here: Ranks
    stage: Any
    """The stage's network itself, not wrapped: its `contrast`, `choose` and `loss_weights`."""
    autocast: Callable[[], AbstractContextManager[None]]
    seed: int
    accumulate: int
    teaching: Teaching | None = None


@dataclass
class _Step:
    """What is known of one step while it is made."""

    network: nn.Module
    context: StepContext
    number: int
    loss_scale: float
    batch: Any
    micros: list[Any]
    sizes: list[int]
    places: list[Tensor]
    """Of each rank, its rows' numbers in the joined batch."""

    @property
    def cuts(self) -> list[slice]:
        """Of each micro-batch, its rows among this rank's."""
        ends = [0]
        for micro in self.micros:
            ends.append(ends[-1] + len(micro))
        return [slice(*pair) for pair in itertools.pairwise(ends)]

    @property
    def weight(self) -> float:
        """DDP and FSDP2 average over ranks; with this weight the average is the joined batch's, also when the
        last batch gives some ranks a row more than others."""
        return self.sizes[self.context.here.rank] * self.context.here.count / sum(self.sizes)


def shared_entries(features: Mapping[str, Tensor]) -> set[str]:
    """Names of the entries that are one learned number for all rows, of shape (1,), such as a temperature."""
    return {name for name, value in features.items() if value.shape == (1,)}


def backward(
    network: nn.Module, batch: Rows, context: StepContext, *, step: int, loss_scale: float
) -> dict[str, float]:
    """Leave the joined batch's gradient in the parameters, and return the losses' joint values.

    Gradients are multiplied by `loss_scale`. When a loss isn't finite the weights are untouched and the caller
    should stop; what lies in the gradients then means nothing.
    """
    here = context.here
    sizes = gather_sizes(len(batch), here)
    # As many micro-batches on every rank, since FSDP2 gathers its shards in each forward.
    micros = batch.split(max(1, min(context.accumulate, *sizes)))
    now = _Step(network, context, step, loss_scale, batch, micros, sizes, order(sizes, batch.ids.device))
    paired = hasattr(context.stage, "choose")
    with synchronised(network, True, paired=paired):
        passes = [_encode(now, number, len(micros) == 1) for number in range(len(micros))]
    lessons = [_teach(now, number) for number in range(len(micros))]
    if context.teaching is not None:
        # FSDP2 would hold its whole parameters until a backward pass that never comes.
        reshard(context.teaching.teacher.network)
    values, gradients, choice = _contrast(now, passes, lessons)
    if all(map(_finite, values.values())):
        back: Features = {}
        if choice is not None:
            found, back = _pairs(now, passes, lessons, choice)
            values |= found
        _send_back(now, passes, gradients, back, paired)
    alpha = {} if context.teaching is None else {"alpha": context.teaching.alpha(step)}
    return {"loss": _total(values, context.stage.loss_weights)} | values | alpha


def _contrast(
    now: _Step, passes: list[Encoded], lessons: list[tuple[Features, Features]]
) -> tuple[dict[str, float], Features, Choice | None]:
    """Losses over everyone's features, their gradients for this rank's, and the partners that are drawn."""
    context, here, mine = now.context, now.context.here, now.places[now.context.here.rank]
    shared = shared_entries(passes[0].features)
    per_row = joined([{n: v.detach() for n, v in one.features.items() if n not in shared} for one in passes])
    own = per_row | {name: passes[0].features[name].detach() for name in shared}
    everyone = {name: own[name] if name in shared else gather(own[name].float(), now.places) for name in own}
    leaves = {name: value.float().requires_grad_() for name, value in everyone.items()}
    rows = {name: leaf if name in shared else leaf[mine] for name, leaf in leaves.items()}
    ids = gather(now.batch.ids, now.places)
    taught = _taught(now, lessons, ids)
    parts = context.stage.contrast(rows, leaves, row_ids=now.batch.ids, ids=ids, taught=taught)
    values = _joint(parts, now.weight / here.count, here)
    choice = None
    if hasattr(context.stage, "choose"):
        with torch.no_grad():
            choice = context.stage.choose(now.batch, rows, leaves, row_ids=now.batch.ids, ids=ids, draws=_draws(now))
    total = weighted(parts, context.stage.loss_weights)
    if total.requires_grad and all(map(_finite, values.values())):
        (total * now.weight).backward()
    gradients = {}
    for name, leaf in leaves.items():
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        if name not in shared:
            gradient = sum_(gradient, here)[mine]
        gradients[name] = gradient * now.loss_scale
    return values, gradients, choice


def _teach(now: _Step, number: int) -> tuple[Features, Features]:
    """The teacher's features of a micro-batch, and its soft targets for the pairs."""
    teaching, micro = now.context.teaching, now.micros[number]
    if teaching is None:
        return {}, {}
    teacher: Any = teaching.teacher.network
    with torch.no_grad(), now.context.autocast():
        features, states, inputs = teacher(micro)
        targets = teacher.teach(micro, states, inputs) if hasattr(teacher, "teach") else {}
    return {name: features[name].float() for name in ("image", "text") if name in features}, targets


def _taught(now: _Step, lessons: list[tuple[Features, Features]], ids: Tensor) -> Taught | None:
    """What the teacher says of the rows and of everyone, with the queue behind; then the queue moves on."""
    teaching = now.context.teaching
    if teaching is None or not lessons[0][0]:
        return None
    rows = joined([features for features, _ in lessons])
    everyone = {name: gather(value, now.places) for name, value in rows.items()}
    held = teaching.queue.rows()
    columns = {name: torch.cat([value, held[name]]) for name, value in everyone.items()}
    taught = Taught(rows, columns, torch.cat([ids, held["ids"]]), teaching.alpha(now.number))
    teaching.queue.push(everyone["image"], everyone["text"], ids)
    return taught


def _pairs(
    now: _Step, passes: list[Encoded], lessons: list[tuple[Features, Features]], choice: Choice
) -> tuple[dict[str, float], Features]:
    """Losses of rows with their partners; leaves gradients in the parameters, returns those of the states."""
    context, here, stage = now.context, now.context.here, now.context.stage
    states = joined([{name: value.detach() for name, value in one.states.items()} for one in passes])
    inputs = joined([one.inputs for one in passes])
    partners = Partners(states | inputs, choice.partners, now.places, here)
    alpha = context.teaching.alpha(now.number) if context.teaching else 0.0
    counts = {name: sum(one[name] for one in gather_objects(choice.counts, here)) for name in choice.counts}
    sums = {name: torch.zeros((), device=here.device) for name in counts}
    for number, (micro, cut) in enumerate(zip(now.micros, now.cuts, strict=True)):
        pool = partners.pool(cut, {kind: rows[cut] for kind, rows in choice.partners.items()})
        leaves = {name: pool.tensors[name].detach().requires_grad_() for name in states}
        pairs = Pairs(leaves, {name: pool.tensors[name] for name in inputs}, pool.partners, lessons[number][1], alpha)
        with synchronised(now.network, False, paired=True):
            _seed(now, number, "pairs")
            with context.autocast():
                found = now.network(micro, pairs)
            means = {name: value / max(1, counts[name]) for name, value in found.items()}
            total = weighted(means, stage.loss_weights)
            if total.requires_grad:
                (total * here.count * now.loss_scale).backward()
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                partners.add_gradient(name, pool, leaf.grad)
        sums |= {name: sums[name] + value.detach().float() for name, value in found.items()}
    joint = _joint(sums, 1.0, here)
    values = {name: value / counts[name] for name, value in joint.items() if counts[name]}
    return values, partners.returned(list(states))


def _send_back(now: _Step, passes: list[Encoded], gradients: Features, back: Features, paired: bool) -> None:
    """The gradients of features and of states through the network, one micro-batch at a time."""
    network, here = now.network, now.context.here
    shared = shared_entries(passes[0].features)
    for number, cut in enumerate(now.cuts):
        last = number == len(now.micros) - 1
        with synchronised(network, last, paired=paired):
            encoded = _encode(now, number, True) if len(now.micros) > 1 else passes[0]
            tensors: list[Tensor] = []
            given: list[Tensor] = []
            for name, value in encoded.features.items():
                gradient = gradients[name] if name in shared else gradients[name][cut]
                # A shared number's whole gradient arrives once; zero elsewhere keeps it in every graph for DDP.
                _add(tensors, given, value, gradient if last or name not in shared else torch.zeros_like(gradient))
            for name, value in encoded.states.items():
                if name in back:
                    # Joined rows may be padded further than a micro-batch's own.
                    own = back[name][cut][(slice(None), *map(slice, value.shape[1:]))]
                    _add(tensors, given, value, own)
            if tensors:
                torch.autograd.backward(tensors, given)
    if paired and isinstance(network, nn.parallel.DistributedDataParallel):
        average_gradients(network.parameters(), here)


def _add(tensors: list[Tensor], given: list[Tensor], value: Tensor, gradient: Tensor) -> None:
    if value.requires_grad:
        tensors.append(value)
        given.append(gradient.to(value.dtype))


def _encode(now: _Step, number: int, with_graph: bool) -> Encoded:
    """A micro-batch's rows; the same seed gives the same dropped patches in the second pass."""
    _seed(now, number, "rows")
    with torch.set_grad_enabled(with_graph), now.context.autocast():
        return now.network(now.micros[number])


def _seed(now: _Step, number: int, part: str) -> None:
    """What is dropped in a pass depends on where it stands in the run."""
    mixed = (now.context.seed, now.number, now.context.here.rank, number)
    torch.manual_seed(hash(mixed if part == "rows" else (*mixed, 1)) & 0x7FFF_FFFF_FFFF_FFFF)


def _draws(now: _Step) -> Callable[[str, int], Tensor]:
    def draw(name: str, count: int) -> Tensor:
        moment = f"step {now.number}"
        found = uniform(now.batch.keys, seed=now.context.seed, moment=moment, name=name, count=count)
        return found.to(now.batch.ids.device)

    return draw


def _joint(losses: Mapping[str, Tensor], weight: float, here: Ranks) -> dict[str, float]:
    """Values over all ranks' rows."""
    names = sorted(losses)
    if not names:
        return {}
    stacked = torch.stack([losses[name].detach().float().reshape(()) for name in names]) * weight
    return dict(zip(names, sum_(stacked, here).tolist(), strict=True))


def _total(values: Mapping[str, float], weights: Mapping[str, float]) -> float:
    return sum(weight * values[name] for name, weight in weights.items() if name in values)


def _finite(value: float) -> bool:
    return abs(value) < float("inf")
