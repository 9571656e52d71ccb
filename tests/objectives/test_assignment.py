"""Text assignment: which images a text stands before, and what is never drawn."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.objectives.assignment import assign_texts
from vlm.objectives.mlm import IGNORED


def test_by_hand() -> None:
    """Three rows; rows 0 and 1 describe the same thing."""
    positive = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    draws = torch.tensor([[0.1, 0.5, 0.5], [0.5, 0.5, 0.5], [0.9, 0.1, 0.9]])
    found = assign_texts(positive, draws)
    assert found.label.tolist() == [0, 1, 2]
    assert found.first.tolist() == [0, 2, 0] and found.second.tolist() == [2, 1, 1]


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 8), seed=st.integers(0, 10_000))
def test_images_fit_the_label(rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 4, (rows,), generator=generator)
    positive = ids[:, None] == ids[None]
    found = assign_texts(positive, torch.rand(rows, 3, generator=generator))
    for row in range(rows):
        first, second, label = int(found.first[row]), int(found.second[row]), int(found.label[row])
        others = int((~positive[row]).sum())
        if others == 0:
            assert label == IGNORED
            continue
        assert (first == row) == (label == 0) and (second == row) == (label == 1)
        assert not positive[row, first] or label == 0
        assert not positive[row, second] or label == 1
        assert first != second or others == 1


def test_labels_are_as_likely() -> None:
    draws = torch.rand(6000, 3, generator=torch.Generator().manual_seed(1))
    positive = torch.eye(20, dtype=torch.bool)
    labels = torch.cat([assign_texts(positive, part).label for part in draws.split(20)])
    torch.testing.assert_close(labels.bincount() / 6000, torch.full((3,), 1 / 3), atol=0.02, rtol=0)
