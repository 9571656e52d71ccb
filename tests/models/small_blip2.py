"""A small BLIP-2, first stage, with random, distinct weights."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from tests.models.small_albef import ALBEF
from tests.models.small_qformer import QFORMER
from vlm.models.blip2 import Blip2, Blip2Config

BLIP2 = Blip2Config(image=ALBEF.image, qformer=QFORMER, embed_dim=16)


def build(config: Blip2Config = BLIP2, seed: int = 0) -> Blip2:
    """A network whose every tensor is random and large enough for each part to matter."""
    torch.manual_seed(seed)
    model = Blip2(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "log_scale":
                parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def digest(network: nn.Module) -> str:
    """A hash of all weights."""
    found = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        found.update(name.encode() + value.numpy().tobytes())
    return found.hexdigest()
