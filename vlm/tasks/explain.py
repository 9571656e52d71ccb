"""Which parts of a picture a model's answer to a text comes from: maps of each word, and a picture of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from vlm.data.images import load_image
from vlm.errors import ConfigError
from vlm.tasks.heat import MIDDLE, choose_method, heat
from vlm.weights.loaded import VisionLanguageModel

TILE, GAP, LABEL, COLUMNS = 224, 12, 22, 4
WORD_MAPS = ("grad-cam", "plan")
"""Methods that give a map of each token at once."""


@dataclass(frozen=True)
class Explanation:
    """Heat over a picture as the model saw it."""

    text: str
    method: str
    whole: np.ndarray
    """(h, w) of the text as a whole; highest value 1, or all 0 where nothing is seen."""
    words: list[str]
    """Empty when the maps don't depend on the text (``rollout``)."""
    maps: np.ndarray
    """(words, h, w), each in [0, 1] like `whole`."""


def explain(
    model: VisionLanguageModel,
    image: Any,
    text: str,
    *,
    method: str = "auto",
    layer: int = MIDDLE,
    words: bool = True,
) -> Explanation:
    """Heat of each word of a text, and of all of it, over a picture.

    image: path, PIL image, array (H, W, 3) or bytes. method: see `vlm.tasks.heat`; ``auto`` for the model's
    best. layer: of the fusion layers, for ``grad-cam`` alone. words: whether each word is wanted too; ``rollout``
    has none. The whole is the sum over tokens where each has a map (``grad-cam``, ``plan``), else a map of its
    own. Raises ConfigError for an empty text, an unknown method or a layer that it has no use for, MissingVerbError
    when the model can't, DataError for a bad picture.
    """
    method = choose_method(model, method)
    shown = text.split()
    if not shown:
        raise ConfigError("text: is blank; write what to look for, such as 'a red apple'")
    pixels = model.pixels(image)
    tokens = model.tokens(text)
    if method in WORD_MAPS:
        found = heat(model, pixels, tokens, method=method, layer=layer).cpu()  # (L, h, w)
        whole = found.sum(dim=0)
        shown, groups = word_places(model, text, len(found)) if words else ([], [])
        each = [found[start:end].sum(dim=0) for start, end in groups]
    else:
        whole = heat(model, pixels, tokens, method=method, layer=layer).cpu()[0]
        if not words or method == "rollout":
            shown = []
        each = list(heat(model, pixels, model.tokens(shown), method=method).cpu()) if shown else []
    maps = torch.stack([scaled(one) for one in each]) if each else torch.zeros(0, *whole.shape)
    return Explanation(text, method, scaled(whole).numpy(), shown, maps.numpy())


def scaled(one: torch.Tensor) -> torch.Tensor:
    """A map of at least 0, its highest value made 1; shares of its parts stay. One without heat stays 0."""
    highest = one.max()
    return one / highest if highest > 0 else torch.zeros_like(one)


def word_places(model: VisionLanguageModel, text: str, length: int) -> tuple[list[str], list[tuple[int, int]]]:
    """Words of a text and where the tokens of each stand, start and end, among `length` tokens with both special ones.

    Words that were cut off are left out. Where a tokenizer doesn't keep words apart, each token is a word.
    """
    words = text.split()
    counts = model.tokens(words)["attention_mask"].sum(dim=1).cpu().numpy() - 2  # start and end token
    ends = 1 + np.cumsum(counts)
    if min(ends[-1], length - 1) != length - 1 or (counts < 1).any():
        ids = model.tokens(text)["input_ids"][0].tolist()
        return [model.tokenizer.decode([one]) for one in ids[1:-1]], [
            (place, place + 1) for place in range(1, length - 1)
        ]
    places = [(int(end - count), int(min(end, length - 1))) for end, count in zip(ends, counts, strict=True)]
    kept = [(word, place) for word, place in zip(words, places, strict=True) if place[0] < place[1]]
    return [word for word, _ in kept], [place for _, place in kept]


def explanation_picture(model: VisionLanguageModel, image: Any, explanation: Explanation) -> Image.Image:
    """The picture as the model sees it, then the heat of the whole text and of each word laid over it."""
    seen = model.transform.fit(load_image(image))
    scale = TILE / max(seen.size)
    seen = seen.resize((round(scale * seen.width), round(scale * seen.height)), Image.Resampling.BICUBIC)
    tiles = [("picture", seen), (f"all of it ({explanation.method})", overlay(seen, explanation.whole))]
    tiles += [(word, overlay(seen, one)) for word, one in zip(explanation.words, explanation.maps, strict=True)]
    columns, font = min(COLUMNS, len(tiles)), ImageFont.load_default(14)
    rows, step = math.ceil(len(tiles) / columns), (TILE + GAP, TILE + LABEL + GAP)
    page = Image.new("RGB", (columns * step[0] + GAP, rows * step[1] + LABEL + 2 * GAP), "white")
    draw = ImageDraw.Draw(page)
    draw.text((GAP, GAP), _fitting(explanation.text, font, page.width - 2 * GAP), "black", font)
    for number, (label, tile) in enumerate(tiles):
        left, top = GAP + number % columns * step[0], LABEL + 2 * GAP + number // columns * step[1]
        page.paste(tile, (left, top))
        draw.text((left, top + TILE + 3), _fitting(label, font, TILE), "black", font)
    return page


def overlay(image: Image.Image, one: np.ndarray) -> Image.Image:
    """A map (h, w) in [0, 1] over a picture: blue is cold, red is hot."""
    grey = Image.fromarray(np.round(255 * one).astype(np.uint8)).resize(image.size, Image.Resampling.BICUBIC)
    value = np.asarray(grey, dtype=np.float32)[..., None] / 255  # (H, W, 1)
    centres = np.array([0.85, 0.5, 0.15], dtype=np.float32)  # of red, green and blue on the scale
    colours = np.clip(1.5 - np.abs(value - centres) * 4, 0, 1) * 255  # (H, W, 3)
    mixed = 0.5 * np.asarray(image.convert("RGB"), dtype=np.float32) + 0.5 * colours
    return Image.fromarray(mixed.astype(np.uint8))


def _fitting(text: str, font: Any, width: int) -> str:
    """The text, cut where it would be wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
