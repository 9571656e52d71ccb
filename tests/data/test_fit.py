"""Pictures that keep their shape: ViLT's preprocessing against transformers', padding, batches of the loader."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data.memory import Memory
from vlm.data.loader import LoaderConfig, evaluation_batches, make_loader
from vlm.data.tokenizers import wordpiece
from vlm.data.transforms import ImageTransform, pad_pictures
from vlm.errors import ConfigError

HALF = (0.5, 0.5, 0.5)
VILT = ImageTransform(384, HALF, HALF, "fit")


def noise(width: int, height: int) -> Image.Image:
    raw = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(raw)


@pytest.mark.parametrize(
    "shape", [(640, 480), (480, 640), (500, 375), (384, 384), (100, 90), (1000, 300), (37, 200), (640, 427)]
)
def test_equals_transformers(shape: tuple[int, int]) -> None:
    from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil

    picture = noise(*shape)
    theirs = ViltImageProcessorPil()(picture, return_tensors="pt")["pixel_values"][0]
    ours = VILT(picture)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 0.01  # a rounded step of 256


def test_batches_equal_transformers() -> None:
    from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil

    pictures = [noise(640, 480), noise(200, 300), noise(64, 64)]
    theirs = ViltImageProcessorPil()(pictures, return_tensors="pt")
    pixels, mask = pad_pictures([VILT(picture) for picture in pictures])
    assert mask is not None and torch.equal(mask.long(), theirs["pixel_mask"])
    assert (pixels - theirs["pixel_values"]).abs().max() < 0.01
    assert (pixels[~mask[:, None].expand_as(pixels)] == 0).all()


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([(384, 32), (96, 16), (50, 16)]))
def test_sides_are_multiples_within_bounds(width: int, height: int, sizes: tuple[int, int]) -> None:
    size, multiple = sizes
    wide, high = ImageTransform(size, resize="fit", multiple=multiple).fit(Image.new("RGB", (width, height))).size
    assert wide % multiple == high % multiple == 0
    assert min(wide, high) <= size and multiple <= max(wide, high) <= size * 1333 / 800
    assert (wide >= high) == (width >= height) or wide == high


def test_equal_sizes_need_no_mask() -> None:
    pictures = [torch.randn(3, 4, 6) for _ in range(3)]
    pixels, mask = pad_pictures(pictures)
    assert mask is None and torch.equal(pixels, torch.stack(pictures))
    again, mask = pad_pictures(pictures, masked=True)
    assert mask is not None and mask.all() and torch.equal(again, pixels)


def test_multiple_is_checked() -> None:
    for multiple in (0, 97, 1.5):
        with pytest.raises(ConfigError, match="multiple must be a whole number from 1 to 96"):
            ImageTransform(96, resize="fit", multiple=multiple)  # type: ignore[arg-type]
    assert ImageTransform.from_dict(VILT.to_dict()) == VILT


def test_the_loader_pads_and_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    import tests.data.memory as memory

    shapes = {i: (20, 14) if i % 2 else (14, 40) for i in range(8)}

    def picture(number: int) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", shapes[number], "red").save(file, "PNG")
        return file.getvalue()

    monkeypatch.setattr(memory, "encoded", picture)
    transform = ImageTransform(16, HALF, HALF, "fit", multiple=8)
    options = {"tokenizer": wordpiece(), "transform": transform}
    trained = list(make_loader(Memory(8), LoaderConfig(batch_size=8, workers=0), epoch=0, **options))  # type: ignore[arg-type]
    for batch in [*trained, *evaluation_batches(Memory(8), **options)]:  # type: ignore[arg-type]
        assert batch.pixels.shape == (8, 3, 24, 16) and batch.pixel_mask is not None
        for key, mask in zip(batch.keys, batch.pixel_mask, strict=True):
            high, wide = (16, 16) if int(key[1:]) % 2 else (24, 8)
            assert mask[:high, :wide].all() and mask.sum() == high * wide
    # A micro-batch of pictures of one size has a mask too: its partners may come from another.
    alike = list(evaluation_batches(Memory(8), batch_size=1, **options))  # type: ignore[arg-type]
    assert all(batch.pixel_mask is not None and batch.pixel_mask.all() for batch in alike)
