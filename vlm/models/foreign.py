"""open_clip's own towers (SigLIP, EVA, ConvNeXt, ...) behind the verbs of ours."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ForeignClip(nn.Module):
    """A model with open_clip's `encode_image` and `encode_text`; for use, not for training."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Map (B, 3, H, W) normalised pixels to (B, D) unit-norm features."""
        return F.normalize(self.inner.encode_image(pixels), dim=-1)  # type: ignore[operator]

    def encode_text(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """Map the `input_ids` (B, L) of the model's own tokenizer to (B, D) unit-norm features."""
        return F.normalize(self.inner.encode_text(tokens["input_ids"]), dim=-1)  # type: ignore[operator]

    @property
    def logit_scale(self) -> Tensor:
        """(1,) inverse temperature that cosines are multiplied by."""
        scale: Tensor = self.inner.logit_scale  # type: ignore[assignment]
        return scale.exp().reshape(1)

    def similarity(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Cosine over temperature, plus the bias where the model has one; (images, texts)."""
        logits = self.logit_scale * image_features @ text_features.T
        bias = getattr(self.inner, "logit_bias", None)
        return logits + bias if isinstance(bias, torch.Tensor) else logits
