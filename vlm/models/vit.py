"""The one image encoder: timm's vision transformer (arXiv 2010.11929) behind a small config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import QuickGELU
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlm.errors import ConfigError, nearest

_ACTIVATIONS: dict[str, Callable[..., nn.Module]] = {
    "gelu": nn.GELU,
    "quick_gelu": QuickGELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
}


@dataclass(frozen=True)
class ViTConfig:
    """Sizes and settings of a vision transformer."""

    image_size: int = 224
    """Pixels on a side that the position embeddings are stored for; other sizes interpolate them."""
    patch_size: int = 16
    """Pixels on a side of a patch; it must divide every image's sides."""
    width: int = 768
    """Features of a patch."""
    layers: int = 12
    heads: int = 12
    """Of each self-attention; they divide the width."""
    mlp_width: int = 3072
    """Hidden features of the feed-forward."""
    activation: Literal["gelu", "quick_gelu", "gelu_tanh"] = "gelu"
    pre_norm: bool = False
    """A norm before the first layer and no bias in the patch projection, as in CLIP."""
    norm_eps: float = 1e-6
    final_norm_eps: float = 0.0
    """Of the norm behind the last layer, where it isn't that of the others: LAVIS's BLIP-2 has 1e-5 there; 0 for
    `norm_eps`."""
    patch_dropout: float = 0.0
    """Share of the patches left out of each training image (FLIP, arXiv 2212.00794)."""
    drop_path: float = 0.0
    """Chance that a layer's branch is skipped in training, growing linearly with depth (stochastic depth)."""

    @property
    def own_final_eps(self) -> bool:
        """Whether the last norm has another eps than the others, which few published classes have a setting for."""
        return self.final_norm_eps not in (0.0, self.norm_eps)


class ViT(nn.Module):
    """Images to token states: [CLS] first, then the patches row by row."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.trunk = VisionTransformer(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.width,
            depth=config.layers,
            num_heads=config.heads,
            mlp_ratio=(config.mlp_width + 0.5) / config.width,  # timm cuts the product off, which rounding may lessen
            act_layer=_ACTIVATIONS[config.activation],
            norm_layer=partial(nn.LayerNorm, eps=config.norm_eps),
            pre_norm=config.pre_norm,
            patch_drop_rate=config.patch_dropout,
            drop_path_rate=config.drop_path,
            dynamic_img_size=True,
            global_pool="",
            num_classes=0,
        )
        self.trunk.norm = nn.LayerNorm(config.width, eps=config.final_norm_eps or config.norm_eps)

    @property
    def checkpointing(self) -> bool:
        """Whether each layer is recomputed in the backward pass, which trades time for memory."""
        return bool(self.trunk.grad_checkpointing)

    @checkpointing.setter
    def checkpointing(self, enabled: bool) -> None:
        self.trunk.set_grad_checkpointing(enabled)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode (B, 3, H, W) normalised pixels as (B, N, D) states after the final norm.

        Raises ValueError when the patch size does not divide both sides.
        """
        self._check_sides(pixels)
        return self.trunk.forward_features(pixels)

    def embed(self, pixels: Tensor, pixel_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[CLS] and patches as they enter the first layer, for pictures of different size in one batch.

        A picture's positions are interpolated over its own patches, bilinearly and corner to corner, as ViLT
        (arXiv 2102.03334) does.

        Args:
            pixels: (B, 3, H, W) normalised, smaller pictures padded at the right and at the bottom.
            pixel_mask: (B, H, W) boolean, true on pixels that aren't padding; None where there is none.

        Returns:
            (B, N, D) tokens, and (B, N) boolean, true on those that aren't padding.

        Raises ValueError when the patch size does not divide both sides, or a picture has no pixels.
        """
        self._check_sides(pixels)
        patches = self.trunk.patch_embed(pixels)  # (B, H / patch, W / patch, D)
        rows, high, wide, _ = patches.shape
        if pixel_mask is None:
            mask = patches.new_ones(rows, high * wide, dtype=torch.bool)  # (B, N - 1)
            positions = self._positions(high, wide)  # (N - 1, D)
        else:
            step = self.config.patch_size
            grid = pixel_mask.bool()[:, ::step, ::step]  # (B, H / patch, W / patch)
            sizes = torch.stack([grid[:, :, 0].sum(dim=1), grid[:, 0].sum(dim=1)], dim=1)  # (B, 2)
            different, which = sizes.unique(dim=0, return_inverse=True)
            if not different.all():
                raise ValueError("pixel_mask leaves a picture without pixels in its upper left corner")
            positions = torch.stack([self._positions(high, wide, *size) for size in different.tolist()])[which]
            mask = grid.flatten(1)
        first = self.trunk.cls_token + self.trunk.pos_embed[:, :1]  # type: ignore[operator, index]  # (1, 1, D)
        x = torch.cat([first.expand(rows, -1, -1), patches.flatten(1, 2) + positions], dim=1)  # (B, N, D)
        return self.trunk.norm_pre(self.trunk.pos_drop(x)), F.pad(mask, (1, 0), value=True)

    def run(self, x: Tensor, key_mask: Tensor) -> Tensor:
        """The layers and the final norm over any tokens (B, S, D); `key_mask` (B, S) is true on real ones."""
        mask = key_mask[:, None, None, :]  # (B, 1, 1, S)
        for block in self.trunk.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, attn_mask=mask, use_reentrant=False)
            else:
                x = block(x, attn_mask=mask)
        return self.trunk.norm(x)

    def _positions(self, high: int, wide: int, rows: int = 0, columns: int = 0) -> Tensor:
        """Positions of a picture of rows x columns patches, then zeros up to high x wide: (high * wide, D)."""
        rows, columns = rows or high, columns or wide
        side = self.config.image_size // self.config.patch_size
        stored: Tensor = self.trunk.pos_embed[:, 1:]  # type: ignore[index]  # (1, side * side, D)
        grid = stored.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, side, side)
        if (rows, columns) != (side, side):
            grid = F.interpolate(grid, (rows, columns), mode="bilinear", align_corners=True)
        return F.pad(grid, (0, wide - columns, 0, high - rows))[0].flatten(1).T

    def _check_sides(self, pixels: Tensor) -> None:
        (height, width), patch = pixels.shape[-2:], self.config.patch_size
        if height % patch or width % patch:
            raise ValueError(f"image of {height} x {width} pixels can't be cut into patches of {patch}; resize it")


def _check(config: ViTConfig) -> None:
    if config.heads < 1 or config.width % config.heads:
        raise ConfigError(f"width {config.width} is not a multiple of heads {config.heads}; change one of them")
    if config.patch_size < 1 or config.image_size % config.patch_size:
        raise ConfigError(f"patch_size {config.patch_size} does not divide image_size {config.image_size}; change one")
    for name in ("patch_dropout", "drop_path"):
        if not 0 <= getattr(config, name) < 1:
            raise ConfigError(f"{name} is a share and must be at least 0 and below 1, got {getattr(config, name)!r}")
    if config.activation not in _ACTIVATIONS:
        hint = nearest(config.activation, _ACTIVATIONS)
        raise ConfigError(f"unknown activation {config.activation!r}{hint}; choose from {', '.join(_ACTIVATIONS)}")
