"""Which samples stand in which batch of an epoch, and whose texts they get where these are shuffled."""

from __future__ import annotations

import numpy as np

from vlm.errors import ConfigError


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


def shuffled_texts(samples: int, share: float, *, seed: int) -> dict[int, int]:
    """Samples that get another's texts, and whose: a share of them, passed on in a circle of random order."""
    count = round(share * samples)
    if count < 2:
        return {}
    chosen = np.random.default_rng((seed, samples)).permutation(samples)[:count]
    return dict(zip(chosen.tolist(), np.roll(chosen, 1).tolist(), strict=True))
