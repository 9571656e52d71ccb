"""Units of work, a shard each, and their pictures in batches: the same for any number of workers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlm.data.images import decode_image
from vlm.data.samples import clean_text
from vlm.data.sources import Source
from vlm.data.transforms import ImageTransform
from vlm.errors import DataError

Kind = Literal["web", "human"]
KINDS: tuple[Kind, ...] = ("web", "human")
MEND = "what was written is whole: mend it and start again"
"""What to do about a set that can't be read any more."""
PREFETCH = 2
"""Batches that each worker holds ready."""


@dataclass(frozen=True)
class Unit:
    """Neighbouring samples of a source that are written as one shard."""

    kind: Kind
    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.kind}-{self.number:05d}"


@dataclass(frozen=True)
class Row:
    """A picture with the texts that were found beside it."""

    number: int
    """In its source."""
    key: str
    meta: dict[str, Any]
    image: bytes
    """Encoded, as it will be written again."""
    texts: tuple[str, ...]
    """None of a web picture that came with no text."""


@dataclass(frozen=True)
class Pictures:
    """A batch of a unit, decoded once."""

    unit: Unit
    last: bool
    """Whether the unit ends with it."""
    rows: tuple[Row, ...]
    pixels: tuple[Tensor, ...]
    """(b, 3, H, W) for each different preprocessing."""
    skipped: tuple[tuple[str, str], ...] = ()
    """Key of each picture that can't be decoded, and why."""
    failed: str = ""
    """Why the source itself can't be read any more; an exception would come wrapped in a worker's trace."""


@dataclass(frozen=True)
class Reading:
    """How pictures are read."""

    sources: Mapping[str, Source]
    transforms: tuple[ImageTransform, ...]
    """Different ones: models with the same preprocessing share the pixels."""
    batch_size: int
    web_field: str
    workers: int = 0

    def field_of(self, unit: Unit) -> str:
        """Field that holds the text as it was found; empty where the captions are meant."""
        return self.web_field if unit.kind == "web" else ""


class _Part(NamedTuple):
    """What makes a batch."""

    unit: Unit
    numbers: list[int]
    """Of samples, in their source."""
    last: bool


@dataclass(frozen=True)
class _Batches(Dataset[Pictures]):
    """Makes the batches; lives in the workers."""

    reading: Reading

    def __getitem__(self, part: _Part) -> Pictures:
        unit, numbers, last = part
        source, transforms = self.reading.sources[unit.kind], self.reading.transforms
        rows, skipped = [], []
        pixels: list[list[Tensor]] = [[] for _ in transforms]
        for place in numbers:
            try:
                sample = source[place]
            except DataError as error:
                return Pictures(unit, last, (), (), failed=str(error))
            try:
                image = decode_image(sample.image, name=sample.key)
            except DataError as error:
                skipped.append((sample.key, str(error)))
                continue
            for one, transform in zip(pixels, transforms, strict=True):
                one.append(transform(image))
            texts = found_texts(sample.meta, self.reading.field_of(unit))
            rows.append(Row(place, sample.key, sample.meta, sample.image, texts))
        joined = tuple(torch.stack(one) for one in pixels) if rows else ()
        return Pictures(unit, last, tuple(rows), joined, tuple(skipped))


def find_units(sources: Mapping[str, Source], samples: int) -> list[Unit]:
    """All units of the web and of the human sets, of at most `samples` each."""
    found = []
    for kind in KINDS:
        size = len(sources[kind])
        for number, start in enumerate(range(0, size, samples)):
            found.append(Unit(kind, number, start, min(start + samples, size)))
    return found


def found_texts(meta: Mapping[str, Any], web_field: str) -> tuple[str, ...]:
    """The text in a sample's `web_field`, else its captions; nothing where it came with neither."""
    text = meta.get(web_field) if web_field else None
    return (clean_text(text),) if isinstance(text, str) and text.strip() else tuple(meta["captions"])


def read_units(reading: Reading, units: Sequence[Unit]) -> Iterator[Pictures]:
    """The batches of some units, one unit after the other.

    A batch's texts are about as long as each other. Raises DataError where a source can't be read any more.
    """
    parts = (part for unit in units for part in _cut(unit, reading))  # a unit at a time: there may be millions
    settings: dict[str, Any] = {"prefetch_factor": PREFETCH, "worker_init_fn": _one_thread} if reading.workers else {}
    loader = DataLoader(
        _Batches(reading), batch_size=None, sampler=parts, num_workers=reading.workers, generator=torch.Generator(),
        **settings,
    )  # fmt: skip
    try:
        for batch in loader:
            if batch.failed:
                raise DataError(batch.failed)
            yield batch
    except DataError as error:
        raise DataError(f"{error}; {MEND}") from error


def _cut(unit: Unit, reading: Reading) -> list[_Part]:
    """A unit's batches, by the length of the texts that are judged: a web text may be far longer than its caption."""
    source, name = reading.sources[unit.kind], reading.field_of(unit)
    numbers = np.arange(unit.start, unit.stop)
    texts = [found_texts(source.meta(number), name) for number in numbers.tolist()]
    lengths = [sum(map(len, some)) / max(1, len(some)) for some in texts]
    order, size = numbers[np.argsort(lengths, kind="stable")], reading.batch_size
    cuts = [order[start : start + size].tolist() for start in range(0, len(order), size)]
    return [_Part(unit, cut, place == len(cuts) - 1) for place, cut in enumerate(cuts)]


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
