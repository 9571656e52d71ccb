"""Models that judge pairs, small enough to check by running each pair whole, and one to work out by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.tasks.small import WORDS, ColourNetwork, colour_model
from vlm.data.transforms import ImageTransform
from vlm.models.transformer import KeyValues, Transformer, TransformerConfig
from vlm.models.vit import ViT, ViTConfig
from vlm.weights.loaded import VisionLanguageModel

PLAIN = ImageTransform(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "squash", "bicubic")


class FusedNetwork(nn.Module):
    """The verbs of a model whose text layers' upper half looks at image states; counts what it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.image = ViT(ViTConfig(image_size=16, patch_size=8, width=32, layers=2, heads=2, mlp_width=64))
        self.text = Transformer(
            TransformerConfig(
                vocab_size=WORDS.vocab_size, context_length=64, width=32, layers=4, heads=2, mlp_width=64,
                norm="post", cross_layers=(2, 3), cross_width=32,
            )
        )  # fmt: skip
        self.head = nn.Linear(32, 2)
        self.asked: Counter[str] = Counter()

    def image_states(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.asked["images"] += len(pixels)
        states = self.image(pixels)
        return F.normalize(states[:, 0], dim=-1), states

    def text_states(self, tokens: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        self.asked["texts"] += len(tokens["input_ids"])
        mask = tokens["attention_mask"].bool()
        states = self.text(self.text.embed(tokens["input_ids"]), key_mask=mask, layers=slice(2))
        return F.normalize(states[:, 0], dim=-1), states, mask

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.image_states(pixels)[0]

    def encode_text(self, tokens: Mapping[str, Tensor]) -> Tensor:
        return self.text_states(tokens)[0]

    def image_keys_values(self, states: Tensor) -> list[KeyValues | None]:
        self.asked["keys and values"] += len(states)
        return self.text.image_states(states)

    def match_states(self, states: Tensor, mask: Tensor, image_kv: Sequence[KeyValues | None]) -> Tensor:
        self.asked["pairs"] += len(states)
        return self.head(self.text(states, key_mask=mask, image=image_kv, layers=slice(2, None))[:, 0])

    def match(self, pixels: Tensor, tokens: Mapping[str, Tensor]) -> Tensor:
        _, states, mask = self.text_states(tokens)
        return self.match_states(states, mask, self.image_keys_values(self.image_states(pixels)[1]))


class PairNetwork(nn.Module):
    """Only whole pairs, as ViLT."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.asked = 0

    def match(self, pixels: Tensor, tokens: Mapping[str, Tensor]) -> Tensor:
        self.asked += len(pixels)
        return self.inner.match(pixels, tokens)


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
    torch.manual_seed(seed)
    network = FusedNetwork().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return VisionLanguageModel(network, WORDS, PLAIN, name="fused", family="albef")


def pair_model(seed: int = 0) -> VisionLanguageModel:
    network = PairNetwork(fused_model(seed).network)
    return VisionLanguageModel(network, WORDS, PLAIN, name="pairs", family="vilt")


def judging_colours(blind: bool) -> VisionLanguageModel:
    transform = colour_model().transform
    return VisionLanguageModel(JudgingColours(blind), WORDS, transform, name="judge", family="albef")
