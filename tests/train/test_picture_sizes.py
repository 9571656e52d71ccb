"""ViLT on pictures of different size: a rank's own are exchanged with another's, padded and masked."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from tests.train.small import spawn
from tests.train.test_pairs import ROWS, STEP, assert_same, context, hidden, vilt
from vlm.data.batch import Batch
from vlm.models.stage import joint_loss
from vlm.train.distributed import Ranks, spread, unwrapped
from vlm.train.draws import uniform
from vlm.train.step import backward


def shaped(numbers: list[int]) -> Batch:
    """Rows with odd numbers have pictures half as wide again; the widest of the batch sets its width."""
    rows = hidden(numbers)
    wide = torch.tensor(numbers) % 2 == 1
    more = 8 * int(wide.any())
    mask = torch.ones(len(numbers), 16, 16 + more, dtype=torch.bool)
    mask[:, :, 16:] = wide[:, None, None]
    stretched = F.interpolate(rows.pixels, (16, 24), mode="bilinear")[..., : 16 + more]
    pixels = torch.where(wide[:, None, None, None], stretched, F.pad(rows.pixels, (0, more)))
    return dataclasses.replace(rows, pixels=pixels, pixel_mask=mask)


def whole(model: torch.nn.Module) -> tuple[dict[str, torch.Tensor], float]:
    rows = shaped(ROWS)

    def draws(name: str, count: int) -> torch.Tensor:
        return uniform(rows.keys, seed=3, moment=f"step {STEP}", name=name, count=count)

    loss = joint_loss(model, rows, draws=draws)["loss"]
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, float(loss.detach())


@pytest.mark.parametrize("parts", [1, 3])
def test_accumulated_gradient_is_the_big_batchs(parts: int) -> None:
    model = vilt()
    expected, loss = whole(copy.deepcopy(model))
    values = backward(model, shaped(ROWS), context(model, None, parts=parts), step=STEP, loss_scale=1.0)
    assert_same({name: p.grad for name, p in model.named_parameters()}, expected)
    assert values["loss"] == pytest.approx(loss, abs=1e-5)


def ranks_task(here: Ranks, expected: dict[str, torch.Tensor]) -> None:
    model = spread(vilt(), "ddp", here)
    rows = shaped(ROWS[here.rank :: here.count])
    assert rows.pixels.shape[-1] == (16 if here.rank == 0 else 24)
    backward(model, rows, context(unwrapped(model), None, here), step=STEP, loss_scale=1.0)
    assert_same({name: p.grad for name, p in unwrapped(model).named_parameters()}, expected)


def test_two_ranks_with_pictures_of_different_size_equal_one() -> None:
    expected, _ = whole(copy.deepcopy(vilt()))
    spawn(ranks_task, expected)
