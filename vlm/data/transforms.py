"""A model's own picture preprocessing: resize, crop or pad, scale to [0, 1], normalise."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlm.errors import ConfigError, nearest

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Resize = Literal["squash", "crop", "pad", "fit"]
Interpolation = Literal["bicubic", "bilinear"]
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class ImageTransform:
    """Picture (RGB, any size) to a float32 tensor (3, size, size), or of its own shape with `fit`."""

    size: int
    """Side of the square that the model sees, in pixels; with `fit` the shorter side, at most."""

    mean: tuple[float, float, float] = CLIP_MEAN
    """Subtracted from each channel after scaling to [0, 1]."""

    std: tuple[float, float, float] = CLIP_STD
    """Divides each channel."""

    resize: Resize = "squash"
    """squash: both sides to `size`, whatever the shape; crop: the shorter side to `size`, then the centre
    (open_clip, CLIP); pad: the longer side to `size`, then white margins; fit: the shorter side to `size`
    unless the longer one would pass 1333 / 800 of it, then both cut down to multiples of `multiple` (ViLT §4.1).
    Only fit gives pictures of different shape, for a model that takes a pixel mask."""

    interpolation: Interpolation = "bicubic"
    """Filter of the resize, antialiased."""

    multiple: int = 32
    """What both sides are multiples of with `fit`; the model's patches must divide it."""

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or not 1 <= self.size <= 8192:
            raise ConfigError(f"size of the picture must be a whole number from 1 to 8192, got {self.size!r}")
        most = self.size if self.resize == "fit" else 8192
        if not isinstance(self.multiple, int) or not 1 <= self.multiple <= most:
            raise ConfigError(f"multiple must be a whole number from 1 to {most}, got {self.multiple!r}")
        for name, value, options in (
            ("resize", self.resize, get_args(Resize)),
            ("interpolation", self.interpolation, get_args(Interpolation)),
        ):
            if value not in options:
                close = nearest(str(value), options)
                raise ConfigError(f"{name} must be one of {', '.join(options)}, got {value!r}{close}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or (name == "std" and min(values) <= 0):
                raise ConfigError(f"{name} must be three numbers, those of std above 0, got {values!r}")
            object.__setattr__(self, name, tuple(float(value) for value in values))

    def __call__(self, image: Image.Image) -> Tensor:
        """The tensor (3, size, size), with `fit` (3, H, W), that the model sees."""
        return self.normalise(self.fit(image))

    def fit(self, image: Image.Image) -> Image.Image:
        """Resize to (size, size), or as `fit` says, still a picture."""
        if image.mode != "RGB":
            image = image.convert("RGB")
        size, (width, height) = self.size, image.size
        if (width, height) == (size, size) and self.resize != "fit":
            return image
        kind = _FILTERS[self.interpolation]
        if self.resize == "fit":
            return image.resize(_fitted(width, height, size, self.multiple), kind)
        if self.resize == "squash":
            return image.resize((size, size), kind)
        if self.resize == "crop":
            return _crop(image, size, kind)
        scale = size / max(width, height)
        inner = (max(1, round(width * scale)), max(1, round(height * scale)))
        canvas = Image.new("RGB", (size, size), (255, 255, 255))
        canvas.paste(image.resize(inner, kind), ((size - inner[0]) // 2, (size - inner[1]) // 2))
        return canvas

    def normalise(self, image: Image.Image) -> Tensor:
        """A picture (H, W) to a float32 tensor (3, H, W), without resizing."""
        raw = np.array(image, dtype=np.float32)  # (H, W, 3)
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        scaled = (raw / np.float32(255) - mean) / std
        return torch.from_numpy(np.ascontiguousarray(scaled.transpose(2, 0, 1)))

    def restore(self, pixels: Tensor) -> Image.Image:
        """The picture (H, W) of a tensor (3, H, W): the inverse of `normalise`, for display."""
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        raw = pixels.detach().cpu().float() * std[:, None, None] + mean[:, None, None]
        array = raw.mul(255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        return Image.fromarray(array)

    def to_dict(self) -> dict[str, Any]:
        """Settings as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> ImageTransform:
        """The inverse of `to_dict`; raises ConfigError on an unknown setting."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in settings:
            if name not in known:
                raise ConfigError(f"unknown setting {name!r} of the picture transform{nearest(name, known)}")
        if "size" not in settings:
            raise ConfigError("the picture transform needs the setting 'size'")
        given: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in settings.items()}
        return cls(**given)


def pad_pictures(pictures: Sequence[Tensor], *, masked: bool = False) -> tuple[Tensor, Tensor | None]:
    """Join pictures (3, h, w) into one tensor (B, 3, H, W), with zeros at the right and at the bottom.

    masked: whether to give a mask even if all have one size, since others that they will meet may not.
    Returns it with (B, H, W) booleans, true on pixels that aren't padding; None for no mask.
    """
    sizes = [tuple(picture.shape[1:]) for picture in pictures]
    if len(set(sizes)) == 1 and not masked:
        return torch.stack(list(pictures)), None
    high, wide = (max(sides) for sides in zip(*sizes, strict=True))
    joined = pictures[0].new_zeros(len(pictures), 3, high, wide)
    mask = torch.zeros(len(pictures), high, wide, dtype=torch.bool, device=joined.device)
    for row, (picture, (h, w)) in enumerate(zip(pictures, sizes, strict=True)):
        joined[row, :, :h, :w], mask[row, :h, :w] = picture, True
    return joined, mask


def _fitted(width: int, height: int, size: int, multiple: int) -> tuple[int, int]:
    """ViLT's sides: as large as fits, rounded to pixels, then cut down to multiples, at least one."""
    scale = size / min(width, height)
    longest = int(1333 / 800 * size)
    sides = [scale * width, scale * height]
    if max(sides) > longest:
        sides = [side * (longest / max(sides)) for side in sides]
    wide, high = (max(multiple, int(side + 0.5) // multiple * multiple) for side in sides)
    return wide, high


def _crop(image: Image.Image, size: int, kind: Image.Resampling) -> Image.Image:
    """Shorter side to `size`, then the centre, rounded as torchvision's Resize and CenterCrop do."""
    width, height = image.size
    inner = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
    left, top = round((inner[0] - size) / 2.0), round((inner[1] - size) / 2.0)
    if max(inner) <= 8 * size:
        return image.resize(inner, kind).crop((left, top, left + size, top + size))
    # A strip of 50,000 x 2 would be 2,400,000 wide at size 96: resize only the part that stays.
    across, down = width / inner[0], height / inner[1]
    right, bottom = min((left + size) * across, width), min((top + size) * down, height)
    return image.resize((size, size), kind, box=(left * across, top * down, right, bottom))
