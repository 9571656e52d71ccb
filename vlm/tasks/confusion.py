"""A picture of what is taken for what: the whole matrix for few labels, the most frequent mistakes for many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlm.files import write_file

ROW, LEFT, BAR, SIDE = 22, 520, 260, 26
MATRIX, LETTERS = 40, 28
"""Most labels that are drawn as a matrix, and letters of a label there."""


def confusions(truth: np.ndarray, predicted: np.ndarray, most: int = 15) -> list[tuple[int, int, int, float]]:
    """The most frequent pairs (true label, predicted label, count, share of the true label's pictures).

    Equally frequent ones are ordered by how often the predicted label is wrong elsewhere.
    """
    totals = Counter(truth.tolist())
    wrong = Counter(predicted[truth != predicted].tolist())
    pairs = Counter((int(t), int(p)) for t, p in zip(truth.tolist(), predicted.tolist(), strict=True) if t != p)
    ordered = sorted(pairs.items(), key=lambda item: (-item[1], -wrong[item[0][1]], item[0]))[:most]
    return [(t, p, count, count / totals[t]) for (t, p), count in ordered]


def attractors(truth: np.ndarray, predicted: np.ndarray, most: int = 15) -> list[tuple[int, int, int, float]]:
    """Labels given wrongly most often: (label, pictures, their different true labels, share of all mistakes)."""
    wrong = truth != predicted
    counts = Counter(predicted[wrong].tolist())
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]
    return [
        (label, count, len(set(truth[wrong & (predicted == label)].tolist())), count / int(wrong.sum()))
        for label, count in ordered
    ]


def confusion_picture(
    labels: Sequence[str], truth: np.ndarray, predicted: np.ndarray, path: Path, *, title: str = ""
) -> None:
    """Write a PNG: with few labels the whole matrix, with many two lists of bars (`confusions`, `attractors`).

    labels: words. truth, predicted: (N,) label numbers. Raises DataError when the file can't be written.
    """
    seen = sorted(set(truth.tolist()) | set(predicted.tolist()))
    image = (
        _matrix(labels, truth, predicted, seen) if len(seen) <= MATRIX else _mistakes(labels, truth, predicted, title)
    )
    write_file(path, lambda file: image.save(file, "PNG"))


def _matrix(labels: Sequence[str], truth: np.ndarray, predicted: np.ndarray, seen: list[int]) -> Image.Image:
    """Rows are true labels, columns what they were taken for; a cell's shade is its share of the row."""
    font = ImageFont.load_default(13)
    texts = [_short(labels[number]) for number in seen]
    margin = 12 + max(int(font.getlength(text)) for text in texts)
    image = Image.new("RGB", (margin + SIDE * len(seen) + 12, margin + SIDE * len(seen) + 12), "white")
    draw = ImageDraw.Draw(image)
    for row, true in enumerate(seen):
        top = margin + row * SIDE
        draw.text((6, top + 5), texts[row], "black", font)
        turned = Image.new("RGB", (margin, SIDE), "white")
        ImageDraw.Draw(turned).text((6, 5), texts[row], "black", font)
        image.paste(turned.rotate(90, expand=True), (top, 0))
        mine = predicted[truth == true]
        for column, guess in enumerate(seen):
            share = float((mine == guess).mean()) if len(mine) else 0.0
            shade = round(255 * (1 - share))
            box = (margin + column * SIDE, top, margin + (column + 1) * SIDE - 1, top + SIDE - 1)
            draw.rectangle(box, fill=(shade, shade, 255) if true == guess else (255, shade, shade))
    return image


def _mistakes(labels: Sequence[str], truth: np.ndarray, predicted: np.ndarray, title: str) -> Image.Image:
    """Two lists: what is taken for what, and what is wrongly answered most."""
    pairs = [
        (f"{_short(labels[true])}  ->  {_short(labels[guess])}", share, f"{100 * share:.0f} % ({count})")
        for true, guess, count, share in confusions(truth, predicted)
    ]
    answers = [
        (f"{_short(labels[label])}  for {of} other labels", share, f"{100 * share:.1f} % ({count})")
        for label, count, of, share in attractors(truth, predicted)
    ]
    name = f"{_short(title)}: " if title else ""
    rows: list[tuple[str, float, str]] = [
        (f"{name}label -> what it was taken for, share of the label's pictures", 0, "")
    ]
    rows += [*pairs, ("", 0, ""), ("wrong answers given most, share of all mistakes", 0, ""), *answers]
    font = ImageFont.load_default(13)
    image = Image.new("RGB", (LEFT + BAR + 110, ROW * len(rows) + 12), "white")
    draw = ImageDraw.Draw(image)
    for place, (text, share, figure) in enumerate(rows):
        top = ROW * place + 6
        draw.text((8, top), text, "black", font)
        draw.text((LEFT + BAR + 10, top), figure, "black", font)
        if figure:
            draw.rectangle((LEFT, top + 2, LEFT + round(BAR * share), top + 14), fill=(200, 60, 60))
    return image


def _short(label: str) -> str:
    text = " ".join(label.split())
    return text if len(text) <= LETTERS else text[: LETTERS - 1] + "…"
