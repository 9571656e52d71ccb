"""Preprocessing against torchvision's (as open_clip builds it) and by hand."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from vlm.data.transforms import CLIP_MEAN, CLIP_STD, ImageTransform
from vlm.errors import ConfigError


def noise(width, height, seed=0):
    raw = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(raw)


@pytest.mark.parametrize("shape", [(40, 40), (64, 48), (48, 65), (31, 200), (20, 7), (32, 33), (97, 32)])
@pytest.mark.parametrize("kind", ["bicubic", "bilinear"])
def test_crop_equals_resize_then_centre_crop(shape, kind):
    from torchvision import transforms as tv

    mode = tv.InterpolationMode.BICUBIC if kind == "bicubic" else tv.InterpolationMode.BILINEAR
    reference = tv.Compose(
        [
            tv.Resize(32, interpolation=mode),
            tv.CenterCrop(32),
            tv.ToTensor(),
            tv.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    picture = noise(*shape)
    ours = ImageTransform(32, resize="crop", interpolation=kind)(picture)
    assert ours.shape == (3, 32, 32) and ours.dtype == torch.float32
    assert (ours - reference(picture)).abs().max() < 1e-5


def test_squash_and_normalisation():
    picture = noise(50, 20)
    ours = ImageTransform(16, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))(picture)
    raw = np.asarray(picture.resize((16, 16), Image.Resampling.BICUBIC)) / 255
    expected = (raw - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    assert np.abs(ours.numpy() - expected.transpose(2, 0, 1)).max() < 1e-6


def test_pad_keeps_the_whole_picture_on_white():
    fitted = np.array(ImageTransform(20, resize="pad").fit(Image.new("RGB", (40, 20), "red")))
    assert (fitted[:5] == 255).all() and (fitted[15:] == 255).all()
    assert (fitted[5:15] == [255, 0, 0]).all()


def test_strips_are_cropped_as_others_are():
    strip = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[:, None, None], (2, 8, 3)))  # 8 x 512
    whole = strip.resize((16, 1024), Image.Resampling.BICUBIC).crop((0, 504, 16, 520))
    ours = ImageTransform(16, resize="crop").fit(strip)
    assert np.abs(np.array(ours).astype(int) - np.array(whole).astype(int)).max() <= 1


def test_extreme_shapes_stay_small():
    for resize in ("squash", "crop", "pad"):
        transform = ImageTransform(32, resize=resize)
        for shape in ((1, 1), (50_000, 2), (1, 30_000)):
            assert transform(Image.new("RGB", shape, "blue")).shape == (3, 32, 32)


def test_right_size_is_not_resampled_and_other_modes_are_converted():
    picture = noise(24, 24)
    transform = ImageTransform(24)
    assert transform.fit(picture) is picture
    assert transform(picture.convert("L")).shape == (3, 24, 24)


def test_restore_inverts_normalise():
    picture = noise(10, 12)
    transform = ImageTransform(10)
    assert np.array_equal(np.array(transform.restore(transform.normalise(picture))), np.array(picture))


def test_round_trip_through_json():
    transform = ImageTransform(48, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resize="pad")
    assert ImageTransform.from_dict(json.loads(json.dumps(transform.to_dict()))) == transform


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "1 to 8192"),
        ({"size": "96"}, "1 to 8192"),
        ({"size": 96, "resize": "crops"}, "did you mean 'crop'"),
        ({"size": 96, "interpolation": "nearest"}, "bicubic, bilinear"),
        ({"size": 96, "std": (0, 1, 1)}, "std"),
        ({"size": 96, "mean": [0.5]}, "mean"),
        ({"size": 96, "sizes": 3}, "did you mean 'size'"),
        ({}, "'size'"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        ImageTransform.from_dict(settings)
