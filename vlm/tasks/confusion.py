"""A picture of what is taken for what: the most frequent mistakes, with an example of each."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlm.errors import DataError

ROW, LEFT, BAR = 22, 520, 260


def confusions(truth: np.ndarray, predicted: np.ndarray, most: int = 30) -> list[tuple[int, int, int, float]]:
    """The most frequent pairs (true label, predicted label, count, share of the true label's pictures)."""
    totals = Counter(truth.tolist())
    pairs = Counter((int(t), int(p)) for t, p in zip(truth.tolist(), predicted.tolist(), strict=True) if t != p)
    ordered = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:most]
    return [(t, p, count, count / totals[t]) for (t, p), count in ordered]


def confusion_picture(
    labels: Sequence[str], truth: np.ndarray, predicted: np.ndarray, source: Any, path: Path, *, most: int = 30
) -> None:
    """Write a PNG: with few labels the whole matrix, with many the most frequent mistakes as bars.

    labels: words. truth, predicted: (N,) label numbers. Raises DataError when the file can't be written.
    """
    present = sorted(set(truth.tolist()))
    image = (
        _matrix(labels, truth, predicted, present)
        if len(present) <= 40
        else _bars(labels, confusions(truth, predicted, most), getattr(source, "name", ""))
    )
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(temporary, "PNG")
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"{path}: can't be written ({error.strerror or error})") from error


def _matrix(labels: Sequence[str], truth: np.ndarray, predicted: np.ndarray, present: list[int]) -> Image.Image:
    font = ImageFont.load_default(13)
    side, margin = 26, 12 + max(int(font.getlength(labels[number])) for number in present)
    image = Image.new("RGB", (margin + side * len(present) + 12, margin + side * len(present) + 12), "white")
    draw = ImageDraw.Draw(image)
    across = Image.new("RGB", (margin, side), "white")
    for row, true in enumerate(present):
        mine = predicted[truth == true]
        top = margin + row * side
        draw.text((6, top + 5), labels[true], "black", font)
        turned = across.copy()
        ImageDraw.Draw(turned).text((6, 5), labels[true], "black", font)
        image.paste(turned.rotate(90, expand=True), (margin + row * side, 0))
        for column, guess in enumerate(present):
            share = float((mine == guess).mean())
            shade = round(255 * (1 - share))
            box = (margin + column * side, top, margin + (column + 1) * side - 1, top + side - 1)
            draw.rectangle(box, fill=(shade, shade, 255) if true == guess else (255, shade, shade))
    return image


def _bars(labels: Sequence[str], rows: list[tuple[int, int, int, float]], name: str) -> Image.Image:
    font = ImageFont.load_default(13)
    image = Image.new("RGB", (LEFT + BAR + 90, ROW * (len(rows) + 2)), "white")
    draw = ImageDraw.Draw(image)
    draw.text((8, 4), f"{name}: label, what it was taken for, share of the label's pictures", "black", font)
    for place, (true, guess, count, share) in enumerate(rows, 1):
        top = ROW * place + 6
        text = f"{labels[true]}  ->  {labels[guess]}"
        while font.getlength(text) > LEFT - 16:
            text = text[:-2]
        draw.text((8, top), text, "black", font)
        draw.rectangle((LEFT, top + 2, LEFT + round(BAR * share), top + 14), fill=(200, 60, 60))
        draw.text((LEFT + BAR + 10, top), f"{100 * share:.0f} % ({count})", "black", font)
    return image
