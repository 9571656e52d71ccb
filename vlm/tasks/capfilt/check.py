"""How well the filter finds texts that don't belong: some are exchanged between pictures on purpose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm.data.loader import evaluation_batches
from vlm.data.plan import shuffled_texts
from vlm.data.samples import Sample, caption_id
from vlm.data.sources import Source
from vlm.tasks.capfilt.judge import Judge
from vlm.tasks.capfilt.work import DIGITS
from vlm.tasks.metrics import Figure, share

INJECTED = 0.5
"""Share of the pictures that get another one's text."""


@dataclass(frozen=True)
class FilterCheck:
    """What the filter drops of texts of which some are known to be wrong."""

    data: str
    precision: Figure
    """Share of the dropped texts that were exchanged; its chance is the share of all that were."""
    recall: Figure
    """Share of the exchanged texts that were dropped; its chance is the share of all that were dropped."""
    own_kept: Figure
    """Share of the pictures' own texts that were kept."""
    unreadable: int

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        figures = {name: getattr(self, name).as_dict() for name in ("precision", "recall", "own_kept")}
        return {"data": self.data, **figures, "unreadable": self.unreadable}


@dataclass(frozen=True)
class Exchanged:
    """Texts, some of which were exchanged between pictures, as a filter scored them: what it drops at any threshold
    is known without it."""

    data: str
    itm: Sequence[float]
    """Matched probabilities, rounded like those of the records."""
    foreign: Sequence[bool]
    """Whether each text is another picture's."""
    unreadable: int

    def at(self, threshold: float) -> FilterCheck:
        """What a filter with this threshold makes of them."""
        out, bad = np.array(self.itm, dtype=float) <= threshold, np.array(self.foreign, dtype=bool)
        return FilterCheck(
            self.data,
            precision=share(bad[out], float(bad.mean()) if len(bad) else 0.0),
            recall=share(out[bad], float(out.mean()) if len(out) else 0.0),
            own_kept=share(~out[~bad], float((~out).mean()) if len(out) else 0.0),
            unreadable=self.unreadable,
        )


class _Mixed:
    """Some samples of a source in random order, some of them with another one's text."""

    def __init__(self, source: Source, numbers: np.ndarray, foreign: Mapping[int, int]) -> None:
        self.inner, self.numbers, self.foreign = source, numbers.tolist(), foreign
        self.name, self.problems = source.name, source.problems
        self.keys = [str(place) for place in range(len(numbers))]
        self.concepts = [source.concepts[number] for number in self.numbers]
        self.lengths = source.lengths[numbers]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> Sample:
        sample = self.inner[self.numbers[place]]
        return Sample(self.keys[place], sample.image, self.meta(place))

    def meta(self, place: int) -> dict[str, Any]:
        return self.inner.meta(self.numbers[self.foreign.get(place, place)])

    def fingerprint(self) -> str:
        return self.inner.fingerprint()


def score_exchanged(
    judge: Judge, source: Source, *, pictures: int, seed: int, batch_size: int, workers: int = 0
) -> Exchanged:
    """Exchange half of the texts among some pictures of a source, and let the filter score them.

    Which ones is fixed by the seed. An exchange between pictures of one concept or with the same text is no
    mismatch, and is left out.
    """
    numbers = np.random.default_rng((seed, len(source))).permutation(len(source))[:pictures]
    foreign = shuffled_texts(len(numbers), INJECTED, seed=seed)
    mixed = _Mixed(source, numbers, foreign)
    alike = {place for place, other in foreign.items() if _alike(source, int(numbers[place]), int(numbers[other]))}
    itm, wrong, seen = [], [], 0
    model = judge.model
    for batch in evaluation_batches(
        mixed, tokenizer=model.tokenizer, transform=model.transform, batch_size=batch_size, workers=workers
    ):
        places = [int(key) for key in batch.keys]
        texts = [[str(mixed.meta(place)["captions"][0])] for place in places]
        seen += len(places)
        for place, (verdict,) in zip(places, judge.verdicts(batch.pixels, texts), strict=True):
            if verdict is not None and place not in alike:
                itm.append(round(verdict.itm, DIGITS))
                wrong.append(place in foreign)
    return Exchanged(source.name, itm, wrong, unreadable=len(numbers) - seen)


def _alike(source: Source, one: int, other: int) -> bool:
    texts = [caption_id(str(source.meta(number)["captions"][0])) for number in (one, other)]
    return source.concepts[one] == source.concepts[other] or texts[0] == texts[1]
