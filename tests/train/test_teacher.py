"""The teacher follows, the queue turns: any batch size with any length."""

import pytest
import torch
from torch import nn

from vlm.train.config import TeacherConfig
from vlm.train.teacher import EmaTeacher, FeatureQueue, Teaching


def rows(start: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features and ids that tell their row's number."""
    numbers = torch.arange(start, start + count)
    return numbers[:, None].float(), -numbers[:, None].float(), torch.stack([numbers, numbers], dim=1)


@pytest.mark.parametrize("length", [1, 3, 7, 64])
@pytest.mark.parametrize("batches", [[4, 4, 4], [5, 1, 9, 2], [100], [3]])
def test_queue_holds_the_latest_rows(length: int, batches: list[int]) -> None:
    queue, start = FeatureQueue(length, 1, 2), 0
    for count in batches:
        queue.push(*rows(start, count))
        start += count
        held = queue.rows()
        expected = set(range(max(0, start - length), start))
        assert set(held["ids"][:, 0].tolist()) == expected == set(held["image"].flatten().int().tolist())
        assert torch.equal(held["text"], -held["image"]) and len(queue) == len(expected)
        assert int(queue.pointer) == start % length


def test_queue_of_no_rows_stays_empty() -> None:
    queue = FeatureQueue(0, 4, 2)
    queue.push(torch.ones(3, 4), torch.ones(3, 4), torch.ones(3, 2, dtype=torch.int64))
    assert len(queue) == 0 and queue.rows()["image"].shape == (0, 4)


def test_teacher_follows_by_hand() -> None:
    student = nn.Linear(2, 1, bias=False)
    teacher = EmaTeacher(student, 0.75)
    start = student.weight.detach().clone()
    with torch.no_grad():
        student.weight += 4.0
    assert teacher.distance(student) == pytest.approx(
        float((4 * torch.ones(2)).norm() / student.weight.detach().norm())
    )
    teacher.update(student)
    torch.testing.assert_close(teacher.network.weight, start + 1.0)
    teacher.update(student)
    torch.testing.assert_close(teacher.network.weight, start + 1.75)


def test_teacher_has_no_gradient_and_sits_in_eval_mode() -> None:
    student = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train()
    teacher = EmaTeacher(student, 0.9)
    assert not any(p.requires_grad for p in teacher.network.parameters()) and not teacher.network.training
    assert all(p.requires_grad for p in student.parameters())
    assert teacher.network[0].weight.data_ptr() != student[0].weight.data_ptr()


def test_alpha_ramps_over_the_first_epochs() -> None:
    config = TeacherConfig(decay=0.9, queue=4, alpha=0.4, ramp=2.0)
    teaching = Teaching(nn.Linear(1, 1), config, width=4, steps_per_epoch=5)
    assert [round(teaching.alpha(step), 6) for step in (0, 1, 5, 10, 99)] == [0.0, 0.04, 0.2, 0.4, 0.4]
    flat = Teaching(nn.Linear(1, 1), TeacherConfig(decay=0.9, ramp=0.0), width=4, steps_per_epoch=5)
    assert flat.alpha(0) == 0.4
