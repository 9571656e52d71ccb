"""Checkpoints of other libraries, small and random, with different numbers in every tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SMALL_HF: dict[str, Any] = {
    "projection_dim": 24,
    "text_config": {
        "vocab_size": 49408, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 20, "hidden_act": "quick_gelu",
        "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407,
    },
    "vision_config": {
        "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 3,
        "image_size": 24, "patch_size": 8, "hidden_act": "quick_gelu",
    },
}  # fmt: skip
SMALL_OPEN_CLIP: dict[str, Any] = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 24, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
TEXTS = ["a photo of a cat", "dog", "two red apples on a wooden table, late"]


def scrambled(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The network with every tensor random and different, also those that start as ones or zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim == 0 or "logit" in name:
                value.copy_(torch.tensor(2.5))
            else:
                value.copy_(noise * 0.08 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return network.eval()


def hf_folder(folder: Path, **changes: Any) -> tuple[Any, Path]:
    """A transformers CLIPModel and the folder it was saved to."""
    from transformers import CLIPConfig, CLIPModel

    model = scrambled(CLIPModel(CLIPConfig(**(SMALL_HF | changes))))
    model.save_pretrained(folder)
    return model, folder


def open_clip_model(config: dict[str, Any] = SMALL_OPEN_CLIP) -> Any:
    """An open_clip CLIP."""
    from open_clip.model import CLIP

    return scrambled(CLIP(**{"output_dict": False} | config))


def pixels(side: int, count: int = 3) -> torch.Tensor:
    """Random pictures (B, 3, side, side)."""
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(5))
