"""Batches of an epoch: which samples, in what order, on which rank; the same for any number of workers."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vlm.data.augment import Augment, augment
from vlm.data.batch import Batch
from vlm.data.captions import CaptionVariation, first_caption, vary
from vlm.data.features import FeatureStore
from vlm.data.images import decode_image
from vlm.data.plan import plan, shuffled_texts
from vlm.data.prompts import Prompts, asked
from vlm.data.rows import Row, Unreadable, collate
from vlm.data.samples import OWN, UNREADABLE, stable_id
from vlm.data.sources import Source
from vlm.data.tokenizers import Tokenizer
from vlm.data.transforms import ImageTransform
from vlm.errors import ConfigError, DataError, check_least

logger = logging.getLogger("vlm.data")


@dataclass(frozen=True)
class LoaderConfig:
    """How samples become batches."""

    batch_size: int = 256
    """Samples of a step over all ranks and micro-batches."""
    workers: int = 2
    """Processes of each rank that decode; 0 decodes in the training process. Never changes a batch."""
    max_length: int = 0
    """Longest text in tokens, start and end counted, longer ones are cut; 0 for the tokenizer's own bound."""
    bucket_batches: int = 16
    """Batches that are sorted by caption length together, so that a batch's texts are about as long as each
    other; their samples and their order stay random. 1 for none."""
    seed: int = 0
    """Set by the engine to the run's own."""
    augment: Augment = field(default_factory=Augment)
    captions: CaptionVariation = field(default_factory=CaptionVariation)
    shuffled: float = 0.0
    """Share of the samples that get the texts of another one of them, fixed by the seed: noise to measure with."""

    def __post_init__(self) -> None:
        check_least(self, "loader", {"batch_size": 1, "workers": 0, "max_length": 0, "bucket_batches": 1, "seed": 0})
        if not 0 <= self.shuffled < 1:
            raise ConfigError(f"loader.shuffled is a share and must be at least 0 and below 1, got {self.shuffled!r}")
        if self.max_length == 1:
            raise ConfigError("loader.max_length must be 0 (the tokenizer's own) or at least 2 (start and end token)")


def steps_per_epoch(samples: int, config: LoaderConfig) -> int:
    """Batches that `plan` gives, without making it."""
    whole, rest = divmod(samples, config.batch_size)
    return max(1, whole + (2 * rest >= config.batch_size)) if samples else 0


def make_loader(
    source: Source,
    config: LoaderConfig,
    *,
    tokenizer: Tokenizer,
    transform: ImageTransform,
    epoch: int,
    skip_samples: int = 0,
    rank: int = 0,
    ranks: int = 1,
    prompts: Prompts | None = None,
    features: FeatureStore | None = None,
) -> Iterable[Batch]:
    """This rank's training batches of an epoch, from after the first `skip_samples` of it.

    Rank r takes rows r, r + ranks, ... of each global batch, so every rank makes the same number of steps.
    Order, text and picture of a sample depend on (seed, epoch, sample) alone.
    skip_samples: a batch's `consumed`; any number of ranks and workers goes on from there without repeating or
    losing a sample, as long as seed, batch_size and bucket_batches are the same.
    prompts: what texts begin with, for a stage that says them.
    features: of the source's pictures, which are then neither read nor decoded; texts are drawn as without them.

    The place of a picture that can't be decoded goes to the next readable one of the rank's rows, else of the
    global batch, so that ranks stay in step; it is warned about once and counted in the source's `problems`.
    Raises DataError when the source is empty or, on all ranks alike, no picture of a global batch can be
    decoded; ConfigError when rank and ranks don't fit or a batch has fewer samples than there are ranks.
    """
    if len(source) == 0:
        raise DataError(f"{source.name}: no samples to train on")
    if not 0 <= rank < ranks or skip_samples < 0:
        raise ConfigError(f"expected 0 <= rank < ranks and skip_samples >= 0, got {rank}, {ranks}, {skip_samples}")
    batches = plan(
        np.asarray(source.lengths),
        config.batch_size,
        seed=config.seed,
        epoch=epoch,
        bucket_batches=config.bucket_batches,
    )
    if min(map(len, batches)) < ranks:
        raise ConfigError(
            f"{len(source)} samples in batches of {config.batch_size} leave one of {min(map(len, batches))}, "
            f"too few for {ranks} ranks: set loader.batch_size to {2 * ranks} or more, or train on fewer ranks"
        )
    ends = np.cumsum([len(batch) for batch in batches]).tolist()
    if skip_samples not in (0, *ends):
        logger.warning(
            "%s: no batch of epoch %d ends after %d samples, batch size or data were others before: "
            "in the rest of this epoch some samples come twice or not at all",
            source.name, epoch, skip_samples,
        )  # fmt: skip
    work = [(batch, end) for batch, end in zip(batches, ends, strict=True) if end > skip_samples]
    maker = _TrainingBatches(source, config, tokenizer, transform, epoch, work, rank, ranks, prompts, features)
    return _reported(_started(maker, config.workers), source, training=True)


def evaluation_batches(
    source: Source,
    *,
    tokenizer: Tokenizer,
    transform: ImageTransform,
    batch_size: int = 64,
    workers: int = 0,
    limit: int | None = None,
    prompts: Prompts | None = None,
) -> Iterable[Batch]:
    """All samples, or the first `limit`, in order, unchanged, with their first captions (questions, with `prompts`).

    Pictures that can't be decoded are left out, warned about once and counted in the source's `problems`.
    Raises DataError when the source is empty.
    """
    if len(source) == 0:
        raise DataError(f"{source.name}: no samples to evaluate on")
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ConfigError(f"batch_size and limit must be at least 1, got {batch_size} and {limit}")
    stop = len(source) if limit is None else min(limit, len(source))
    work = [list(range(start, min(start + batch_size, stop))) for start in range(0, stop, batch_size)]
    maker = _EvaluationBatches(source, tokenizer, transform, work, prompts)
    return _reported(_started(maker, workers), source, training=False)


class _TrainingBatches(Dataset[Batch | Unreadable]):
    """Makes this rank's part of the batch with a number; lives in the workers."""

    def __init__(
        self,
        source: Source,
        config: LoaderConfig,
        tokenizer: Tokenizer,
        transform: ImageTransform,
        epoch: int,
        work: list[tuple[np.ndarray, int]],
        rank: int,
        ranks: int,
        prompts: Prompts | None,
        features: FeatureStore | None,
    ) -> None:
        self.features = features
        self.source, self.config, self.tokenizer, self.transform = source, config, tokenizer, transform
        self.epoch, self.work, self.rank, self.ranks, self.prompts = epoch, work, rank, ranks, prompts
        self.foreign = shuffled_texts(len(source), config.shuffled, seed=config.seed)

    def __len__(self) -> int:
        return len(self.work)

    def __getitem__(self, number: int) -> Batch | Unreadable:
        batch, consumed = self.work[number]
        skipped: list[str] = []
        rows = [self._row(sample, skipped) for sample in batch[self.rank :: self.ranks].tolist()]
        readable = [row for row in rows if row is not None] or self._borrowed(batch)
        if not readable:
            return Unreadable(tuple(skipped))
        spare = iter(readable * len(rows))
        filled = [row if row is not None else next(spare) for row in rows]
        return collate(filled, self.tokenizer, self.transform, self.config.max_length, consumed, skipped)

    def _borrowed(self, batch: np.ndarray) -> list[Row]:
        """The first readable row of the other ranks, in a list; their own loaders tell what they skipped."""
        for place, sample in enumerate(batch.tolist()):
            row = None if place % self.ranks == self.rank else self._row(sample, [])
            if row is not None:
                return [row]
        return []

    def _row(self, number: int, skipped: list[str]) -> Row | None:
        """The changed sample; where it can't be read, None, and the reason is added to `skipped`."""
        key = self.source.keys[number]
        try:
            if self.features is not None:
                own, image, (seen, picture) = self.source.meta(number), None, self.features.row(number, key)
            else:
                sample = self.source[number]
                # Twice the side that is needed, so that the resize still has something to average.
                image = decode_image(sample.image, name=key, min_side=2 * self.transform.size)
                own, picture = sample.meta, stable_id(sample.image)
        except DataError as error:
            skipped.append(str(error))
            return None
        rng = random.Random(stable_id(f"{self.config.seed}/{self.epoch}/{number}"))
        other = self.foreign.get(number)
        meta = own if other is None else self.source.meta(other)
        # Nobody knows that a foreign text is one: the sample stands for itself, not for its picture's concept.
        concept = self.source.concepts[number] if other is None else f"{OWN}{key}"
        text, caption = vary(meta, rng, self.config.captions)
        prompt, answer, cut = asked(meta, text, self.prompts, rng)
        if image is not None:
            # The picture must also stay a positive of its other captions.
            said = "; ".join([text, *meta["captions"], prompt])
            seen = self.transform.normalise(augment(self.transform.fit(image), said, self.config.augment, rng))
        return Row(key, concept, picture, seen, text, caption, prompt, answer, cut)


class _EvaluationBatches(Dataset[Batch | Unreadable]):
    """Makes the batch with a number, unchanged pictures and first captions."""

    def __init__(
        self, source: Source, tokenizer: Tokenizer, transform: ImageTransform, work: list[list[int]],
        prompts: Prompts | None,
    ) -> None:  # fmt: skip
        self.source, self.tokenizer, self.transform, self.work = source, tokenizer, transform, work
        self.prompts = prompts

    def __len__(self) -> int:
        return len(self.work)

    def __getitem__(self, number: int) -> Batch | Unreadable:
        rows, skipped = [], []
        for place in self.work[number]:
            try:
                sample = self.source[place]
                pixels = self.transform(decode_image(sample.image, name=sample.key))
            except DataError as error:
                skipped.append(str(error))
                continue
            text = first_caption(sample.meta)
            own, kept = stable_id(sample.image), asked(sample.meta, text, self.prompts, None)
            rows.append(Row(sample.key, self.source.concepts[place], own, pixels, text, text, *kept))
        if not rows:
            return Unreadable(tuple(skipped))
        return collate(rows, self.tokenizer, self.transform, 0, self.work[number][-1] + 1, skipped)


def _reported(loader: Iterable[Batch | Unreadable], source: Source, *, training: bool) -> Iterator[Batch]:
    """The batches, what was skipped on the way told and counted."""
    for batch in loader:
        for message in batch.skipped:
            _report(source, message)
        if isinstance(batch, Batch):
            yield batch
        elif training:
            raise DataError(f"{source.name}: no picture of a whole batch can be decoded, first {batch.skipped[0]}")


def _report(source: Source, message: str) -> None:
    """Warn of a picture when it is met first, as long as the source remembers which those were."""
    problems = source.problems
    told = problems.examples.get(UNREADABLE, [])
    if message not in told and len(told) < problems.keep:
        logger.warning("%s: left out: %s", source.name, message)
        if len(told) == problems.keep - 1:
            logger.warning("%s: further pictures that can't be decoded are only counted", source.name)
    problems.add(UNREADABLE, message)


def _started(batches: Dataset[Batch | Unreadable], workers: int) -> Iterable[Batch | Unreadable]:
    """A DataLoader over whole batches; its generator keeps it from drawing on the training's own."""
    settings: dict[str, Any] = {"prefetch_factor": 4, "worker_init_fn": _one_thread} if workers else {}
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
        **settings,
    )


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
