"""Optimiser, schedule and loss scale: which parameters move, how fast, and when a step is skipped."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlm.errors import ConfigError, TrainingError, nearest
from vlm.train.config import OptimConfig


def freeze(network: nn.Module, prefixes: Iterable[str]) -> list[str]:
    """Take the gradient from parameters whose name starts with one of `prefixes`; returns their names.

    Raises ConfigError when a prefix matches none or nothing is left to train.
    """
    names = [name for name, _ in network.named_parameters()]
    frozen = set()
    for prefix in prefixes:
        matched = [name for name in names if name.startswith(prefix)]
        if not matched:
            raise ConfigError(f"freeze: no parameter starts with {prefix!r}{nearest(prefix, names)}")
        frozen.update(matched)
    for name, parameter in network.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    if len(frozen) == len(names):
        raise ConfigError("freeze: every parameter is frozen, nothing is left to train")
    return sorted(frozen)


def make_optimizer(network: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over what has a gradient, in groups by decay and by factor on the learning rate.

    Only matrices decay (CLIP §2.5): not gains, biases, the temperature, or a [CLS] state of (1, 1, D).
    Raises ConfigError when an `lr_scale` prefix matches no parameter.
    """
    names = [name for name, _ in network.named_parameters()]
    for prefix in config.lr_scale:
        if not any(name.startswith(prefix) for name in names):
            raise ConfigError(f"lr_scale: no parameter starts with {prefix!r}{nearest(prefix, names)}")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            matched = [prefix for prefix in config.lr_scale if name.startswith(prefix)]
            factor = config.lr_scale[max(matched, key=len)] if matched else 1.0
            matrix = sum(size > 1 for size in parameter.shape) >= 2
            decay = config.weight_decay if matrix else 0.0
            groups.setdefault((factor, decay), []).append(parameter)
    listed = [
        {"params": parameters, "weight_decay": decay, "factor": factor}
        for (factor, decay), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
    return torch.optim.AdamW(listed, lr=config.lr, betas=config.betas, eps=config.eps)


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Rate of the step with number `step` (from 0) of `steps`: linear warm-up, then a cosine."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, steps - config.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give each group `rate` times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


@dataclass
class LossScale:
    """Loss scaling of fp16 (arXiv 1710.03740 §3.2); one decision for all ranks, also with sharded gradients.

    torch's GradScaler decides by the gradients that a rank holds; here the decision follows the joint norm.
    """

    value: float = 1.0
    """Factor on the loss; 1 and constant where it isn't needed."""

    dynamic: bool = False
    good: int = 0
    """Steps since the factor last changed."""

    interval: int = 2000
    """Steps without overflow after which the factor doubles."""

    def unscale_(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients by the factor."""
        if self.value != 1.0:
            gradients = [p.grad for p in parameters if p.grad is not None]
            torch._foreach_mul_(gradients, 1.0 / self.value)

    def update(self, finite: bool) -> None:
        """Move the factor after a step: halve on overflow, double after `interval` good ones.

        Raises TrainingError when it sinks below what fp16 can need: the loss itself is broken then.
        """
        if not self.dynamic:
            return
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.good == self.interval:
            self.value, self.good = self.value * 2, 0
        if self.value < 2**-10:
            raise TrainingError(
                "gradients overflow in fp16 at every loss scale: train with train.precision=bf16 or fp32, "
                "or with a lower train.optim.lr"
            )


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Joint norm of all gradients over all ranks' shards, a scalar."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def shorten_(parameters: Iterable[nn.Parameter], norm: Tensor, longest: float) -> None:
    """Scale all gradients so that their joint `norm` is at most `longest`; 0 leaves them."""
    if longest > 0:
        gradients = [p.grad for p in parameters if p.grad is not None]
        factor = (longest / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, float(factor))
