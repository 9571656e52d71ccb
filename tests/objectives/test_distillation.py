"""Momentum distillation: cases by hand, a slow loop, plain ITC as a special case, how rows are cut."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlm.objectives.distillation import itc_taught, soft_targets
from vlm.objectives.itc import itc, soft_cross_entropy

SCALE = torch.tensor(7.0, dtype=torch.float64)


def features(rows: int, seed: int) -> Tensor:
    drawn = torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(drawn, dim=-1)


def case(rows: int = 5, queue: int = 3, seed: int = 0) -> dict[str, Any]:
    """Students and teachers of some rows, a queue, and ids of which some repeat."""
    taught = {"taught_image": features(rows, seed + 2), "taught_text": features(rows, seed + 3)}
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 4, (rows + queue, 2), generator=generator) + torch.tensor([0, 100])
    return {
        "image": features(rows, seed),
        "text": features(rows, seed + 1),
        **taught,
        "images": torch.cat([taught["taught_image"], features(queue, seed + 4)]),
        "texts": torch.cat([taught["taught_text"], features(queue, seed + 5)]),
        "row_ids": ids[:rows],
        "ids": ids,
    }


def loss(given: dict[str, Any], *, scale: Tensor = SCALE, alpha: float = 0.4) -> Tensor:
    named = {name: value for name, value in given.items() if name not in ("image", "text")}
    return itc_taught(given["image"], given["text"], scale=scale, alpha=alpha, **named)


def slow(given: dict[str, Any], alpha: float) -> float:
    """The definition, pair by pair, in plain Python."""

    def softmax(values: list[float]) -> list[float]:
        parts = [math.exp(value) for value in values]
        return [part / sum(parts) for part in parts]

    total = 0.0
    ways = (("image", "taught_image", "texts"), ("text", "taught_text", "images"))
    for rows, taught, columns in ways:
        for i in range(len(given[rows])):
            looked = given[columns]
            student = softmax([7.0 * float(given[rows][i] @ column) for column in looked])
            teacher = softmax([7.0 * float(given[taught][i] @ column) for column in looked])
            same = [bool((given["row_ids"][i] == other).any()) for other in given["ids"]]
            for j in range(len(looked)):
                target = (1 - alpha) * same[j] / sum(same) + alpha * teacher[j]
                total -= 0.5 * target * math.log(student[j])
    return total / len(given["image"])


def test_targets_by_hand() -> None:
    taught = torch.tensor([[0.0, 0.0, math.log(2.0)], [0.0, 0.0, 0.0]])
    positive = torch.tensor([[True, True, False], [False, False, True]])
    expected = torch.tensor([[0.5 * 0.5 + 0.125, 0.5 * 0.5 + 0.125, 0.25], [1 / 6, 1 / 6, 0.5 + 1 / 6]])
    torch.testing.assert_close(soft_targets(taught, positive, 0.5), expected)
    torch.testing.assert_close(soft_targets(taught, positive, 0.0), torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]))
    torch.testing.assert_close(soft_targets(taught, positive, 1.0), taught.softmax(dim=1))


def test_loss_by_hand() -> None:
    """One row, a queue of one: cosines 1 and 0 for the student, 0 and 1 for the teacher, scale ln 3."""
    row, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    given = {
        "image": row, "text": row, "taught_image": other, "taught_text": other,
        "images": torch.cat([row, other]), "texts": torch.cat([row, other]),
        "row_ids": torch.tensor([[1]]), "ids": torch.tensor([[1], [2]]),
    }  # fmt: skip
    # Student softmax (3/4, 1/4), teacher (1/4, 3/4), target (0.6 + 0.4 / 4, 0.4 * 3 / 4).
    expected = -(0.7 * math.log(0.75) + 0.3 * math.log(0.25))
    assert loss(given, scale=torch.tensor(math.log(3.0))).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("rows", "queue"), [(1, 0), (1, 4), (5, 0), (6, 3)])
def test_equals_a_slow_loop(rows: int, queue: int, alpha: float) -> None:
    given = case(rows, queue)
    assert loss(given, alpha=alpha).item() == pytest.approx(slow(given, alpha), rel=1e-9)


def test_without_a_share_it_is_plain_itc_against_the_columns() -> None:
    given = case()
    columns = {name: given[name] for name in ("images", "texts", "row_ids", "ids")}
    torch.testing.assert_close(loss(given, alpha=0.0), itc(given["image"], given["text"], scale=SCALE, **columns))


def test_a_full_share_is_pure_distillation() -> None:
    """The ids don't matter then, and a student that is the teacher has the least loss: the teacher's entropy."""
    given = case()
    shuffled = given | {"ids": given["ids"].flip(0), "row_ids": given["ids"].flip(0)[:5]}
    torch.testing.assert_close(loss(given, alpha=1.0), loss(shuffled, alpha=1.0))
    twin = given | {"image": given["taught_image"], "text": given["taught_text"]}
    logits = [SCALE * given["taught_image"] @ given["texts"].T, SCALE * given["taught_text"] @ given["images"].T]
    entropy = sum(torch.distributions.Categorical(logits=one).entropy().mean() for one in logits) / 2
    torch.testing.assert_close(loss(twin, alpha=1.0), entropy)
    assert loss(given, alpha=1.0) > loss(twin, alpha=1.0)


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(2, 9), cut=st.integers(1, 8), seed=st.integers(0, 1000))
def test_parts_sum_to_the_whole(rows: int, cut: int, seed: int) -> None:
    given, cut = case(rows, seed=seed), min(cut, rows - 1)
    own = ("image", "text", "taught_image", "taught_text", "row_ids")
    parts = [given | {name: given[name][part] for name in own} for part in (slice(cut), slice(cut, None))]
    total = cut * loss(parts[0]) + (rows - cut) * loss(parts[1])
    torch.testing.assert_close(total / rows, loss(given))


def test_only_the_student_and_the_scale_get_a_gradient() -> None:
    given = {n: v.requires_grad_() if v.is_floating_point() else v for n, v in case().items()}
    scale = SCALE.clone().requires_grad_()
    loss(given, scale=scale).backward()
    assert {name for name, value in given.items() if value.grad is not None} == {"image", "text"}
    assert scale.grad is not None and scale.grad != 0
    # The gradient of a cross-entropy against fixed targets: (softmax - target) by the columns.
    with torch.no_grad():
        same = (given["row_ids"][:, None] == given["ids"][None]).any(dim=-1)
        targets = soft_targets(SCALE * given["taught_image"] @ given["texts"].T, same, 0.4)
        softmax = (SCALE * given["image"] @ given["texts"].T).softmax(dim=1)
        expected = 0.5 * SCALE * (softmax - targets) @ given["texts"] / len(targets)
    torch.testing.assert_close(given["image"].grad, expected)


def test_targets_even_over_positives_are_those_of_itc() -> None:
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    positive = torch.eye(6, dtype=torch.bool)[:4] | (torch.rand(4, 6, generator=torch.Generator().manual_seed(2)) > 0.7)
    targets = soft_targets(logits, positive, 0.0)
    expected = soft_cross_entropy(logits, positive)
    torch.testing.assert_close(-(targets * logits.log_softmax(dim=1)).sum(dim=1), expected)
