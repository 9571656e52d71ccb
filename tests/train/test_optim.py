"""Which parameters move and how fast; hand-computed schedule; the fp16 loss scale."""

import pytest
import torch

from tests.train.small import network
from vlm.errors import ConfigError, TrainingError
from vlm.train.config import OptimConfig
from vlm.train.optim import (
    LossScale,
    freeze,
    gradient_norm,
    learning_rate,
    make_optimizer,
    set_learning_rate,
    shorten_,
)


def test_only_matrices_decay():
    model = network()
    optimizer = make_optimizer(model, OptimConfig(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        matrix = name.endswith("weight") and "norm" not in name
        # Tables of positions are matrices too; a single [CLS] state is none.
        matrix |= name in ("image.trunk.pos_embed", "text.positions", "text.tokens", "text.types")
        assert decay[id(parameter)] == (0.3 if matrix else 0.0), name


def test_longest_prefix_sets_the_rate():
    model = network()
    scales = {"text.": 0.1, "text.layers.1.": 0.5}
    optimizer = make_optimizer(model, OptimConfig(lr_scale=scales))
    set_learning_rate(optimizer, 2.0)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        expected = 1.0 if name.startswith("text.layers.1.") else 0.2 if name.startswith("text.") else 2.0
        assert rate[id(parameter)] == pytest.approx(expected), name


def test_schedule():
    config = OptimConfig(lr=1.0, warmup=4, final_lr=0.1)
    assert [learning_rate(s, 104, config) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(4, 104, config) == 1.0
    assert learning_rate(54, 104, config) == pytest.approx(0.55)
    assert learning_rate(104, 104, config) == pytest.approx(0.1)
    assert learning_rate(500, 104, config) == pytest.approx(0.1)


def test_freezing_everything_is_refused():
    with pytest.raises(ConfigError, match="nothing is left"):
        freeze(network(), [""])


def test_norm_and_shortening():
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    norm = gradient_norm(parameters)
    assert float(norm) == 5.0
    shorten_(parameters, norm, 10.0)
    assert parameters[1].grad[1] == 4.0
    shorten_(parameters, norm, 1.0)
    torch.testing.assert_close(parameters[1].grad[1], torch.tensor(0.8))


def test_loss_scale_follows_overflow():
    scale = LossScale(8.0, dynamic=True, interval=2)
    scale.update(False)
    assert scale.value == 4.0
    scale.update(True)
    scale.update(True)
    assert scale.value == 8.0
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.tensor([16.0])
    scale.unscale_([parameter])
    assert parameter.grad.item() == 2.0
    with pytest.raises(TrainingError, match="bf16"):
        for _ in range(50):
            scale.update(False)
