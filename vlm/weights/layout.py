"""What an official checkpoint of ALBEF's kind looks like, and the sizes that its tensors tell."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlm.errors import WeightsError
from vlm.models.transformer import TransformerConfig
from vlm.models.vit import ViTConfig
from vlm.weights.rules import Rule, refuse

HEAD_WIDTH = 64
IMAGE = "visual_encoder"


@dataclass(frozen=True)
class Layout:
    """How a family calls its tensors: all that ALBEF's and BLIP's official files differ in."""

    family: str
    title: str
    """Name in messages."""
    network: Callable[[Any], nn.Module]
    """Configuration to network."""
    knows: Callable[[Mapping[str, Any]], bool]
    """Whether names of tensors are this family's."""
    infer: Callable[[Mapping[str, Tensor], str], Any]
    """Tensors, and where they are from, to a configuration; raises WeightsError naming what is missing."""
    rules: Callable[[Any], list[Rule]]
    """Of the student, by configuration, without the temperature."""
    teacher_rules: Callable[[Any], list[Rule]]
    """Of the teacher, in the student's names of ours."""
    twins: Callable[[Any, str], dict[str, str]]
    """Names that are stored twice, and the name of the same tensor that is read; ``_m`` asks for the teacher's."""
    positions: Callable[[Any, str], list[str]]
    """Names of numbered positions, (1, positions), which are no weights."""
    left_out: tuple[str, ...]
    """Patterns of names that are not needed."""
    training: tuple[str, ...]
    """Patterns of names that training alone needs: teacher and queue."""
    unfit: Callable[[Any], Mapping[str, bool]]
    """Configuration to reasons why the official code can't hold the network, and whether they are so."""


def has(tensors: Mapping[str, Any], *parts: str) -> bool:
    """Whether each of these parts, which names begin with, is there."""
    return all(any(name.startswith(f"{part}.") for name in tensors) for part in parts)


def image_config(
    tensors: Mapping[str, Tensor], *, where: str, head_width: int = HEAD_WIDTH, final_norm_eps: float = 0.0
) -> ViTConfig:
    """The image encoder's sizes, and what they don't tell. Raises WeightsError naming what is missing or odd."""
    needed = [f"{IMAGE}.{end}" for end in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")]
    refuse(where, missing=[name for name in needed if name not in tensors])
    patch, places, hidden = (tensors[name].shape for name in needed)
    side = math.isqrt(places[1] - 1)
    if side**2 + 1 != places[1]:
        raise WeightsError(f"{where}: {places[1]} image positions, expected a square and [CLS]")
    blocks = {int(name.split(".")[2]) for name in tensors if name.startswith(f"{IMAGE}.blocks.")}
    return ViTConfig(
        image_size=side * patch[-1], patch_size=patch[-1], width=patch[0], layers=1 + max(blocks),
        heads=heads(patch[0], where, head_width), mlp_width=hidden[0], final_norm_eps=final_norm_eps,
    )  # fmt: skip


def text_config(
    tensors: Mapping[str, Tensor], prefix: str, *, cross_width: int, types: bool, where: str
) -> TransformerConfig:
    """The sizes of a BERT with cross-attention whose names begin with `prefix`.

    types: whether it has token types. Raises WeightsError naming what is missing or odd.
    """
    ends = [f"embeddings.{name}_embeddings.weight" for name in ("word", "position", *(["token_type"] if types else []))]
    needed = [f"{prefix}.{end}" for end in (*ends, "encoder.layer.0.intermediate.dense.weight")]
    refuse(where, missing=[name for name in needed if name not in tensors])
    words, positions, *kinds, mlp = (tensors[name].shape for name in needed)
    layer = re.compile(rf"{re.escape(prefix)}\.encoder\.layer\.(\d+)\.(\w+)")
    found = {(int(match[1]), match[2]) for name in tensors if (match := layer.match(name))}
    return TransformerConfig(
        vocab_size=words[0], context_length=positions[0], width=words[1], layers=1 + max(i for i, _ in found),
        heads=heads(words[1], where), mlp_width=mlp[0], token_types=kinds[0][0] if kinds else 0,
        cross_layers=tuple(sorted(i for i, part in found if part == "crossattention")), cross_width=cross_width,
    )  # fmt: skip


def heads(width: int, where: str, head_width: int = HEAD_WIDTH) -> int:
    """How many heads of this width a width has. Raises WeightsError where they don't fill it."""
    if width % head_width:
        raise WeightsError(f"{where}: width {width}, expected a multiple of {head_width}")
    return width // head_width


def unfit_towers(config: Any, *, types: bool) -> dict[str, bool]:
    """Reasons why the official towers can't hold ours, and whether they are so.

    types: whether their text towers have token types.
    """
    text, image = config.text, config.image
    return unfit_pools(config) | {
        "its text tower is pre-norm": text.norm != "post",
        "it has no token types" if types else "it has token types": bool(text.token_types) != types,
        "its activation isn't exact GELU": (text.activation, image.activation) != ("gelu", "gelu"),
        "its norm_eps aren't 1e-12 and 1e-6": (text.norm_eps, image.norm_eps) != (1e-12, 1e-6),
        "its image tower has a norm before the first layer": image.pre_norm,
        "its image tower's last norm has an eps of its own": image.own_final_eps,
        f"its heads aren't {HEAD_WIDTH} wide": {text.width // text.heads, image.width // image.heads} != {HEAD_WIDTH},
    }


def unfit_pools(config: Any) -> dict[str, bool]:
    """Reasons why the features can't be held, and whether they are so; a network without an itc head has none."""
    if not hasattr(config, "image_pool") or "itc" not in getattr(config, "heads", ("itc",)):
        return {}
    return {
        "its image feature is a mean over patches": config.image_pool != "cls",
        f"its text feature is {config.text_pool!r}, not the [CLS] state": config.text_pool != "cls",
        "its projections have no bias": not config.projection_bias,
    }


def check_twins(tensors: Mapping[str, Tensor], twins: Mapping[str, str], *, where: str) -> None:
    """Raises WeightsError where a tensor that is stored twice isn't the same both times."""
    for copy, kept in differing(tensors, twins):
        raise WeightsError(f"{where}: {copy} differs from {kept}; this network has one tensor for both")


def differing(tensors: Mapping[str, Tensor], twins: Mapping[str, str]) -> Sequence[tuple[str, str]]:
    """The first pair of names, if any, whose tensors aren't the same."""
    for copy, kept in twins.items():
        if copy in tensors and kept in tensors and not torch.equal(tensors[copy], tensors[kept]):
            return [(copy, kept)]
    return []
