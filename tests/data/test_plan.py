"""The plan of an epoch: each sample once, seeded order, buckets of like length."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.data.loader import LoaderConfig, steps_per_epoch
from vlm.data.plan import plan


@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(1, 300),
    size=st.integers(1, 50),
    bucket=st.integers(1, 6),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 99),
)
def test_plan_takes_each_sample_once(n: int, size: int, bucket: int, seed: int, epoch: int) -> None:
    lengths = np.random.default_rng(n).integers(1, 90, n)
    batches = plan(lengths, size, seed=seed, epoch=epoch, bucket_batches=bucket)
    assert sorted(np.concatenate(batches).tolist()) == list(range(n))
    sizes = sorted(map(len, batches))
    odd = [s for s in sizes if s != size]
    assert len(odd) <= 1 and sizes[-1] < 1.5 * size and (sizes[0] >= size / 2 or n < size / 2)
    assert len(batches) == steps_per_epoch(n, LoaderConfig(batch_size=size))
    again = plan(lengths, size, seed=seed, epoch=epoch, bucket_batches=bucket)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


@settings(max_examples=50, deadline=None)
@given(n=st.integers(40, 300), size=st.integers(1, 20), bucket=st.integers(1, 6), seed=st.integers(0, 99))
def test_seed_and_epoch_change_the_order(n: int, size: int, bucket: int, seed: int) -> None:
    lengths = np.random.default_rng(n).integers(1, 90, n)
    orders = {
        tuple(np.concatenate(plan(lengths, size, seed=s, epoch=e, bucket_batches=bucket)).tolist())
        for s, e in ((seed, 0), (seed, 1), (seed + 1, 0))
    }
    assert len(orders) == 3


def test_plan_is_what_runs_were_trained_with() -> None:
    lengths = np.arange(11)[::-1].copy()
    batches = plan(lengths, 4, seed=3, epoch=2, bucket_batches=2)
    assert [batch.tolist() for batch in batches] == [[8, 5, 3], [10, 9, 7, 6], [4, 2, 1, 0]]


def test_buckets_shorten_padding_and_stay_mixed() -> None:
    lengths = np.random.default_rng(0).integers(5, 200, 4000)

    def waste(bucket: int) -> float:
        batches = plan(lengths, 50, seed=0, epoch=0, bucket_batches=bucket)
        return float(np.mean([lengths[b].max() - lengths[b].mean() for b in batches]))

    assert waste(8) < 0.2 * waste(1)
    means = [lengths[b].mean() for b in plan(lengths, 50, seed=0, epoch=0, bucket_batches=80)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.4  # short ones aren't all first
