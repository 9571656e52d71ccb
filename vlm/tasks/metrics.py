"""Figures with intervals and chance values; pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Figure:
    """A share with its 95 % interval and what guessing gives."""

    value: float
    low: float
    high: float
    chance: float
    count: int

    def as_dict(self) -> dict[str, float | int]:
        """Rounded JSON values."""
        found = {"value": self.value, "low": self.low, "high": self.high, "chance": self.chance}
        return {name: round(number, 6) for name, number in found.items()} | {"count": self.count}

    def __str__(self) -> str:
        value, low, high = (100 * number for number in (self.value, self.low, self.high))
        return f"{value:.1f} % [{low:.1f}, {high:.1f}] (chance {100 * self.chance:.2f} %)"


def wilson(hits: int, count: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share (E. B. Wilson, 1927); (0, 1) when nothing was counted."""
    if count == 0:
        return 0.0, 1.0
    share, square = hits / count, z * z / count
    middle = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def share(hits: Sequence[bool] | np.ndarray, chance: float) -> Figure:
    """How many of independent trials hit, with Wilson's interval."""
    array = np.asarray(hits, dtype=bool)
    low, high = wilson(int(array.sum()), len(array))
    return Figure(float(array.mean()) if len(array) else 0.0, low, high, chance, len(array))


T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom."""


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of a few independent runs with its 95 % interval (Student's t); the mean alone where there is one run."""
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if len(array) < 2:
        return mean, mean, mean
    # Beyond the table the last quantile is a little too wide, never too narrow.
    quantile = T95[min(len(array) - 1, len(T95)) - 1]
    half = quantile * float(array.std(ddof=1)) / math.sqrt(len(array))
    return mean, mean - half, mean + half


def bootstrap(
    values: np.ndarray, *, groups: np.ndarray | None = None, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of a mean; whole groups are drawn when trials of one group hang together.

    values: (n,). groups: (n,) integers or names, such as the concept of each trial; None draws each trial.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0:
        return 0.0, 0.0
    rows = np.stack([values, np.ones(len(values))], axis=1)
    low, high = bootstrap_sums(rows, lambda sums: sums[:1] / sums[1], groups=groups, draws=draws, seed=seed)
    return float(low[0]), float(high[0])


def bootstrap_sums(
    rows: np.ndarray,
    figures: Callable[[np.ndarray], np.ndarray],
    *,
    groups: np.ndarray | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile intervals, (F,) each, of figures that follow from what trials add up to, such as BLEU.

    rows: (n, k), at least one. figures: sums (k,) to (F,). groups: as for `bootstrap`.
    """
    sums = np.asarray(rows, dtype=np.float64)
    if groups is not None:
        _, place = np.unique(groups, return_inverse=True)
        sums = np.stack([np.bincount(place, weights=column) for column in sums.T], axis=1)
    rng = np.random.default_rng(seed)
    found = [figures(sums[rng.integers(0, len(sums), len(sums))].sum(axis=0)) for _ in range(draws)]
    low, high = np.percentile(np.stack(found), [2.5, 97.5], axis=0)
    return low, high


def grouped_share(hits: np.ndarray, groups: np.ndarray, chance: float, *, seed: int = 0) -> Figure:
    """How many trials hit, with a bootstrap interval over groups that is nowhere narrower than Wilson's.

    Drawing whole groups widens the interval where trials of a group hang together; Wilson's keeps it honest
    where all trials or none hit, which leaves a bootstrap nothing to draw from.
    """
    alone = share(hits, chance)
    low, high = bootstrap(hits, groups=groups, seed=seed)
    if not len(hits):
        return alone
    return Figure(alone.value, min(low, alone.low), max(high, alone.high), chance, alone.count)


def ranks_of_best(scores: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Rank, from 0, of each row's best positive: how many negatives stand before it, ties against us.

    scores: (queries, candidates). positives: the same shape, boolean, at least one true in each row. A row's
    recall at k is 1 where its rank is below k.
    """
    best = np.where(positives, scores, -np.inf).max(axis=1)
    # Not `scores >= best`: what isn't a number would then stand first.
    return (~(scores < best[:, None]) & ~positives).sum(axis=1)


def chance_at(k: int, positives: np.ndarray) -> float:
    """What guessing gives: mean over rows of the chance that k random candidates hold a positive."""
    total = positives.shape[1]
    rows = []
    for count in positives.sum(axis=1):
        miss = 1.0
        for draw in range(min(k, total)):
            miss *= max(0.0, (total - count - draw) / (total - draw))
        rows.append(1 - miss)
    return float(np.mean(rows))
