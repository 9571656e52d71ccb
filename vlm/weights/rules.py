"""Key maps as data: a rule says which tensors of ours hold what which tensors of theirs hold, both ways."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlm.errors import WeightsError

SHOWN = 10
ZEROS = ""
"""Stands among a rule's foreign names for a part without a tensor."""


@dataclass(frozen=True)
class Rule:
    """Tensors that hold the same numbers: `ours`, joined along the first dimension, are `theirs`, joined.

    One name on both sides is a plain renaming. Shares say how long each name's part is against the others:
    BERT's query, key and value, (1, 1, 1), are our q and kv, (1, 2). `ZEROS` among `theirs` is a part that they don't
    store and that is as good as zeros.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    our_shares: tuple[int, ...] = (1,)
    their_shares: tuple[int, ...] = (1,)
    transpose: bool = False
    """Whether theirs is stored as (in, out) and ours as (out, in)."""
    shape: tuple[int, ...] | None = None
    """Shape of ours where it has other dimensions than theirs, such as a leading 1."""
    their_shape: tuple[int, ...] | None = None


def same(ours: str, theirs: str, *, transpose: bool = False) -> Rule:
    """A renaming."""
    return Rule((ours,), (theirs,), transpose=transpose)


def both(ours: str, theirs: str) -> list[Rule]:
    """A renaming of a weight and its bias."""
    return [same(f"{ours}.{end}", f"{theirs}.{end}") for end in ("weight", "bias")]


def within(part: str, rules: Iterable[Rule]) -> list[Rule]:
    """Rules for a network in which what they describe is called `part`."""
    return [replace(rule, ours=tuple(f"{part}.{name}" for name in rule.ours)) for rule in rules]


def split_attention(ours: str, theirs: Sequence[str]) -> list[Rule]:
    """Our q and kv against their separate query, key and value; `ours` and `theirs` without the endings."""
    return [
        Rule(
            (f"{ours}.q.{end}", f"{ours}.kv.{end}"),
            tuple(f"{name}.{end}" for name in theirs),
            (1, 2),
            (1, 1, 1),
        )
        for end in ("weight", "bias")
    ]


def to_ours(
    tensors: Mapping[str, Tensor], rules: Iterable[Rule], *, where: str, left_out: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Rename, join and cut foreign tensors into ours.

    left_out: patterns of names that are not needed, on purpose. Raises one WeightsError that lists what is missing,
    what no rule knows, and whose shape can't be cut as the rules say.
    """
    listed = list(rules)
    wanted = [name for rule in listed for name in rule.theirs if name != ZEROS]
    missing = [name for name in wanted if name not in tensors]
    skipped = [re.compile(pattern) for pattern in left_out]
    known = set(wanted)
    unexpected = [name for name in tensors if name not in known and not any(skip.fullmatch(name) for skip in skipped)]
    listed = [rule for rule in listed if set(rule.theirs).isdisjoint(missing)]
    out: dict[str, Tensor] = {}
    shapes = []
    for rule in listed:
        parts = _parts(tensors, rule.theirs)
        try:
            turned = [part.T for part in parts] if rule.transpose else parts
            out |= _cut(turned, rule.ours, rule.our_shares, rule.shape)
        except RuntimeError:  # reshape, cat and split each have words of their own for it
            found = ", ".join(f"{name} {tuple(part.shape)}" for name, part in zip(rule.theirs, parts, strict=True))
            wanted_shape = f" {rule.shape}" if rule.shape else ""
            shapes.append(f"{found}, which can't become {', '.join(rule.ours)}{wanted_shape}")
    refuse(where, missing=missing, unexpected=unexpected, shapes=shapes)
    return out


def to_theirs(tensors: Mapping[str, Tensor], rules: Iterable[Rule]) -> dict[str, Tensor]:
    """The inverse of `to_ours`: our tensors under their names."""
    out: dict[str, Tensor] = {}
    for rule in rules:
        found = _cut([tensors[name] for name in rule.ours], rule.theirs, rule.their_shares, rule.their_shape)
        turned = {name: (part.T if rule.transpose else part).contiguous() for name, part in found.items()}
        out |= {name: part for name, part in turned.items() if name != ZEROS}
    return out


def refuse(
    where: str,
    *,
    missing: Sequence[str] = (),
    unexpected: Sequence[str] = (),
    shapes: Sequence[str] = (),
) -> None:
    """Raise one WeightsError that lists everything that doesn't fit; silent when all does."""
    groups = {"missing": missing, "unexpected": unexpected, "of the wrong shape": shapes}
    lines = []
    for kind, names in groups.items():
        if names:
            more = f", ... and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines.append(f"  {len(names)} {kind}: {', '.join(names[:SHOWN])}{more}")
    if lines:
        raise WeightsError(f"{where}: the tensors don't fit the network\n" + "\n".join(lines))


def _parts(tensors: Mapping[str, Tensor], names: Sequence[str]) -> list[Tensor]:
    first = tensors[names[0]]
    return [torch.zeros_like(first) if name == ZEROS else tensors[name] for name in names]


def _cut(
    parts: Sequence[Tensor], names: Sequence[str], shares: Sequence[int], shape: tuple[int, ...] | None
) -> dict[str, Tensor]:
    if len(parts) == 1 and len(names) == 1:
        return {names[0]: parts[0] if shape is None else parts[0].reshape(shape)}
    if any(part.dim() == 0 for part in parts):
        raise RuntimeError("a single number has no rows to cut")
    rows = sum(len(part) for part in parts)
    unit, left = divmod(rows, sum(shares))
    if left:
        raise RuntimeError(f"{rows} rows can't be cut into {sum(shares)} equal parts")
    pieces = list(reversed(parts))
    return {name: _first_rows(pieces, unit * share) for name, share in zip(names, shares, strict=True)}


def _first_rows(pieces: list[Tensor], rows: int) -> Tensor:
    """Take so many rows off the pieces, the first of which comes last; copied only where several are joined."""
    taken: list[Tensor] = []
    while rows or not taken:
        piece = pieces.pop()
        if len(piece) > rows:
            pieces.append(piece[rows:])
        taken.append(piece[:rows])
        rows -= len(taken[-1])
    return taken[0] if len(taken) == 1 else torch.cat(taken)
