"""A model whose answers can be worked out by hand: it sees mean colours and reads the names of colours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vlm.data.tokenizers import wordpiece
from vlm.data.transforms import ImageTransform
from vlm.models.clip import Clip, ClipConfig
from vlm.models.transformer import TransformerConfig
from vlm.models.vit import ViTConfig
from vlm.weights.loaded import VisionLanguageModel

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "purple": (255, 0, 255),
}
SCALE = 10.0
WORDS = wordpiece()


class ColourNetwork(nn.Module):
    """Picture: its mean colour. Text: the sum of the colours that it names, grey for none. Both unit norm."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([SCALE]))
        table = torch.zeros(WORDS.vocab_size, 3)
        for name, colour in COLOURS.items():
            (word,) = WORDS([name]).input_ids[0, 1:-1].tolist()
            table[word] = torch.tensor(colour) / 255
        self.register_buffer("table", table)
        self.image_rows: list[int] = []
        self.text_rows: list[int] = []

    @property
    def logit_scale(self) -> Tensor:
        return self.scale

    def encode_image(self, pixels: Tensor) -> Tensor:
        self.image_rows.append(len(pixels))
        return F.normalize(pixels.mean(dim=(2, 3)), dim=-1)

    def encode_text(self, tokens: Mapping[str, Tensor]) -> Tensor:
        self.text_rows.append(len(tokens["input_ids"]))
        named = self.table[tokens["input_ids"]].sum(dim=1)
        return F.normalize(torch.where(named.sum(dim=1, keepdim=True) > 0, named, torch.ones(3)), dim=-1)

    def similarity(self, image: Tensor, text: Tensor) -> Tensor:
        return self.logit_scale * image @ text.T


def colour_model() -> VisionLanguageModel:
    plain = ImageTransform(8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "squash", "bicubic")
    return VisionLanguageModel(ColourNetwork(), WORDS, plain, name="colours", family="clip")


def random_model(seed: int = 0) -> VisionLanguageModel:
    """A small CLIP with random weights."""
    torch.manual_seed(seed)
    image = ViTConfig(image_size=16, patch_size=8, width=32, layers=2, heads=2, mlp_width=64)
    text = TransformerConfig(vocab_size=WORDS.vocab_size, context_length=64, width=32, layers=2, heads=2, mlp_width=64)
    network = Clip(ClipConfig(image=image, text=text, embed_dim=16)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        network.log_scale.fill_(3.0)
    transform = ImageTransform(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "squash", "bicubic")
    return VisionLanguageModel(network, WORDS, transform, name="random", family="clip")


def plain(colour: str, side: int = 8) -> Image.Image:
    return Image.new("RGB", (side, side), COLOURS[colour])


def noise(count: int, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(count)]


def class_folders(root: Path, counts: dict[str, list[str]]) -> Path:
    """An ImageFolder: by folder name, the colours of its pictures."""
    for name, colours in counts.items():
        (root / name).mkdir(parents=True)
        for number, colour in enumerate(colours):
            plain(colour).save(root / name / f"{number}.png")
    return root
