"""Random changes of a training picture that its caption survives."""

from __future__ import annotations

import colorsys
import math
import random
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vlm.errors import ConfigError

_SIDED = re.compile(
    # Sides and turns.
    r"\b(left|right|leftwards?|rightwards?|(north|south)?(east|west)|north|south|clockwise|anticlockwise"
    r"|counterclockwise|facing|pointing|pointer|arrows?|turns?|next|previous|forward|back|backward|fast|rewind"
    r"|play|track|align|italic|profile|compass|waxing|waning|quarter|crescent|moon|yin|spiral|khanda|om"
    # Writing, numbers and what shows them.
    r"|letters?|text|words?|writing|handwriting|alphabet|abc|abcd|latin|uppercase|lowercase|font|logo|label|labelled"
    r"|digits?|numbers?|input|button|keycap|keyboard|keys?|sos|atm|wc|tm|ok|copyright|registered|email|e-mail"
    r"|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirty|hundred|first|second|third"
    r"|clock|clocks|o.clock|watch|stopwatch|calendar|date|newspaper|book|chart|score|notes?|clef|music(al)?"
    r"|playing cards?|mahjong|joker|dice|domino|banknote|currency|dollars?|euros?|yen|pounds?|cents?"
    r"|signs?|symbols?|indicator|squared?|ideograph|japanese|chinese|hiragana|katakana|percent|question|check"
    r"|zodiac|aries|taurus|gemini|leo|virgo|libra|scorpio|scorpius|sagittarius|capricorn|aquarius|pisces"
    # Places.
    r"|flags?|maps?|globe|earth|world|americas?|africa|australia|europe|asia|japan)\b|\d",
    re.IGNORECASE,
)
_COLOURED = re.compile(
    r"\b(colou?r\w*|rainbow|red|reddish|orange|yellow|green|greenish|blue|bluish|purple|violet|pink|brown|black"
    r"|white|gr[ae]y|gold|golden|silver|bronze|turquoise|cyan|magenta|teal|beige|blonde?|ginger|dark|skin tone"
    r"|(light|medium|dark) skin|flags?|traffic lights?)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Augment:
    """What may happen to a training picture; the defaults do nothing."""

    crop: float = 1.0
    """Least share of the picture's side that is shown, above 0; 1 shows all."""
    shrink: float = 1.0
    """Most that the picture gets smaller within its frame: 1.3 shows it at 1 / 1.3."""
    stretch: float = 0.0
    """Most relative change of width against height (as a logarithm: 0.2 is about a fifth)."""
    rotate: float = 0.0
    """Most degrees of rotation, to either side."""
    flip: float = 0.0
    """Chance of a mirror image, where the caption allows it."""
    brightness: float = 0.0
    """Most relative change, 0 to 1; so for the next two."""
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    """Most degrees of rotation in hue; none where the caption names a colour."""
    grey: float = 0.0
    """Chance that all colour is taken away, where the caption names none."""
    background: float = 0.0
    """Chance of another colour in place of a white background."""
    outline: float = 0.0
    """Chance that edges become dark lines, as other artists draw; half of these pictures keep the lines alone,
    where the caption names no colour."""

    def __post_init__(self) -> None:
        shares = ("flip", "brightness", "contrast", "saturation", "grey", "background", "outline")
        bounds = dict.fromkeys(shares, (0.0, 1.0))
        bounds |= {"crop": (0.01, 1.0), "shrink": (1.0, 100.0), "stretch": (0.0, 2.0)}
        bounds |= {"rotate": (0.0, 180.0), "hue": (0.0, 180.0)}
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not low <= value <= high:  # also refuses NaN
                raise ConfigError(f"augment.{name} must lie from {low:g} to {high:g}, got {value!r}")


def flip_safe(caption: str) -> bool:
    """Whether a mirror image still fits the caption: no sides, turns, writing, numbers, flags, maps."""
    return _SIDED.search(caption) is None


def colour_safe(caption: str) -> bool:
    """Whether a grey picture, or one of other hues, still fits the caption: it names no colour."""
    return _COLOURED.search(caption) is None


def augment(image: Image.Image, caption: str, config: Augment, rng: random.Random) -> Image.Image:
    """A changed copy of a picture (RGB, any size), of the same size; all draws come from `rng`.

    caption: all that must still be true of it; it decides whether mirroring and loss of colour are allowed.
    """
    fill = (255, 255, 255)
    if config.background and rng.random() < config.background:
        fill = _colour(rng)
        image = replace_background(image, fill)
    image = _moved(image, caption, config, rng, fill)
    if config.outline and rng.random() < config.outline:
        lines_alone = rng.random() < 0.5 and colour_safe(caption)
        image = draw_outlines(image, rng.choice((3, 3, 5)), fill if lines_alone else None)
    return _recoloured(image, caption, config, rng)


def replace_background(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Give another colour to the white that reaches the border in a straight line.

    Pictures whose border isn't white (photos) stay as they are.
    """
    pixels = np.array(image)  # (H, W, 3)
    white = pixels.min(axis=2) >= 248  # (H, W)
    border = np.concatenate([white[0], white[-1], white[:, 0], white[:, -1]])
    if border.mean() < 0.6:
        return image
    reached = np.logical_and.accumulate(white, axis=0) | np.logical_and.accumulate(white, axis=1)
    reached |= np.logical_and.accumulate(white[::-1], axis=0)[::-1]
    reached |= np.logical_and.accumulate(white[:, ::-1], axis=1)[:, ::-1]
    pixels[reached] = colour
    return Image.fromarray(pixels)


def draw_outlines(image: Image.Image, width: int, paper: tuple[int, int, int] | None = None) -> Image.Image:
    """Draw the edges of a picture as black lines, over it or, with a colour for `paper`, alone on that.

    width: odd pixels of the neighbourhood that an edge is looked for in; lines get nearly as wide.
    """
    pixels = np.array(image)  # (H, W, 3)
    edges = (_spread(pixels, width, np.maximum) - _spread(pixels, width, np.minimum)).max(axis=2)  # (H, W)
    ink = Image.fromarray(np.clip(4 * (edges.astype(np.int16) - 32), 0, 255).astype(np.uint8))
    under = image if paper is None else Image.new("RGB", image.size, paper)
    return Image.composite(Image.new("RGB", image.size), under, ink)


def _spread(pixels: np.ndarray, width: int, pick: np.ufunc) -> np.ndarray:
    """What `pick` (np.maximum, np.minimum) gives over the width x width neighbourhood of each pixel."""
    for axis in (0, 1):
        pad = [(0, 0)] * pixels.ndim
        pad[axis] = (width // 2, width // 2)
        views = np.lib.stride_tricks.sliding_window_view(np.pad(pixels, pad, "edge"), width, axis)
        pixels = pick.reduce([views[..., shift] for shift in range(width)])
    return pixels


def _moved(
    image: Image.Image, caption: str, config: Augment, rng: random.Random, fill: tuple[int, int, int]
) -> Image.Image:
    """Crop, shrink, stretch, rotate and mirror in one resampling."""
    width, height = image.size
    scale = rng.uniform(config.crop, config.shrink)
    stretch = math.exp(rng.uniform(-config.stretch, config.stretch) / 2)
    angle = math.radians(rng.uniform(-config.rotate, config.rotate))
    mirror = -1.0 if rng.random() < config.flip and flip_safe(caption) else 1.0
    across, down = scale * stretch, scale / stretch
    # A shown part smaller than the picture may lie anywhere in it, a larger frame anywhere around it.
    shift_x = rng.uniform(-0.5, 0.5) * abs(1 - across) * width
    shift_y = rng.uniform(-0.5, 0.5) * abs(1 - down) * height
    if (across, down, angle, mirror) == (1.0, 1.0, 0.0, 1.0):
        return image
    cos, sin = math.cos(angle), math.sin(angle)
    a, b = across * cos * mirror, -down * sin
    d, e = across * sin * mirror, down * cos
    middle_x, middle_y = width / 2, height / 2
    c = middle_x + shift_x - a * middle_x - b * middle_y
    f = middle_y + shift_y - d * middle_x - e * middle_y
    kind = Image.Resampling.BILINEAR
    return image.transform((width, height), Image.Transform.AFFINE, (a, b, c, d, e, f), kind, fillcolor=fill)


def _recoloured(image: Image.Image, caption: str, config: Augment, rng: random.Random) -> Image.Image:
    """Brightness, contrast, saturation and hue as one 3 x 4 matrix."""
    gain = 1 + rng.uniform(-config.brightness, config.brightness)
    contrast = 1 + rng.uniform(-config.contrast, config.contrast)
    saturation = 1 + rng.uniform(-config.saturation, config.saturation)
    turn = math.radians(rng.uniform(-config.hue, config.hue))
    grey_drawn = rng.random() < config.grey
    if (grey_drawn or turn) and not colour_safe(caption):
        grey_drawn, turn = False, 0.0
    if grey_drawn:
        saturation = 0.0
    if (gain, contrast, saturation, turn) == (1.0, 1.0, 1.0, 0.0):
        return image
    luma = np.array([0.299, 0.587, 0.114])
    grey = np.tile(luma, (3, 1))
    axis = 1 / 3
    cos, sin = math.cos(turn), math.sin(turn) / math.sqrt(3)
    rotation = np.full((3, 3), axis * (1 - cos)) + cos * np.eye(3)
    rotation += sin * np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    matrix = gain * contrast * (grey + saturation * (rotation - grey @ rotation))
    offset = 255 * gain * (1 - contrast) / 2
    rows = np.concatenate([matrix, np.full((3, 1), offset)], axis=1)
    return image.convert("RGB", tuple(rows.ravel().tolist()))


def _colour(rng: random.Random) -> tuple[int, int, int]:
    """Any hue, mostly light or strong."""
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.random() ** 2, 1 - 0.6 * rng.random() ** 2)
    return round(255 * red), round(255 * green), round(255 * blue)
