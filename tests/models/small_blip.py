"""A small BLIP with random, distinct weights."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.models.small_albef import ALBEF
from vlm.models.blip import Blip, BlipConfig

DEC, ENC = 48, 49
BLIP = BlipConfig(
    image=ALBEF.image, text=replace(ALBEF.text, cross_layers=(0, 1, 2, 3)), embed_dim=16, dec_id=DEC, enc_id=ENC
)


def build(config: BlipConfig = BLIP, seed: int = 0) -> Blip:
    """A network whose every tensor is random and large enough for each part to matter."""
    torch.manual_seed(seed)
    model = Blip(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "log_scale":
                parameter.add_(torch.randn_like(parameter) * 0.15)
    return model
