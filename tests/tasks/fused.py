"""Models that judge pairs, small enough to check by running each pair whole, and one to work out by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tests.tasks.small import WORDS, ColourNetwork, colour_model
from vlm.data.transforms import ImageTransform
from vlm.models.albef import Albef, AlbefConfig
from vlm.models.blip import Blip, BlipConfig
from vlm.models.blip2 import Blip2, Blip2Config
from vlm.models.qformer import QFormerConfig
from vlm.models.transformer import TransformerConfig
from vlm.models.vilt import Vilt, ViltConfig
from vlm.models.vit import ViTConfig
from vlm.weights.loaded import VisionLanguageModel

PLAIN = ImageTransform(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "squash", "bicubic")
IMAGE = ViTConfig(image_size=16, patch_size=8, width=32, layers=2, heads=2, mlp_width=64)
TEXT = TransformerConfig(
    vocab_size=WORDS.vocab_size, context_length=64, width=32, layers=4, heads=2, mlp_width=64,
    token_types=2, cross_layers=(2, 3), cross_width=32,
)  # fmt: skip
COUNTED = {"image_states": "images", "text_states": "texts", "image_keys_values": "keys and values"}
COUNTED |= {"match_states": "pairs", "match": "whole pairs"}


class JudgingColours(nn.Module):
    """`ColourNetwork` whose pairs match by how near the colours are, nearer than its blurred features tell."""

    def __init__(self, blind: bool) -> None:
        super().__init__()
        self.inner, self.blind = ColourNetwork(), blind

    def encode_image(self, pixels: Tensor) -> Tensor:
        found = self.inner.encode_image(pixels)
        return found.new_ones(found.shape) / 3**0.5 if self.blind else found

    def encode_text(self, tokens: Mapping[str, Tensor]) -> Tensor:
        return self.inner.encode_text(tokens)

    def match(self, pixels: Tensor, tokens: Mapping[str, Tensor]) -> Tensor:
        cosine = (self.inner.encode_image(pixels) * self.inner.encode_text(tokens)).sum(dim=1)
        return torch.stack([-cosine, cosine], dim=1)


def fused_model(seed: int = 0) -> VisionLanguageModel:
    """A small ALBEF; `network.asked` counts the rows of each verb."""
    torch.manual_seed(seed)
    return _model(Albef(AlbefConfig(IMAGE, TEXT, embed_dim=16)), "fused", "albef", seed)


def med_model(seed: int = 0, **settings: Any) -> VisionLanguageModel:
    """A small BLIP, counted likewise; settings: of its configuration."""
    torch.manual_seed(seed)
    text = replace(TEXT, vocab_size=WORDS.vocab_size + 2, cross_layers=(0, 1, 2, 3))
    ids = {"dec_id": WORDS.vocab_size, "enc_id": WORDS.vocab_size + 1}
    return _model(Blip(BlipConfig(IMAGE, text, embed_dim=16, **ids, **settings)), "med", "blip", seed)


def qformer_model(seed: int = 0, **settings: Any) -> VisionLanguageModel:
    """A small BLIP-2 of its first stage, counted likewise; settings: of its configuration."""
    torch.manual_seed(seed)
    text = replace(TEXT, vocab_size=WORDS.vocab_size + 1, token_types=0, cross_layers=(0, 2))
    qformer = QFormerConfig(text, queries=3, dec_id=WORDS.vocab_size)
    return _model(Blip2(Blip2Config(IMAGE, qformer, embed_dim=16, **settings)), "queries", "blip2", seed)


def pair_model(seed: int = 0, transform: ImageTransform = PLAIN) -> VisionLanguageModel:
    """A small ViLT, counted likewise."""
    torch.manual_seed(seed)
    config = ViltConfig(IMAGE, vocab_size=WORDS.vocab_size, context_length=64)
    return _model(Vilt(config), "pairs", "vilt", seed, transform)


def whole_fused_model(seed: int = 0) -> VisionLanguageModel:
    """The ALBEF of `fused_model` that only judges whole pairs."""
    inner = fused_model(seed).network
    network = nn.Module()
    network.weight = nn.Parameter(torch.zeros(1))
    network.match = inner.match  # type: ignore[assignment]
    return VisionLanguageModel(network, WORDS, PLAIN, name="whole", family="vilt")


def judging_colours(blind: bool) -> VisionLanguageModel:
    transform = colour_model().transform
    return VisionLanguageModel(JudgingColours(blind), WORDS, transform, name="judge", family="albef")


def _model(network: Any, name: str, family: str, seed: int, transform: ImageTransform = PLAIN) -> VisionLanguageModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one, parameter in network.named_parameters():
            if one != "log_scale":
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    network.eval().requires_grad_(False)
    network.asked = Counter()
    for verb, what in COUNTED.items():
        if hasattr(network, verb):
            setattr(network, verb, _counting(network, getattr(network, verb), what))
    return VisionLanguageModel(network, WORDS, transform, name=name, family=family)


def _counting(network: Any, verb: Any, what: str) -> Any:
    def counted(first: Any, *more: Any, **named: Any) -> Any:
        network.asked[what] += len(first["input_ids"]) if isinstance(first, Mapping) else len(first)
        return verb(first, *more, **named)

    return counted
