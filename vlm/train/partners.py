"""States of rows beside those of their partners, which may stand in another micro-batch or on another rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm.models.stage import kind_of
from vlm.train.distributed import Ranks, gather_objects, share_from, sum_to


@dataclass(frozen=True)
class Pool:
    """The tensors that a micro-batch's pairs are made of."""

    tensors: dict[str, Tensor]
    """(P, ...) of each name: own rows first, then partners from elsewhere."""
    partners: dict[str, Tensor]
    """By kind, (b,) places among the P of that kind; -1 for none."""
    rows: dict[str, Tensor]
    """By kind, (P,) where the rows lie in the store, for the way back of gradients."""


class Partners:
    """All rows that this rank's pairs need: its own, then those of other ranks, each fetched once."""

    def __init__(
        self, own: Mapping[str, Tensor], chosen: Mapping[str, Tensor], places: Sequence[Tensor], here: Ranks
    ) -> None:
        """own: (b, ...) tensors by name, all of this rank's rows. chosen: by kind, (b,) rows of the joined batch
        or -1. places: of each rank, its rows' numbers in the joined batch."""
        self.here, self.places = here, places
        self.kinds = {kind_of(name) for name in own}
        self.shapes = _longest([{name: tuple(t.shape[1:]) for name, t in own.items()}], here)
        total = sum(map(len, places))
        device = places[here.rank].device
        self.at = {kind: torch.full((total,), -1, dtype=torch.int64, device=device) for kind in self.kinds}
        self.lent = {kind: self._lent(chosen.get(kind)) for kind in self.kinds}
        self.sent = self._sent()
        for kind, at in self.at.items():
            held = torch.cat([places[here.rank], *[places[r][rows] for r, rows in self.lent[kind]]])
            at[held] = torch.arange(len(held), device=device)
        self.store = {name: self._fetch(name, tensor) for name, tensor in own.items()}
        self.gradients: dict[str, Tensor] = {}

    def _lent(self, chosen: Tensor | None) -> list[tuple[int, Tensor]]:
        """Other ranks, and which of their rows are needed here."""
        if chosen is None or self.here.count == 1:
            return []
        others = [rank for rank in range(self.here.count) if rank != self.here.rank]
        return [(rank, torch.isin(self.places[rank], chosen).nonzero().squeeze(1)) for rank in others]

    def _sent(self) -> dict[str, list[Tensor]]:
        """By kind, of each rank, those of its rows that any other rank needs; the same on all ranks."""
        if self.here.count == 1:
            return {kind: [] for kind in self.kinds}
        told = {kind: [(rank, rows.tolist()) for rank, rows in lent] for kind, lent in self.lent.items()}
        everyone = gather_objects(told, self.here)
        device = self.places[self.here.rank].device
        found = {}
        for kind in self.kinds:
            rows: list[set[int]] = [set() for _ in self.places]
            for lent in everyone:
                for rank, wanted in lent[kind]:
                    rows[rank] |= set(wanted)
            found[kind] = [torch.tensor(sorted(one), dtype=torch.int64, device=device) for one in rows]
        return found

    def _fetch(self, name: str, own: Tensor) -> Tensor:
        own = _padded(own, self.shapes[name])
        wanted = dict(self.lent[kind_of(name)])
        parts = [own]
        for rank, sent in enumerate(self.sent[kind_of(name)]):
            if not len(sent):
                continue
            rows = own[sent] if rank == self.here.rank else own.new_empty((len(sent), *self.shapes[name]))
            share_from(rank, rows, self.here)
            if rank in wanted:
                parts.append(rows[torch.searchsorted(sent, wanted[rank])])
        return torch.cat(parts) if len(parts) > 1 else own

    def pool(self, own: slice, chosen: Mapping[str, Tensor]) -> Pool:
        """What the pairs of the rows `own` of this rank need; `chosen`: by kind, (b,) their partners."""
        rows, partners = {}, {}
        for kind in self.kinds:
            mine = torch.arange(own.start, own.stop, device=self.at[kind].device)
            rows[kind] = mine
            if kind not in chosen:
                continue
            found = torch.where(chosen[kind] < 0, -1, self.at[kind][chosen[kind].clamp(min=0)])  # (b,)
            outside = found[(found >= 0) & ((found < own.start) | (found >= own.stop))].unique()
            rows[kind] = torch.cat([mine, outside])
            place = found.new_full((int(rows[kind].max()) + 1,), -1)
            place[rows[kind]] = torch.arange(len(rows[kind]), device=place.device)
            partners[kind] = torch.where(found < 0, -1, place[found.clamp(min=0)])
        tensors = {name: _taken(tensor, rows[kind_of(name)]) for name, tensor in self.store.items()}
        return Pool(tensors, partners, rows)

    def add_gradient(self, name: str, pool: Pool, gradient: Tensor) -> None:
        """Add the gradient (P, ...) that a pool's pairs have for the tensor `name`."""
        if name not in self.gradients:
            self.gradients[name] = torch.zeros_like(self.store[name], dtype=torch.float32)
        self.gradients[name].index_add_(0, pool.rows[kind_of(name)], gradient.float())

    def returned(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Gradients of this rank's own rows, with what other ranks' pairs have for them; every rank calls it."""
        found = {}
        for name in names:
            whole = self.gradients.get(name)
            if whole is None:
                whole = torch.zeros_like(self.store[name], dtype=torch.float32)
            start = len(self.places[self.here.rank])
            mine = whole[:start]
            for rank, sent in enumerate(self.sent[kind_of(name)]):
                if not len(sent):
                    continue
                part = whole.new_zeros((len(sent), *whole.shape[1:]))
                rows = dict(self.lent[kind_of(name)]).get(rank)
                if rows is not None:
                    part[torch.searchsorted(sent, rows)] = whole[start : start + len(rows)]
                    start += len(rows)
                sum_to(rank, part, self.here)
                if rank == self.here.rank:
                    mine = mine.index_add(0, sent, part)
            found[name] = mine
        return found


def joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of several micro-batches as one, (b, ...); shorter texts are padded with zeros."""
    if len(parts) == 1:
        return dict(parts[0])
    shapes = _longest([{name: tuple(t.shape[1:]) for name, t in part.items()} for part in parts], None)
    return {name: torch.cat([_padded(part[name], shapes[name]) for part in parts]) for name in parts[0]}


def _longest(shapes: list[dict[str, tuple[int, ...]]], here: Ranks | None) -> dict[str, tuple[int, ...]]:
    if here is not None:
        shapes = [one for ranks in gather_objects(shapes, here) for one in ranks]
    return {name: tuple(map(max, zip(*(one[name] for one in shapes), strict=True))) for name in shapes[0]}


def _padded(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape[1:]) == shape:
        return tensor.contiguous()
    whole = tensor.new_zeros((len(tensor), *shape))
    whole[tuple(map(slice, tensor.shape))] = tensor
    return whole


def _taken(tensor: Tensor, rows: Tensor) -> Tensor:
    everything = len(rows) == len(tensor) and bool((rows == torch.arange(len(tensor), device=rows.device)).all())
    return tensor if everything else tensor[rows]
