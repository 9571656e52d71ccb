"""ALBEF's official pre-training checkpoints: their sizes, and what they can't hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vlm.models.albef import Albef, AlbefConfig
from vlm.weights.keymaps.albef import LEFT_OUT, TEXT, TRAINING, albef_rules, teacher_rules, tied
from vlm.weights.layout import IMAGE, Layout, has, image_config, text_config, unfit_towers
from vlm.weights.rules import refuse


def infer_config(tensors: Mapping[str, Tensor], where: str) -> AlbefConfig:
    """The settings that an official checkpoint's tensors tell; heads are 64 wide.

    Raises WeightsError naming the tensors that are missing or make no sense.
    """
    refuse(where, missing=[name for name in ("vision_proj.weight", "temp") if name not in tensors])
    image = image_config(tensors, where=where)
    return AlbefConfig(
        image=image,
        text=text_config(tensors, TEXT.format(""), cross_width=image.width, types=True, where=where),
        embed_dim=tensors["vision_proj.weight"].shape[0],
    )


def _knows(tensors: Mapping[str, Any]) -> bool:
    return has(tensors, IMAGE, TEXT.format(""))


def _twins(config: Any, suffix: str) -> dict[str, str]:
    return tied(suffix)


def _positions(config: Any, suffix: str) -> list[str]:
    return [f"{TEXT.format(suffix)}.embeddings.position_ids"]


def _unfit(config: AlbefConfig) -> dict[str, bool]:
    return unfit_towers(config, types=True)


ALBEF = Layout(
    family="albef", title="ALBEF", network=Albef, knows=_knows, infer=infer_config, rules=albef_rules,
    teacher_rules=teacher_rules, twins=_twins, positions=_positions, left_out=LEFT_OUT,
    training=TRAINING, unfit=_unfit,
)  # fmt: skip
