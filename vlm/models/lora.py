"""LoRA (arXiv 2106.09685) on parts of a network: ``y = W x + alpha / rank * B A x``, W frozen, by ``peft``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vlm.errors import ConfigError
from vlm.models.int8 import Int8Linear

MARK = "lora_"
"""In the name of each parameter that LoRA adds."""
BASE = ".base_layer."
"""In the name of each parameter that it stands beside."""


@dataclass(frozen=True)
class LoraConfig:
    """Which linear layers get an addition of low rank, and how large it is."""

    rank: int = 0
    """Columns of A and rows of B; 0 for no LoRA."""
    alpha: float = 16.0
    """Over the rank, the factor on what is added."""
    targets: dict[str, tuple[str, ...]] = field(default_factory=lambda: {"llm": ("q_proj", "v_proj")})
    """By part of the network (`llm`, `image`, `qformer`), endings of the names of its linear layers: such as qkv for
    the image encoder, [q, kv] for a Q-Former."""

    def __post_init__(self) -> None:
        if self.rank < 0 or not self.alpha > 0:
            raise ConfigError(f"lora: rank must be at least 0 and alpha above 0, got {self.rank} and {self.alpha}")


def add_lora(part: nn.Module, layers: Sequence[str], config: LoraConfig) -> None:
    """Freeze a part and put an addition beside those of its linear layers whose name ends so; at first it adds 0.

    What is added is fp32, also beside half-precision weights: its steps are too small for those. Raises ConfigError
    when peft isn't installed, the part has no such layers, or they are held in int8.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError("lora needs peft: pip install 'vlm[llm]', or set model.lora.rank=0") from error
    ends = tuple(f".{layer}" for layer in layers)
    if any(isinstance(one, Int8Linear) and f".{name}".endswith(ends) for name, one in part.named_modules()):
        raise ConfigError(
            f"lora.targets {list(layers)}: these layers are held in int8, beside which nothing can be learnt; set "
            "model.llm.weights to bf16 or nf4, or leave llm out of lora.targets"
        )
    factor: Any = config.alpha  # a float works, though peft calls it an int
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=factor, target_modules=list(layers), lora_dropout=0.0, bias="none"
    )
    try:
        peft.inject_adapter_in_model(settings, part)
    except ValueError as error:
        found = sorted({name.rsplit(".", 1)[-1] for name, one in part.named_modules() if isinstance(one, nn.Linear)})
        raise ConfigError(f"lora.targets {list(layers)}: no such layer; there are {', '.join(found)}") from error
    for name, parameter in part.named_parameters():
        if MARK in name and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def add_all(network: nn.Module, config: LoraConfig) -> None:
    """Add LoRA to every part of a network that `config` names. Raises ConfigError for a part that isn't there."""
    if not config.rank:
        return
    parts: Mapping[str, Any] = dict(network.named_children())
    unknown = [name for name in config.targets if name not in parts]
    if unknown:
        raise ConfigError(f"lora.targets: no part {', '.join(unknown)}; there are {', '.join(parts)}")
    for name, layers in config.targets.items():
        add_lora(parts[name], layers, config)


def merge_lora(network: nn.Module) -> int:
    """Put every addition into the weight that it stands beside, in place; how many there were.

    The network says the same, a little faster, and has no LoRA any more, but beside weights in four bits: rounded to
    those, most of an addition would be lost, so it stays.
    """
    found: list[tuple[str, Any]] = [(name, module) for name, module in network.named_modules() if _mergeable(module)]
    for name, layer in found:
        above, _, last = name.rpartition(".")
        layer.merge()
        setattr(network.get_submodule(above), last, layer.get_base_layer())
    return len(found)


def _mergeable(module: Any) -> bool:
    is_lora = all(hasattr(module, name) for name in ("merge", "lora_A", "get_base_layer"))
    return is_lora and bool(module.get_base_layer().weight.is_floating_point())
