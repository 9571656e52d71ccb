"""Tensors that a model has in common with a shipped one, so that its folder needn't hold them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from vlm.errors import WeightsError

BASE = "base"
"""In config.json: name and SHA-256 of the shipped model whose tensors the folder leaves out, and `parts` where the
model has some of its parts alone."""
MORE_ROWS = "@rows"
"""Behind the name of a stored tensor: only the rows after those of the base, such as those of new tokens."""
LIKE = "@rows of "
"""Likewise, but the rows before are those of a tensor that the base has under another name, which follows."""


class Base(NamedTuple):
    """A shipped model that another one shares tensors with."""

    name: str
    tensors: Mapping[str, Tensor]
    sha256: str
    """Of its weights file: a base that was trained anew must not slip into what was trained on the old one."""

    def only(self, parts: Collection[str]) -> Base:
        """Some parts of it, such as its image encoder, by what their tensors' names begin with."""
        return self._replace(tensors={n: value for n, value in self.tensors.items() if n.split(".")[0] in parts})


def shared_parts(tensors: Mapping[str, Tensor], base: Base) -> set[str]:
    """Parts that a model has in common with a base, by what their tensors' names begin with.

    Raises WeightsError when there are none.
    """
    found = {name.split(".")[0] for name in base.tensors} & {name.split(".")[0] for name in tensors}
    if not found:
        raise WeightsError(f"base {base.name}: this model has no part of it, such as {next(iter(base.tensors))}")
    return found


def without_shared(tensors: Mapping[str, Tensor], base: Base, *, whole: Base | None = None) -> dict[str, Tensor]:
    """What of a model's tensors isn't also in its base: of one name and type, bit for bit.

    A tensor that goes on with further rows is stored as those. whole: where a matrix that the base hasn't got is looked
    for under other names, such as the words of a decoder. Raises WeightsError when the base holds a tensor that the
    model lacks.
    """
    lacking = [name for name in base.tensors if name not in tensors]
    if lacking:
        raise WeightsError(f"base {base.name}: this model has no {', '.join(lacking[:5])}, so it can't be a part of it")
    found = {}
    for name, value in tensors.items():
        old, stored = base.tensors.get(name), name + MORE_ROWS
        if old is None and whole is not None and value.dim() > 1:
            other = next((n for n, o in whole.tensors.items() if o.dim() > 1 and _goes_on(value, o)), "")
            old, stored = whole.tensors.get(other), f"{name}{LIKE}{other}"
        if old is None or not _goes_on(value, old):
            found[name] = value
        elif name not in base.tensors or len(old) < len(value):
            found[stored] = value[len(old) :].clone()
    return found


def _goes_on(value: Tensor, old: Tensor) -> bool:
    """Whether the rows of a tensor are those of another one, and maybe more."""
    alike = old.dtype == value.dtype and old.shape[1:] == value.shape[1:] and old.dim() > 0
    return alike and torch.equal(old, value[: len(old)])


def with_shared(
    tensors: Mapping[str, Tensor], base: Base, *, where: str, whole: Base | None = None
) -> dict[str, Tensor]:
    """The inverse of `without_shared`. Raises WeightsError when the base doesn't hold what is left out."""
    found = dict(base.tensors)
    for name, value in tensors.items():
        plain, like, other = name.removesuffix(MORE_ROWS).partition(LIKE)
        if plain != name:
            old = (whole or base).tensors.get(other) if like else base.tensors.get(plain)
            if old is None or old.shape[1:] != value.shape[1:] or old.dtype != value.dtype:
                raise WeightsError(f"{where}: {name} continues a tensor that {base.name} doesn't hold in that shape")
            value = torch.cat([old, value])
        found[plain] = value
    return found
