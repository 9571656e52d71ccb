"""The step's gradient is the joined batch's: over micro-batches, ranks, unequal rows and dropped patches."""

import contextlib
import dataclasses

import pytest
import torch
from torch import nn

from tests.train.small import ALONE, batch, network, spawn
from vlm.models.vit import ViTConfig
from vlm.train.distributed import spread, unwrapped
from vlm.train.step import StepContext, backward

ROWS = list(range(11))  # odd, so that ranks and micro-batches have unequal rows


def context(here=ALONE, accumulate=1, model=None) -> StepContext:
    return StepContext(here, model, contextlib.nullcontext, seed=3, accumulate=accumulate)


def whole_gradient(model: nn.Module) -> dict[str, torch.Tensor]:
    rows = batch(ROWS)
    model.loss(rows)["loss"].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, f"{name} has no gradient: the comparison would show nothing"
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


SETTINGS = [{}, {"loss": "sigmoid", "logit_bias_init": -3.0}, {"chunk": 4}]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("parts", [1, 2, 3, 11])
def test_accumulated_gradient_is_the_big_batchs(settings, parts):
    expected = whole_gradient(network(**settings))
    model = network(**settings)
    values = backward(model, batch(ROWS), context(accumulate=parts, model=model), step=0, loss_scale=1.0)
    assert_same(gradients(model), expected)
    rows = batch(ROWS)
    assert values["loss"] == pytest.approx(float(model.loss(rows)["loss"].detach()), abs=1e-5)


def test_naive_accumulation_is_far_off():
    """The control: without cached features the gradient is another one."""
    expected = whole_gradient(network())
    model = network()
    for micro in batch(ROWS).split(3):
        (model.loss(micro)["loss"] / 3).backward()
    error = sum((gradients(model)[n] - g).norm() ** 2 for n, g in expected.items()) ** 0.5
    assert error / sum(g.norm() ** 2 for g in expected.values()) ** 0.5 > 0.1


def test_second_pass_repeats_the_dropped_patches():
    """With patch dropout the cached features are those that get the gradient: a repeat gives the same one."""
    image = ViTConfig(image_size=32, patch_size=8, width=32, layers=2, heads=2, mlp_width=64, patch_dropout=0.5)
    rows = dataclasses.replace(batch(ROWS), pixels=torch.randn(11, 3, 32, 32))
    found = []
    for _ in range(2):
        model = network(image=image).train()
        backward(model, rows, context(accumulate=3, model=model), step=5, loss_scale=1.0)
        found.append(gradients(model))
        torch.rand(7)  # moves the global generator: the step must not depend on it
    assert_same(found[1], found[0])


def test_loss_scale_multiplies_the_gradient():
    expected = {name: 8 * g for name, g in whole_gradient(network()).items()}
    model = network()
    backward(model, batch(ROWS), context(model=model), step=0, loss_scale=8.0)
    assert_same(gradients(model), expected)


def test_micro_batches_hold_the_memory_of_one():
    """What autograd keeps for the towers shrinks with the number of parts."""

    def peak(parts: int) -> int:
        model, alive, most = network(), 0, 0

        class Held:
            def __init__(self, tensor):
                nonlocal alive, most
                self.tensor = tensor
                alive += tensor.numel()
                most = max(most, alive)

            def __del__(self):
                nonlocal alive
                alive -= self.tensor.numel()

        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            backward(model, batch(list(range(24))), context(accumulate=parts, model=model), step=0, loss_scale=1.0)
        return most

    assert peak(6) < 0.35 * peak(1)


def test_not_finite_loss_leaves_no_gradient():
    model = network()
    values = backward(model, batch(ROWS, broken=4), context(model=model), step=0, loss_scale=1.0)
    assert not all(map(torch.isfinite, map(torch.tensor, values.values())))
    assert all(p.grad is None for p in model.parameters())


def ranks_task(here, kind, parts, settings, expected):
    model = spread(network(**settings), kind, here)
    inner = unwrapped(model)
    rows = batch(ROWS[here.rank :: here.count])
    backward(model, rows, context(here, parts, inner), step=0, loss_scale=1.0)
    found = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in gradients(inner).items()}
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("kind", "parts", "settings"),
    [("ddp", 1, SETTINGS[0]), ("ddp", 2, SETTINGS[1]), ("fsdp", 2, SETTINGS[0])],
)
def test_two_ranks_equal_one(kind, parts, settings):
    spawn(ranks_task, kind, parts, settings, whole_gradient(network(**settings)))
