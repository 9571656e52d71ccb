"""The families of networks that have a configuration of ours: one line a stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from vlm.errors import WeightsError, nearest
from vlm.models.albef import Albef, AlbefConfig
from vlm.models.albef_heads import ClassifierConfig, classifier
from vlm.models.blip import Blip, BlipConfig
from vlm.models.blip2 import Blip2, Blip2Config
from vlm.models.blip2_llm import Blip2Llm, Blip2LlmConfig
from vlm.models.clip import Clip, ClipConfig
from vlm.models.qformer import QFormer, QFormerConfig
from vlm.models.vilt import Vilt, ViltConfig
from vlm.models.vqa import Vqa, VqaConfig
from vlm.weights.llm import complete


@dataclass(frozen=True)
class Family:
    """What a model folder's ``config.json`` and weights become."""

    config: type
    """Its configuration, a dataclass."""
    network: Callable[[Any], nn.Module]
    """That to a network with random weights."""
    complete: Callable[..., None] | None = None
    """Gives a network what it needs and its folder doesn't hold, such as a frozen language model; `llm=` is where that
    is to be found if not by its name."""


FAMILIES = {
    "clip": Family(ClipConfig, Clip),
    "vilt": Family(ViltConfig, Vilt),
    "albef": Family(AlbefConfig, Albef),
    "blip": Family(BlipConfig, Blip),
    "blip2": Family(Blip2Config, Blip2),
    "blip2-llm": Family(Blip2LlmConfig, Blip2Llm, complete),
    "albef-classifier": Family(ClassifierConfig, classifier),
    "vqa": Family(VqaConfig, Vqa),
    "qformer": Family(QFormerConfig, QFormer),
}


def family(name: str, *, where: str = "") -> Family:
    """The family called `name`. Raises WeightsError with the known ones; `where` stands before the message."""
    if name not in FAMILIES:
        start = f"{where}: " if where else ""
        raise WeightsError(f"{start}family {name!r} isn't known{nearest(name, FAMILIES)}; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def family_name(config: Any) -> str:
    """The name of the family that a configuration belongs to."""
    return next(name for name, one in FAMILIES.items() if isinstance(config, one.config))
