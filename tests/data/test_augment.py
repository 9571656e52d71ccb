"""Augmentation: what may be mirrored or lose colour, and what happens to the pixels."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

from vlm.data.augment import Augment, augment, colour_safe, draw_outlines, flip_safe, replace_background
from vlm.errors import ConfigError

EVERYTHING = Augment(
    crop=0.7, shrink=1.3, stretch=0.2, rotate=15, flip=0.5, brightness=0.2, contrast=0.2, saturation=0.4, hue=15,
    grey=0.2, background=0.5, outline=0.5,
)  # fmt: skip
WHITE = (255, 255, 255)


def drawing(width: int = 96, height: int = 96) -> Image.Image:
    """A red disc with a white hole on white; its left half has a blue corner."""
    image = Image.new("RGB", (width, height), WHITE)
    draw = ImageDraw.Draw(image)
    draw.ellipse((width * 0.2, height * 0.2, width * 0.8, height * 0.8), fill=(200, 30, 30))
    draw.ellipse((width * 0.4, height * 0.4, width * 0.6, height * 0.6), fill=WHITE)
    draw.rectangle((width * 0.2, height * 0.2, width * 0.3, height * 0.3), fill=(0, 0, 255))
    return image


def noise(width: int, height: int) -> Image.Image:
    """A photo's stand-in: no white border."""
    pixels = np.random.default_rng(0).integers(0, 240, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    "caption",
    [
        "backhand index pointing right", "a LEFT arrow", "left-facing fist", "clockwise vertical arrows",
        "anticlockwise spiral", "input latin letters", "OK button", "keycap: 3", "size 42", "flag: Germany",
        "one o'clock", "clock", "keyboard", "person facing away", "twelve-thirty", "playing card", "ABC blocks",
        "waxing crescent moon", "northeast", "globe showing Americas", "dollar banknote", "musical note",
        "a dog; looking left", "yin yang", "index pointing up", "compass",
    ],
)  # fmt: skip
def test_captions_that_a_mirror_breaks(caption: str) -> None:
    assert not flip_safe(caption)


@pytest.mark.parametrize(
    "caption",
    [
        "dog face",
        "a bright smile",
        "leftover pizza",
        "upright piano",
        "cat with tears of joy",
        "honey",
        "flagon",
        "tenor",
    ],
)
def test_captions_that_a_mirror_keeps(caption: str) -> None:
    assert flip_safe(caption)


@pytest.mark.parametrize(
    "caption", ["red heart", "a Blue book", "green apple", "waving hand: dark skin tone", "gray cat"]
)
def test_captions_that_name_a_colour(caption: str) -> None:
    assert not colour_safe(caption)


@pytest.mark.parametrize("caption", ["a hundred dogs", "redo", "greenhouse", "light bulb", "whitewash"])
def test_captions_that_name_none(caption: str) -> None:
    assert colour_safe(caption)


@pytest.mark.parametrize("size", [(96, 96), (31, 57), (200, 3), (1, 1)])
def test_same_draws_same_picture_of_the_same_size(size: tuple[int, int]) -> None:
    for image in (drawing(*size), noise(*size)):
        before = image.tobytes()
        one, two = (augment(image, "a disc", EVERYTHING, random.Random(5)) for _ in range(2))
        assert one.mode == "RGB" and one.size == size
        assert one.tobytes() == two.tobytes() and image.tobytes() == before


def test_other_draws_other_pictures() -> None:
    made = {augment(drawing(), "a disc", EVERYTHING, random.Random(i)).tobytes() for i in range(20)}
    assert len(made) == 20


def test_the_defaults_do_nothing() -> None:
    image = noise(40, 30)
    assert augment(image, "a thing", Augment(), random.Random(0)).tobytes() == image.tobytes()


def test_mirror() -> None:
    image, config = noise(33, 20), Augment(flip=1)
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert augment(image, "a thing", config, random.Random(0)).tobytes() == mirrored.tobytes()
    assert augment(image, "a left thing", config, random.Random(0)).tobytes() == image.tobytes()


def test_rotation_turns_and_fills_with_white() -> None:
    image = Image.new("RGB", (41, 41), (10, 60, 90))
    corners = []
    for seed in range(30):
        turned = np.array(augment(image, "a thing", Augment(rotate=45), random.Random(seed)))
        assert tuple(turned[20, 20]) == (10, 60, 90)
        corners.append(tuple(turned[0, 0]) == WHITE)
    assert sum(corners) >= 25  # all but the smallest angles


def test_crop_enlarges_and_shrink_makes_smaller() -> None:
    def red(image: Image.Image) -> int:
        pixels = np.array(image).astype(int)
        return int(((pixels[..., 0] > 150) & (pixels[..., 1] < 100)).sum())

    image = drawing()
    near = [red(augment(image, "", Augment(crop=0.5, shrink=1), random.Random(i))) for i in range(20)]
    far = [red(augment(image, "", Augment(crop=1, shrink=2), random.Random(i))) for i in range(20)]
    assert np.mean(far) < 0.8 * red(image) and min(far) > 0.15 * red(image)
    assert np.mean(near) > 1.1 * red(image)
    for i in range(20):  # what is shrunk stays whole inside the frame
        made = augment(image, "", Augment(crop=1, shrink=2), random.Random(i))
        edges = np.array(made)[[0, -1]].min(), np.array(made)[:, [0, -1]].min()
        assert min(edges) > 200


def test_grey_and_hue_leave_named_colours() -> None:
    grey = augment(drawing(), "a disc", Augment(grey=1), random.Random(0))
    assert np.ptp(np.array(grey).astype(int), axis=2).max() <= 2
    red = (200, 30, 30)
    kept = augment(drawing(), "a red disc", Augment(grey=1, hue=90), random.Random(0))
    assert kept.getpixel((48, 25)) == red
    turned = augment(drawing(), "a disc", Augment(hue=90), random.Random(0))
    assert turned.getpixel((48, 25)) != red


def test_colours_keep_grey_grey_and_luma_under_saturation() -> None:
    flat = Image.new("RGB", (8, 8), (120, 120, 120))
    for seed in range(10):
        pixels = np.array(augment(flat, "", Augment(hue=180, saturation=1), random.Random(seed)))
        assert abs(pixels.astype(int) - 120).max() <= 1
    colour, luma = Image.new("RGB", (8, 8), (120, 100, 110)), np.array([0.299, 0.587, 0.114])
    for seed in range(10):
        pixels = np.array(augment(colour, "", Augment(saturation=1), random.Random(seed)))
        assert abs(pixels[0, 0] @ luma - np.array([120, 100, 110]) @ luma) <= 1.5
    gains = [np.array(augment(flat, "", Augment(brightness=0.5), random.Random(i)))[0, 0, 0] / 120 for i in range(50)]
    assert 0.49 <= min(gains) < 0.7 and 1.3 < max(gains) <= 1.51
    contrasts = [
        augment(Image.new("RGB", (4, 4), (128, 228, 28)), "", Augment(contrast=1), random.Random(i)) for i in range(9)
    ]
    for made in contrasts:
        middle, high, low = np.array(made)[0, 0].astype(int)
        assert abs(middle - 128) <= 1 and (high == 255 or abs((high - 128) + (low - 128)) <= 3)


def test_background_is_what_the_border_reaches() -> None:
    changed = np.array(replace_background(drawing(), (0, 255, 0)))
    assert tuple(changed[0, 0]) == tuple(changed[48, 5]) == (0, 255, 0)
    assert tuple(changed[48, 48]) == WHITE  # the hole is part of the drawing
    assert tuple(changed[25, 48]) == (200, 30, 30)
    for photo in (noise(50, 40), Image.new("RGB", (10, 10), (200, 200, 200))):
        assert replace_background(photo, (0, 255, 0)).tobytes() == photo.tobytes()


@pytest.mark.parametrize("turns", range(4))
def test_background_is_reached_from_each_side(turns: int) -> None:
    cup = np.full((40, 40, 3), 255, np.uint8)  # open on one side only
    cup[10:30, 10:30] = 50
    cup[15:25, 15:30] = 255
    cup, inside = np.rot90(cup, turns), np.rot90(np.pad(np.ones((1, 1), bool), ((20, 19), (20, 19))), turns)
    changed = np.array(replace_background(Image.fromarray(np.ascontiguousarray(cup)), (0, 255, 0)))
    assert (
        changed[inside].tolist() == [[0, 255, 0]] and (changed == 50).all(axis=2).sum() == (cup == 50).all(axis=2).sum()
    )


def test_a_photo_with_a_white_sky_keeps_it() -> None:
    pixels = np.array(noise(40, 40))
    pixels[:12] = 255
    photo = Image.fromarray(pixels)
    assert replace_background(photo, (0, 255, 0)).tobytes() == photo.tobytes()


def test_the_frame_around_has_the_new_background() -> None:
    for seed in range(20):
        made = np.array(
            augment(drawing(), "", Augment(background=1, shrink=1.5, crop=1, rotate=20), random.Random(seed))
        )
        corners = {tuple(made[y, x].tolist()) for y in (0, -1) for x in (0, -1)}
        assert len(corners) == 1 and corners != {WHITE}


@pytest.mark.parametrize(
    ("name", "value"),
    [("crop", 0.0), ("crop", 1.5), ("shrink", 0.5), ("flip", 1.1), ("grey", -0.1), ("hue", 400.0), ("rotate", -3.0),
     ("background", float("nan")), ("stretch", 9.0), ("brightness", 2.0)],
)  # fmt: skip
def test_bad_settings_are_named(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"augment\.{name} must lie from"):
        dataclasses.replace(EVERYTHING, **{name: value})


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 40), height=st.integers(1, 40), seed=st.integers(0, 10**6),
    crop=st.floats(0.01, 1), shrink=st.floats(1, 5), chance=st.floats(0, 1), degrees=st.floats(0, 180),
)  # fmt: skip
def test_any_setting_gives_a_picture(
    width: int, height: int, seed: int, crop: float, shrink: float, chance: float, degrees: float
) -> None:
    config = Augment(crop, shrink, chance, degrees, chance, chance, chance, chance, degrees, chance, chance)
    made = augment(noise(width, height), "a thing", config, random.Random(seed))
    assert made.size == (width, height) and made.mode == "RGB"


@pytest.mark.parametrize("width", [3, 5])
def test_outlines_are_where_pillows_rank_filters_see_edges(width: int) -> None:
    image = drawing(40, 30)
    lightest, darkest = image.filter(ImageFilter.MaxFilter(width)), image.filter(ImageFilter.MinFilter(width))
    edge = (np.asarray(lightest).astype(int) - np.asarray(darkest)).max(axis=2)
    alone = np.asarray(draw_outlines(image, width, (10, 200, 90)))
    assert (alone[edge > 100] == 0).all() and (alone[edge < 32] == (10, 200, 90)).all()
    over = np.asarray(draw_outlines(image, width))
    assert (over[edge > 100] == 0).all() and (over[edge < 32] == np.asarray(image)[edge < 32]).all()


def test_lines_alone_spare_pictures_whose_caption_names_a_colour() -> None:
    config = Augment(outline=1.0)
    red = [np.asarray(augment(drawing(), "a red disc", config, random.Random(seed))) for seed in range(20)]
    any_ = [np.asarray(augment(drawing(), "a disc", config, random.Random(seed))) for seed in range(20)]

    def coloured(pixels: np.ndarray) -> bool:
        return bool((np.ptp(pixels.astype(int), axis=2) > 100).any())

    assert all(coloured(pixels) for pixels in red)
    assert 3 < sum(coloured(pixels) for pixels in any_) < 17
    assert all((pixels == 0).all(axis=2).any() for pixels in red + any_)
