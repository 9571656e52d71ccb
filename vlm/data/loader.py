"""Batches of an epoch: which samples, in what order, on which rank; the same for any number of workers."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vlm.data.augment import Augment, augment
from vlm.data.batch import Batch
from vlm.data.captions import CaptionVariation, first_caption, vary
from vlm.data.images import decode_image
from vlm.data.samples import Problems, Sample, caption_id, stable_id
from vlm.data.tokenizers import Tokenizer
from vlm.data.transforms import ImageTransform
from vlm.errors import ConfigError, DataError

logger = logging.getLogger("vlm.data")


class Source(Protocol):
    """Samples by number; what `vlm.data.sources.open_source` gives."""

    name: str
    lengths: np.ndarray
    """(n,) characters of each sample's caption, for buckets."""
    problems: Problems

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Sample:
        """The sample, its picture still encoded."""

    def fingerprint(self) -> str:
        """Hash of the content, the same wherever it lies."""


@dataclass(frozen=True)
class LoaderConfig:
    """How samples become batches."""

    batch_size: int = 256
    """Samples of a step over all ranks and micro-batches."""
    workers: int = 2
    """Processes of each rank that decode; 0 decodes in the training process. Never changes a batch."""
    max_length: int = 0
    """Longest text in tokens, longer ones are cut; 0 for the model's own bound."""
    bucket_batches: int = 16
    """Batches that are sorted by caption length together, so that a batch's texts are about as long as each
    other; their samples and their order stay random. 1 for none."""
    seed: int = 0
    """Set by the engine to the run's own."""
    augment: Augment = field(default_factory=Augment)
    captions: CaptionVariation = field(default_factory=CaptionVariation)


def plan(lengths: np.ndarray, batch_size: int, *, seed: int, epoch: int, bucket_batches: int = 1) -> list[np.ndarray]:
    """The global batches of an epoch, each sample in exactly one of them.

    A permutation by (seed, epoch) is cut into runs of `bucket_batches` batches; each run is sorted by length
    and cut, and its batches are shuffled. The last batch is smaller where the size doesn't divide n; when it
    would hold fewer than half a batch it joins the one before, since a contrast over a few rows says little.
    Raises ConfigError when the size is below 1.
    """
    if batch_size < 1:
        raise ConfigError(f"loader.batch_size must be at least 1, got {batch_size}")
    generator = np.random.default_rng((seed, epoch))
    order = generator.permutation(len(lengths))
    batches: list[np.ndarray] = []
    run = batch_size * max(1, bucket_batches)
    for start in range(0, len(order), run):
        part = order[start : start + run]
        if bucket_batches > 1:
            part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    small = [batch for batch in batches if len(batch) < batch_size]
    whole = [batch for batch in batches if len(batch) == batch_size]
    if small and whole and len(small[0]) < batch_size / 2:
        whole[-1] = np.concatenate([whole[-1], small.pop()])
    whole = whole + small
    return [whole[number] for number in generator.permutation(len(whole))]


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
) -> Iterable[Batch]:
    """This rank's training batches of an epoch, from after the first `skip_samples` of it.

    Rank r takes rows r, r + ranks, ... of each global batch, so every rank makes the same number of steps.
    Order, text and picture of a sample depend on (seed, epoch, sample) alone. A picture that can't be decoded
    gives its place to the next readable one of the rank's batch, so that ranks stay in step, and is reported.
    Raises DataError when the source is empty or no picture of a batch can be decoded, ConfigError when a
    batch has fewer samples than there are ranks.
    """
    if len(source) == 0:
        raise DataError(f"{source.name}: no samples to train on")
    batches = plan(
        source.lengths,
        config.batch_size,
        seed=config.seed,
        epoch=epoch,
        bucket_batches=config.bucket_batches,
    )
    if min(map(len, batches)) < ranks:
        raise ConfigError(
            f"a batch of {min(map(len, batches))} samples can't be shared by {ranks} ranks: "
            "raise loader.batch_size, or train on fewer ranks"
        )
    ends = np.cumsum([len(batch) for batch in batches]).tolist()
    work = [(batch[rank::ranks].tolist(), end) for batch, end in zip(batches, ends, strict=True) if end > skip_samples]
    maker = _TrainingBatches(source, config, tokenizer, transform, epoch, work)
    return _reported(DataLoader(maker, batch_size=None, **_processes(config.workers)))


def evaluation_batches(
    source: Source,
    *,
    tokenizer: Tokenizer,
    transform: ImageTransform,
    batch_size: int = 64,
    workers: int = 0,
) -> Iterable[Batch]:
    """All samples in order, unchanged, with their first captions; unreadable ones are left out, reported."""
    if len(source) == 0:
        raise DataError(f"{source.name}: no samples to evaluate on")
    numbers = [list(range(i, min(i + batch_size, len(source)))) for i in range(0, len(source), batch_size)]
    work = [(part, part[-1] + 1) for part in numbers]
    maker = _EvaluationBatches(source, tokenizer, transform, work)
    return _reported(DataLoader(maker, batch_size=None, **_processes(workers)))


def collate(
    rows: Sequence[tuple[Sample, torch.Tensor, str]],
    tokenizer: Tokenizer,
    *,
    consumed: int = 0,
    skipped: Sequence[str] = (),
) -> Batch:
    """Rows of (sample, pixels (3, H, W), text) as one batch."""
    ids = [[stable_id(str(sample.meta.get("concept") or sample.key)), caption_id(text)] for sample, _, text in rows]
    return Batch(
        torch.stack([pixels for _, pixels, _ in rows]),
        tokenizer([text for _, _, text in rows]),
        torch.tensor(ids, dtype=torch.int64),
        tuple(sample.key for sample, _, _ in rows),
        consumed,
        tuple(skipped),
    )


class _TrainingBatches(Dataset[Batch]):
    """Makes the batch with a number; lives in the workers."""

    def __init__(
        self,
        source: Source,
        config: LoaderConfig,
        tokenizer: Tokenizer,
        transform: ImageTransform,
        epoch: int,
        work: list[tuple[list[int], int]],
    ) -> None:
        self.source, self.config, self.tokenizer = source, config, tokenizer
        self.transform, self.epoch, self.work = transform, epoch, work

    def __len__(self) -> int:
        return len(self.work)

    def __getitem__(self, number: int) -> Batch:
        numbers, consumed = self.work[number]
        rows: list[tuple[Sample, torch.Tensor, str] | None] = []
        skipped = []
        for sample_number in numbers:
            sample = self.source[sample_number]
            rng = random.Random(stable_id(f"{self.config.seed}/{self.epoch}/{sample_number}"))
            text = vary(sample.meta, rng, self.config.captions)
            try:
                image = decode_image(sample.image, name=sample.key)
            except DataError as error:
                skipped.append(str(error))
                rows.append(None)
                continue
            image = augment(self.transform.fit(image), text, self.config.augment, rng)
            rows.append((sample, self.transform.normalise(image), text))
        readable = [row for row in rows if row is not None]
        if not readable:
            raise DataError(f"{self.source.name}: no picture of a whole batch can be decoded: {skipped[0]}")
        spare = iter(readable * len(rows))
        filled = [row if row is not None else next(spare) for row in rows]
        return collate(filled, self.tokenizer, consumed=consumed, skipped=skipped)


class _EvaluationBatches(Dataset["Batch | list[str]"]):
    """Makes the batch with a number, unchanged pictures and first captions."""

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        transform: ImageTransform,
        work: list[tuple[list[int], int]],
    ) -> None:
        self.source, self.tokenizer, self.transform, self.work = source, tokenizer, transform, work

    def __len__(self) -> int:
        return len(self.work)

    def __getitem__(self, number: int) -> Batch | list[str]:
        numbers, consumed = self.work[number]
        rows, skipped = [], []
        for sample_number in numbers:
            sample = self.source[sample_number]
            try:
                pixels = self.transform(decode_image(sample.image, name=sample.key))
            except DataError as error:
                skipped.append(str(error))
                continue
            rows.append((sample, pixels, first_caption(sample.meta)))
        if not rows:
            return skipped
        return collate(rows, self.tokenizer, consumed=consumed, skipped=skipped)


def _reported(loader: Iterable[Batch | list[str]]) -> Iterator[Batch]:
    """The batches, with a warning for each picture that was skipped on the way."""
    for batch in loader:
        skipped = batch if isinstance(batch, list) else batch.skipped
        for message in skipped:
            logger.warning("skipped: %s", message)
        if not isinstance(batch, list):
            yield batch


def _processes(workers: int) -> dict[str, Any]:
    settings: dict[str, Any] = {"num_workers": workers, "pin_memory": torch.cuda.is_available()}
    if workers:
        settings |= {"prefetch_factor": 4, "worker_init_fn": _one_thread}
    return settings


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
