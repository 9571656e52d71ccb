"""Stages with pairs: the step's gradient is the joined batch's, with partners from anywhere and with a teacher."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn

from tests.train.small import ALONE, batch, spawn
from tests.train.small_pairs import STAGES, albef, hidden, vilt
from vlm.models.stage import Taught, joint_loss
from vlm.train.config import TeacherConfig
from vlm.train.distributed import Ranks, spread, unwrapped
from vlm.train.draws import uniform
from vlm.train.step import StepContext, backward
from vlm.train.teacher import Teaching

ROWS = list(range(11))  # odd, so that ranks and micro-batches have unequal rows
STEP = 7


def teaching_of(model: nn.Module) -> Teaching:
    """A teacher that differs from the student, with a queue that holds some rows."""
    torch.manual_seed(5)
    made = Teaching(model, TeacherConfig(decay=0.9, queue=9, alpha=0.4, ramp=1.0), width=16, steps_per_epoch=10)
    with torch.no_grad():
        for parameter in made.teacher.network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    features = nn.functional.normalize(torch.randn(2, 6, 16), dim=-1)
    made.queue.push(*features, torch.tensor([[7, 1], [2, 5003], [3, 3], [4, 4], [5, 5], [6, 6]]))
    return made


def context(model: nn.Module, teaching: Teaching | None, here: Ranks = ALONE, parts: int = 1) -> StepContext:
    return StepContext(here, model, contextlib.nullcontext, seed=3, accumulate=parts, teaching=teaching)


def whole(model: Any, teaching: Teaching | None) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Gradient and losses of the joined batch in one graph, without the engine."""
    rows = hidden(ROWS)

    def draws(name: str, count: int) -> torch.Tensor:
        return uniform(rows.keys, seed=3, moment=f"step {STEP}", name=name, count=count)

    taught, targets = None, {}
    if teaching is not None:
        teacher: Any = teaching.teacher.network
        with torch.no_grad():
            features, states, inputs = teacher(rows)
            targets = teacher.teach(rows, states, inputs) if hasattr(teacher, "teach") else {}
        own, held = {n: features[n] for n in ("image", "text")}, teaching.queue.rows()
        columns = {name: torch.cat([value, held[name]]) for name, value in own.items()}
        taught = Taught(own, columns, torch.cat([rows.ids, held["ids"]]), teaching.alpha(STEP))
    losses = joint_loss(model, rows, draws=draws, taught=taught, targets=targets)
    losses["loss"].backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return gradients, {name: float(value.detach()) for name, value in losses.items()}


def assert_same(found: dict[str, torch.Tensor | None], expected: dict[str, torch.Tensor]) -> None:
    for name, gradient in found.items():
        wanted = expected.get(name)
        if wanted is None:
            assert gradient is None or not gradient.any(), name
            continue
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert sum(gradient.norm() ** 2 for gradient in expected.values()) > 1e-2


CASES = [("vilt", False), ("albef", False), ("albef", True), ("blip", False), ("blip", True), ("blip2", False)]
SETTINGS = [
    ("albef mixed", True),
    ("blip apart", True),
    ("blip as one", False),
    ("captioner", False),
    ("retriever", True),
    ("blip2 without itg", False),
]


@pytest.mark.parametrize(
    ("stage", "taught", "parts"),
    [(*case, parts) for case in CASES for parts in (1, 2, 3, 11)] + [(*case, 3) for case in SETTINGS],
)
def test_accumulated_gradient_is_the_big_batchs(stage: str, taught: bool, parts: int) -> None:
    model = STAGES[stage]()
    expected, losses = whole(copy.deepcopy(model), teaching_of(model) if taught else None)
    teaching = teaching_of(model) if taught else None
    values = backward(model, hidden(ROWS), context(model, teaching, parts=parts), step=STEP, loss_scale=1.0)
    assert_same({name: p.grad for name, p in model.named_parameters()}, expected)
    for name, value in losses.items():
        assert values[name] == pytest.approx(value, abs=1e-5), name
    if teaching is not None:
        assert all(p.grad is None for p in teaching.teacher.network.parameters())
        assert len(teaching.queue) == 9 and values["alpha"] == pytest.approx(0.28)
        assert set(hidden(ROWS).ids[-9:, 1].tolist()) == set(teaching.queue.rows()["ids"][:, 1].tolist())


@pytest.mark.parametrize(("stage", "taught"), CASES)
def test_micro_batches_alone_give_another_gradient(stage: str, taught: bool) -> None:
    """The control: partners from within micro-batches only, and their own contrasts."""
    model = STAGES[stage]()
    expected, _ = whole(copy.deepcopy(model), None)
    for micro in hidden(ROWS).split(3):
        (joint_loss(model, micro)["loss"] * len(micro) / len(ROWS)).backward()
    error = sum((p.grad - expected[name]).norm() ** 2 for name, p in model.named_parameters() if name in expected)
    assert (error / sum(g.norm() ** 2 for g in expected.values())) ** 0.5 > 0.05


def test_loss_scale_multiplies_every_gradient() -> None:
    model = albef()
    expected, _ = whole(copy.deepcopy(model), None)
    backward(model, hidden(ROWS), context(model, None, parts=2), step=STEP, loss_scale=8.0)
    assert_same({n: p.grad for n, p in model.named_parameters()}, {n: 8 * g for n, g in expected.items()})


def test_a_batch_without_hidden_tokens_trains_the_rest() -> None:
    model, rows = albef(), batch(ROWS)
    nothing = rows.with_masks(rows.tokens["input_ids"], torch.full_like(rows.tokens["input_ids"], -100))
    values = backward(model, nothing, context(model, teaching_of(model)), step=0, loss_scale=1.0)
    assert "mlm" not in values and values["loss"] == pytest.approx(values["itc"] + values["itm"], abs=1e-5)


def test_not_finite_pixels_show_in_the_loss() -> None:
    model = vilt()
    rows = dataclasses.replace(hidden(ROWS), pixels=batch(ROWS, broken=4).pixels)
    assert not math.isfinite(backward(model, rows, context(model, None), step=0, loss_scale=1.0)["loss"])


def ranks_task(here: Ranks, kind: str, stage: str, taught: bool, parts: int, expected: dict) -> None:
    inner = STAGES[stage]()
    teaching = teaching_of(inner) if taught else None
    if teaching is not None:
        spread(teaching.teacher.network, kind, here, teacher=True)
    model = spread(inner, kind, here)
    rows = hidden(ROWS[here.rank :: here.count])
    backward(model, rows, context(unwrapped(model), teaching, here, parts), step=STEP, loss_scale=1.0)
    found = {name: p.grad for name, p in unwrapped(model).named_parameters()}
    assert_same({n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items()}, expected)


@pytest.mark.parametrize(
    ("kind", "stage", "taught", "parts"),
    [
        ("ddp", "vilt", False, 2),
        ("ddp", "albef", True, 1),
        ("ddp", "albef", False, 3),
        ("ddp", "albef mixed", True, 2),
        ("fsdp", "albef", True, 2),
        ("fsdp", "vilt", False, 1),
        ("ddp", "blip", True, 2),
        ("ddp", "captioner", False, 2),
        ("fsdp", "blip", True, 2),
        ("fsdp", "blip apart", False, 1),
        ("ddp", "blip2", False, 2),
        ("fsdp", "blip2", False, 2),
    ],
)
def test_two_ranks_equal_one(kind: str, stage: str, taught: bool, parts: int) -> None:
    model = STAGES[stage]()
    expected, _ = whole(copy.deepcopy(model), teaching_of(model) if taught else None)
    spawn(ranks_task, kind, stage, taught, parts, expected)
