"""Stage 1, CLIP (arXiv 2103.00020): an image and a text encoder, trained so that pairs agree (ITC)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from vlm.errors import ConfigError
from vlm.models import common_space as space
from vlm.models.stage import Encoded, Taught, joint_loss
from vlm.models.transformer import Transformer, TransformerConfig
from vlm.models.vit import ViT, ViTConfig
from vlm.objectives.itc import itc, sigmoid_itc


@dataclass(frozen=True)
class ClipConfig:
    """Both towers, the space they meet in, and the loss that brings them together."""

    image: ViTConfig = field(default_factory=ViTConfig)
    text: TransformerConfig = field(default_factory=TransformerConfig)
    embed_dim: int = 512
    """Features of the common space."""
    image_pool: Literal["cls", "mean"] = "cls"
    """The image's feature: its [CLS] state, or the mean of its patches."""
    text_pool: Literal["cls", "eot", "mean"] = "cls"
    """The text's feature: its first state, its last real one (CLIP's end-of-text), or the mean of those."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """CLIP's softmax contrast or SigLIP's pairwise sigmoid one."""
    logit_scale_init: float = 1 / 0.07
    """Inverse temperature at the start (CLIP §2.5); SigLIP starts at 10."""
    logit_scale_max: float = 100.0
    """Upper bound of the inverse temperature; the lower one is 1."""
    logit_bias_init: float | None = None
    """Start of the sigmoid loss's bias (SigLIP: -10); None for no bias, which the softmax never needs."""
    chunk: int = 0
    """Rows of the loss compared at a time; 0 for all. Saves memory at large batches."""


class Clip(nn.Module):
    """Two towers with a projection each and a learned temperature."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        _check(config)
        self.config, self.loss_weights = config, {"itc": 1.0}
        self.image = ViT(config.image)
        self.text = Transformer(config.text)
        self.image_projection = space.projection(config.image.width, config.embed_dim, bias=False)
        self.text_projection = space.projection(config.text.width, config.embed_dim, bias=False)
        self.log_scale = space.log_scale(config.logit_scale_init)
        bias = config.logit_bias_init
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor([float(bias)]))

    @property
    def logit_scale(self) -> Tensor:
        """(1,) inverse temperature that cosines are multiplied by."""
        return self.log_scale.exp()

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Map (B, 3, H, W) normalised pixels to (B, D) unit-norm features."""
        states = self.image(pixels)  # (B, N, D)
        return space.project(space.pool_image(states, self.config.image_pool), self.image_projection)

    def encode_text(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """Map `input_ids` and `attention_mask`, each (B, L), to (B, D) unit-norm features."""
        mask = tokens["attention_mask"].bool()
        states = self.text(self.text.embed(tokens["input_ids"]), key_mask=mask)  # (B, L, D)
        return space.project(space.pool_text(states, mask, self.config.text_pool), self.text_projection)

    def similarity(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Cosine over temperature, (images, texts); the softmax of a row is a zero-shot classification."""
        logits = self.logit_scale * image_features @ text_features.T
        return logits if self.logit_bias is None else logits + self.logit_bias

    def forward(self, batch: space.Rows) -> Encoded:
        """Features of a batch and the parameters that the loss needs.

        A training step is this forward: all that gets a gradient leaves through it, so that DDP and FSDP2,
        which synchronise only what runs in `forward`, see all of it.

        Returns:
            Features alone: `image` and `text`, each (B, D); `log_scale` (1,) and, if there is one,
            `logit_bias` (1,).
        """
        features = {"image": self.encode_image(batch.pixels), "text": self.encode_text(batch.tokens)}
        shared = {"log_scale": self.log_scale, "logit_bias": self.logit_bias}
        features |= {name: value * 1.0 for name, value in shared.items() if value is not None}
        return Encoded(features, {}, {})

    def contrast(
        self,
        features: Mapping[str, Tensor],
        everyone: Mapping[str, Tensor],
        *,
        row_ids: Tensor,
        ids: Tensor,
        taught: Taught | None = None,
    ) -> dict[str, Tensor]:
        """The losses of this rank's rows against everyone's features.

        Args:
            features: what `forward` gave for the rows, `image` and `text` (b, D).
            everyone: `image` and `text` (B, D) of all ranks and micro-batches, the rows among them.
            row_ids, ids: (b, K) and (B, K); equal ids are positives of each other.
            taught: CLIP has no teacher, so this must be None.

        Returns:
            `itc`, and `scale`, the inverse temperature.
        """
        scale = features["log_scale"].exp()
        rows, chunk = (features["image"], features["text"]), self.config.chunk
        if self.config.loss == "sigmoid":
            bias = features.get("logit_bias", torch.zeros_like(scale))
            loss = sigmoid_itc(*rows, everyone["text"], scale=scale, bias=bias, row_ids=row_ids, ids=ids, chunk=chunk)
        else:
            columns = (everyone["image"], everyone["text"])
            loss = itc(*rows, *columns, scale=scale, row_ids=row_ids, ids=ids, chunk=chunk)
        return {"itc": loss, "scale": scale.detach().squeeze(0)}

    def loss(self, batch: space.Rows) -> dict[str, Tensor]:
        """Losses of one batch alone, without other ranks or micro-batches; ``loss`` is the total."""
        return joint_loss(self, batch)

    def clamp_(self) -> None:
        """Keep the temperature within its bounds; called after each optimiser step."""
        space.clamp_scale_(self.log_scale, 1.0, self.config.logit_scale_max)


def _check(config: ClipConfig) -> None:
    space.check_pools(config.image_pool, config.text_pool)
    space.check_choice("loss", config.loss, ("softmax", "sigmoid"))
    if config.logit_scale_max < 1:
        raise ConfigError(f"logit_scale_max {config.logit_scale_max} is below 1, the scale's lower bound")
