"""Intervals, ranks and chance values against hand-computed ones and slow loops."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from vlm.tasks.metrics import Figure, bootstrap, chance_at, grouped_share, mean_interval, ranks_of_best, share, wilson


def test_wilson_by_hand() -> None:
    # 8 of 10 at z = 1.96: middle (0.8 + 0.19207) / 1.38415, half 1.96 / 1.38415 * sqrt(0.016 + 0.0096036).
    assert wilson(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-5)
    assert wilson(0, 10) == pytest.approx((0.0, 0.277533), abs=1e-5)
    assert wilson(10, 10) == pytest.approx((1 - 0.277533, 1.0), abs=1e-5)
    assert wilson(0, 0) == (0.0, 1.0)


def test_share() -> None:
    found = share([True, False, True, True], 0.25)
    assert (found.value, found.chance, found.count) == (0.75, 0.25, 4)
    assert (found.low, found.high) == wilson(3, 4)
    assert share([], 0.1).value == 0


def test_bootstrap_is_seeded_and_covers() -> None:
    values = np.random.default_rng(0).random(400)
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3)
    assert bootstrap(values, seed=3) != bootstrap(values, seed=4)
    low, high = bootstrap(values)
    error = values.std() / np.sqrt(400)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=error / 3)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=error / 3)
    assert bootstrap(np.array([])) == (0.0, 0.0)


def test_groups_widen_the_interval() -> None:
    """Ten copies of each trial say no more than one."""
    values = np.random.default_rng(1).random(60) < 0.5
    alone = bootstrap(values)
    copied = bootstrap(np.repeat(values, 10), groups=np.repeat(np.arange(60), 10))
    careless = bootstrap(np.repeat(values, 10))
    assert copied == pytest.approx(alone)
    assert careless[1] - careless[0] < 0.5 * (alone[1] - alone[0])


def test_groups_may_differ_in_size_and_be_names() -> None:
    low, high = bootstrap(np.array([1.0, 1, 1, 0]), groups=np.array(["a", "a", "a", "b"]))
    assert (low, high) == (0.0, 1.0)


def test_grouped_share_is_never_narrower_than_wilson() -> None:
    none = grouped_share(np.zeros(50, dtype=bool), np.arange(50), 0.1)
    assert (none.low, none.high) == pytest.approx(wilson(0, 50), abs=1e-12)
    every = grouped_share(np.ones(50, dtype=bool), np.arange(50), 0.1)
    assert (every.low, every.high) == pytest.approx(wilson(50, 50))
    hits = np.random.default_rng(2).random(80) < 0.4
    clustered = grouped_share(np.repeat(hits, 5), np.repeat(np.arange(80), 5), 0.1)
    low, high = wilson(int(5 * hits.sum()), 400)
    assert clustered.low < low < clustered.value < high < clustered.high
    assert clustered.count == 400


def test_figure_reads_well() -> None:
    figure = Figure(0.5, 0.4, 0.6, 0.01, 100)
    assert str(figure) == "50.0 % [40.0, 60.0] (chance 1.00 %)"
    assert figure.as_dict() == {"value": 0.5, "low": 0.4, "high": 0.6, "chance": 0.01, "count": 100}


def test_ranks_by_hand() -> None:
    scores = np.array([[0.9, 0.5, 0.7], [0.1, 0.2, 0.3], [0.1, 0.2, 0.3]])
    positives = np.array([[False, True, False], [False, True, True], [True, False, False]])
    assert ranks_of_best(scores, positives).tolist() == [2, 0, 2]


def test_ties_and_broken_scores_count_against() -> None:
    same = np.eye(4, dtype=bool)
    assert ranks_of_best(np.ones((4, 4)), same).tolist() == [3] * 4
    assert ranks_of_best(np.full((4, 4), np.nan), same).tolist() == [3] * 4
    broken = np.where(same, 1.0, np.nan)
    assert ranks_of_best(broken, same).tolist() == [3] * 4


def test_ranks_against_a_sort() -> None:
    rng = np.random.default_rng(3)
    scores = rng.random((40, 25))
    positives = rng.random((40, 25)) < 0.15
    positives[np.arange(40), rng.integers(0, 25, 40)] = True
    slow = []
    for row, good in zip(scores, positives, strict=True):
        order = sorted(range(25), key=lambda column: -row[column])
        slow.append(next(place for place, column in enumerate(order) if good[column]))
    assert ranks_of_best(scores, positives).tolist() == slow


@pytest.mark.parametrize("k", [1, 2, 3, 5, 9])
def test_chance_against_all_draws(k: int) -> None:
    positives = np.array([[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 1, 0]], dtype=bool)
    expected = []
    for row in positives:
        draws = list(combinations(range(6), min(k, 6)))
        expected.append(np.mean([any(row[column] for column in draw) for draw in draws]))
    assert chance_at(k, positives) == pytest.approx(np.mean(expected))


@pytest.mark.parametrize("count", [2, 3, 5, 16])
def test_mean_of_runs_against_scipy(count: int) -> None:
    values = np.random.default_rng(count).normal(3.0, 2.0, count)
    half = stats.t.ppf(0.975, count - 1) * stats.sem(values)
    mean, low, high = mean_interval(values.tolist())
    assert mean == pytest.approx(values.mean())
    assert (mean - low, high - mean) == pytest.approx((half, half), rel=5e-4)  # the table has three decimals


def test_mean_of_one_run_and_of_many() -> None:
    assert mean_interval([2.5]) == (2.5, 2.5, 2.5)
    values = np.random.default_rng(0).normal(0.0, 1.0, 40)
    exact = stats.t.ppf(0.975, 39) * stats.sem(values)
    _, low, high = mean_interval(values.tolist())
    assert exact < (high - low) / 2 < 1.06 * exact  # beyond the table a little too wide, never too narrow
