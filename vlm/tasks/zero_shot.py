"""Zero-shot classification: labels as sentences, pictures to the nearest of them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlm.data.images import load_image
from vlm.data.transforms import ImageTransform
from vlm.errors import ConfigError, DataError
from vlm.tasks.templates import fill, resolve_templates
from vlm.weights.loaded import VisionLanguageModel

Picture = str | os.PathLike[str] | Image.Image | np.ndarray | bytes | bytearray | BinaryIO


@dataclass(frozen=True)
class Prediction:
    """A label and how probable it is among all labels."""

    label: str
    score: float
    """Softmax over the labels, in [0, 1]."""


class ZeroShotClassifier:
    """Classifies pictures among labels given as words.

    >>> classifier = ZeroShotClassifier(vlm.load("tiny-clip"), ["cat", "dog"])
    >>> classifier.predict("pet.png", top_k=1)
    [Prediction(label='cat', score=0.93)]
    """

    def __init__(
        self,
        model: VisionLanguageModel | str | Path,
        labels: Sequence[str],
        templates: str | Sequence[str] | None = None,
        *,
        batch_size: int = 64,
    ) -> None:
        """Compute the labels' features once; later calls run the image tower alone.

        model: from `vlm.load`, or what `vlm.load` takes. labels: different words, at least one. templates: a
        set's name, sentences with ``{}`` for the label, or None for what suits the model. batch_size: pictures
        (and texts) that run at once. Raises ConfigError for labels or templates that can't be used, VlmError
        when the model has no text tower of its own.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        self.labels = check_labels(labels)
        resolve_templates(templates)  # before a model is loaded
        self.model = model if isinstance(model, VisionLanguageModel) else _load(model)
        self.templates = resolve_templates(templates, self.model.tokenizer)
        self.model.network.eval()
        self.batch_size = batch_size
        self.features = run_steps(label_features(self.model, self.labels, self.templates, batch_size=batch_size))
        """(labels, D), unit norm."""

    def predict(self, images: Picture | Iterable[Picture], top_k: int = 5) -> Any:
        """The most probable labels of each picture, best first.

        images: one picture (path, PIL image, array (H, W, 3), encoded bytes or open file), or several, also as
        an array (N, H, W, 3). top_k: how many labels, at most all. Returns a list of `Prediction` for one
        picture, a list of such lists for several. Raises DataError naming a picture that can't be read.
        """
        given: Any = images
        if is_picture(given):
            return next(self.predict_each([given], top_k))[1]
        if not isinstance(given, Iterable):
            raise DataError(f"expected a picture or several, got {type(given).__name__}")
        return [found for _, found in self.predict_each(given, top_k)]

    def predict_each(
        self,
        images: Iterable[Picture],
        top_k: int = 5,
        *,
        on_error: Callable[[Picture, DataError], None] | None = None,
    ) -> Iterator[tuple[Picture, list[Prediction]]]:
        """Each picture with its predictions, in order, for any number of them: one batch is held at a time.

        on_error: called with a picture that can't be read, which is then left out; None raises the DataError.
        """
        _check_top_k(top_k)
        for given, pixels in picture_batches(images, self.model.transform, self.batch_size, on_error=on_error):
            yield from zip(given, self.predict_pixels(pixels, top_k), strict=True)

    def predict_pixels(self, pixels: Tensor, top_k: int = 5) -> list[list[Prediction]]:
        """Predictions for preprocessed pictures (B, 3, H, W)."""
        _check_top_k(top_k)
        return best(self.scores(pixels), self.labels, top_k)

    def scores(self, pixels: Tensor) -> Tensor:
        """Probabilities (B, labels) of preprocessed pictures (B, 3, H, W)."""
        pixels = pixels.to(self.model.device, self.model.dtype)
        parts = [self.model.encode_image(part) for part in pixels.split(self.batch_size)]
        return probabilities(self.model, torch.cat(parts), self.features)


def picture_batches(
    images: Iterable[Picture],
    transform: ImageTransform,
    batch_size: int,
    *,
    on_error: Callable[[Picture, DataError], None] | None = None,
) -> Iterator[tuple[list[Picture], Tensor]]:
    """Pictures as they were given with their pixels (B, 3, H, W), one batch held at a time.

    on_error: called with a picture that can't be read, which is then left out; None raises the DataError.
    """
    given: list[Picture] = []
    pixels: list[Tensor] = []
    for image in images:
        try:
            # Preprocessed at once: decoded, a batch of large photos would not fit in memory.
            pixels.append(transform(load_image(image)))
            given.append(image)
        except DataError as error:
            if on_error is None:
                raise
            on_error(image, error)
        if len(given) == batch_size:
            yield given, torch.stack(pixels)
            given, pixels = [], []
    if given:
        yield given, torch.stack(pixels)


def label_features(
    model: VisionLanguageModel, labels: Sequence[str], templates: Sequence[str], *, batch_size: int
) -> Generator[None, None, Tensor]:
    """(labels, D) fp32: the mean over templates of unit features, made unit again (CLIP §3.1.4).

    In steps of `batch_size` texts, between which a service does other work; `run_steps` takes them all.
    """
    texts = [fill(template, label) for label in labels for template in templates]
    # Summed as they come: all sentences of all labels may be more than fits in memory.
    sums: Tensor | None = None
    for chosen in by_length(texts, batch_size):
        with torch.inference_mode():
            found = model.encode_text(model.tokens([texts[number] for number in chosen])).float()
            if sums is None:
                sums = found.new_zeros(len(labels), found.shape[1])
            owners = torch.tensor([number // len(templates) for number in chosen], device=found.device)
            sums.index_add_(0, owners, found)
        yield
    return F.normalize(torch.zeros(0) if sums is None else sums, dim=-1)


def text_features(
    model: VisionLanguageModel, texts: Sequence[str], *, batch_size: int
) -> Generator[None, None, Tensor]:
    """(texts, D) fp32, unit norm, in steps as `label_features`."""
    places = by_length(texts, batch_size)
    parts = []
    for chosen in places:
        parts.append(model.encode_text(model.tokens([texts[number] for number in chosen])).float())
        yield
    order = torch.tensor([number for chosen in places for number in chosen])
    return torch.cat(parts)[order.argsort().to(parts[0].device)]


def by_length(texts: Sequence[str], batch_size: int) -> list[list[int]]:
    """Numbers of texts in batches of about one length, so that little padding is computed."""
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def run_steps(steps: Generator[None, None, Tensor]) -> Tensor:
    """All steps at once, and what they return."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def probabilities(model: VisionLanguageModel, images: Tensor, labels: Tensor) -> Tensor:
    """(images, labels) from features of pictures (N, D) and of labels (L, D)."""
    # fp32 from here: a half-precision logit near 100 is off by 0.06.
    return model.similarity(images.float(), labels).float().softmax(dim=1)


def best(scores: Tensor, labels: Sequence[str], top_k: int) -> list[list[Prediction]]:
    """The `top_k` most probable labels of each row of `scores` (N, labels), best first."""
    values, places = scores.topk(min(top_k, len(labels)), dim=1)
    return [
        [Prediction(labels[place], score) for place, score in zip(row, found, strict=True)]
        for row, found in zip(places.tolist(), values.tolist(), strict=True)
    ]


def is_picture(value: object) -> bool:
    """Whether this is one picture rather than several."""
    if isinstance(value, np.ndarray):
        return value.ndim != 4
    return isinstance(value, str | os.PathLike | bytes | bytearray | Image.Image) or hasattr(value, "read")


def check_labels(labels: Sequence[str]) -> list[str]:
    """The labels without outer spaces. Raises ConfigError when there are none, or blank or repeated ones."""
    if isinstance(labels, str):
        raise ConfigError(f"labels: expected a list of words, got the text {labels!r}; split it, as in ['cat', 'dog']")
    if not isinstance(labels, Iterable):
        raise ConfigError(f"labels: expected a list of words, got {type(labels).__name__}")
    cleaned = []
    for number, label in enumerate(labels, 1):
        if not isinstance(label, str):
            raise ConfigError(f"labels: number {number} is {label!r}, expected a word")
        if not label.strip():
            raise ConfigError(f"labels: number {number} is blank; remove it")
        cleaned.append(label.strip())
    if not cleaned:
        raise ConfigError("labels: none were given; name at least one, such as ['cat', 'dog']")
    repeated = [label for label, count in Counter(cleaned).items() if count > 1]
    if repeated:
        more = f" and {len(repeated) - 10} more" if len(repeated) > 10 else ""
        raise ConfigError(f"labels: given more than once: {', '.join(repeated[:10])}{more}; keep one of each")
    return cleaned


def _check_top_k(top_k: int) -> None:
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
        raise ConfigError(f"top_k must be a whole number of at least 1, got {top_k!r}")


def _load(name: str | Path) -> VisionLanguageModel:
    from vlm.weights.load import load

    return load(name)
