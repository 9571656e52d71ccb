"""transformers' ViLT classes, small and random, with inputs of several lengths and sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.weights.made import scrambled
from vlm.data.tokenizers import wordpiece

SMALL: dict[str, Any] = {
    "vocab_size": 30522, "max_position_embeddings": 16, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 48, "image_size": 24, "patch_size": 8,
}  # fmt: skip
TEXTS = ["a photo of a cat", "dog", "two red apples on a wooden table"]
SIZES = [(24, 24), (16, 40), (32, 8)]
HEADS = {
    "ViltModel": (),
    "ViltForMaskedLM": ("mlm",),
    "ViltForImageAndTextRetrieval": ("rank",),
    "ViltForQuestionAnswering": ("vqa",),
    "ViltForImagesAndTextClassification": ("nlvr2",),
}


def make(name: str, **changes: Any) -> Any:
    """One of transformers' classes with every tensor random and different."""
    import transformers

    more: dict[str, Any] = {}
    if name == "ViltForQuestionAnswering":
        more = {"id2label": {0: "yes", 1: "no", 2: "two", 3: "red"}}
    if name == "ViltForImagesAndTextClassification":
        more = {"num_images": 2, "modality_type_vocab_size": 3}
    model = scrambled(getattr(transformers, name)(transformers.ViltConfig(**(SMALL | more | changes))))
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith("LayerNorm.weight"):
                value.add_(1.0)
            elif value.ndim >= 2:
                value.mul_(3.0)  # so that pictures and texts move the outputs
    return model


def folder_of(name: str, folder: Path, **changes: Any) -> Any:
    """The same, saved to a folder."""
    model = make(name, **changes)
    model.save_pretrained(folder)
    return model


def pictures(sizes: list[tuple[int, int]] = SIZES, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Pictures of these sizes on one canvas with noise in the padding, and their pixel mask."""
    generator = torch.Generator().manual_seed(seed)
    high, wide = (max(sides) for sides in zip(*sizes, strict=True))
    pixels = torch.randn(len(sizes), 3, high, wide, generator=generator)
    mask = torch.zeros(len(sizes), high, wide, dtype=torch.bool)
    for row, (height, width) in enumerate(sizes):
        mask[row, :height, :width] = True
    return pixels, mask


def words() -> dict[str, Tensor]:
    """Ids and mask as transformers takes them."""
    tokens = wordpiece(max_length=16)(TEXTS)
    return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask.long()}
