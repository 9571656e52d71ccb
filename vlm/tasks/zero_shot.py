"""Zero-shot classification: labels as sentences, pictures to the nearest of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlm.errors import ConfigError, DataError
from vlm.tasks.templates import fill, resolve_templates
from vlm.weights.loaded import VisionLanguageModel

Picture = str | Path | Image.Image | np.ndarray | bytes


@dataclass(frozen=True)
class Prediction:
    """A label and how probable it is among all labels."""

    label: str
    score: float
    """Softmax over the labels, in [0, 1]."""


class ZeroShotClassifier:
    """Classifies pictures among labels given as words."""

    def __init__(
        self,
        model: VisionLanguageModel | str | Path,
        labels: Sequence[str],
        templates: str | Sequence[str] | None = None,
        *,
        batch_size: int = 64,
    ) -> None:
        """Prepare the labels' features once; later calls run the image tower alone.

        model: from `vlm.load`, or what `vlm.load` takes. labels: different words, at least one. templates: a
        set's name, sentences with ``{}`` for the label, or None for the bare label. batch_size: pictures (and
        texts) that run at once. Raises ConfigError for labels or templates that can't be used.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        self.labels = check_labels(labels)
        self.templates = resolve_templates(templates)
        self.model = model if isinstance(model, VisionLanguageModel) else _load(model)
        self.model.network.eval()
        self.batch_size = batch_size
        self.features = self._label_features()

    def predict(self, images: Picture | Iterable[Picture], top_k: int = 5) -> Any:
        """The most probable labels of each picture, best first.

        images: one picture (path, PIL image, RGB array (H, W, 3) or encoded bytes), or several. top_k: how many
        labels, at most all. Returns a list of `Prediction` for one picture, a list of such lists for several.
        Raises DataError naming a picture that can't be read.
        """
        if isinstance(images, Picture):
            return next(self.stream([images], top_k))
        return list(self.stream(images, top_k))

    def stream(self, images: Iterable[Picture], top_k: int = 5) -> Iterator[list[Prediction]]:
        """`predict` for any number of pictures, a batch at a time."""
        if top_k < 1:
            raise ConfigError(f"top_k must be at least 1, got {top_k}")
        pictures = iter(images)
        while batch := list(itertools.islice(pictures, self.batch_size)):
            yield from self.predict_pixels(self.model.pixels(batch), top_k)

    def predict_pixels(self, pixels: Tensor, top_k: int = 5) -> list[list[Prediction]]:
        """Predictions for preprocessed pictures (B, 3, H, W)."""
        scores, places = self.scores(pixels).topk(min(top_k, len(self.labels)), dim=1)
        return [
            [Prediction(self.labels[place], score) for place, score in zip(row, values, strict=True)]
            for row, values in zip(places.tolist(), scores.tolist(), strict=True)
        ]

    def scores(self, pixels: Tensor) -> Tensor:
        """Probabilities (B, labels) of preprocessed pictures (B, 3, H, W)."""
        parts = [self.model.encode_image(part) for part in pixels.split(self.batch_size)]
        return self.model.similarity(torch.cat(parts), self.features).float().softmax(dim=1)

    @torch.inference_mode()
    def _label_features(self) -> Tensor:
        """(labels, D): the mean over templates of unit features, made unit again."""
        texts = [fill(template, label) for label in self.labels for template in self.templates]
        # Texts of about one length run together, so that little padding is computed.
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        parts = []
        for start in range(0, len(order), self.batch_size):
            chosen = [texts[number] for number in order[start : start + self.batch_size]]
            parts.append(self.model.encode_text(self.model.tokens(chosen)))
        sorted_features = torch.cat(parts)
        features = torch.empty_like(sorted_features)
        features[torch.tensor(order, device=features.device)] = sorted_features
        grouped = features.unflatten(0, (len(self.labels), len(self.templates)))  # (labels, templates, D)
        return F.normalize(grouped.mean(dim=1), dim=-1)


def check_labels(labels: Sequence[str]) -> list[str]:
    """The labels without outer spaces. Raises ConfigError when there are none, or blank or repeated ones."""
    if isinstance(labels, str):
        raise ConfigError(f"labels: expected a list of words, got the text {labels!r}; split it, as in ['cat', 'dog']")
    cleaned = [str(label).strip() for label in labels]
    if not cleaned:
        raise ConfigError("labels: none were given; name at least one, such as ['cat', 'dog']")
    blank = [number for number, label in enumerate(cleaned, 1) if not label]
    if blank:
        raise ConfigError(f"labels: number {blank[0]} is blank; remove it")
    repeated = sorted({label for label in cleaned if cleaned.count(label) > 1}) if _has_repeats(cleaned) else []
    if repeated:
        raise ConfigError(f"labels: given more than once: {', '.join(repeated[:10])}; keep one of each")
    return cleaned


def _has_repeats(labels: list[str]) -> bool:
    return len(set(labels)) < len(labels)


def _load(name: str | Path) -> VisionLanguageModel:
    from vlm.weights.load import load

    model = load(name)
    if not hasattr(model.network, "encode_text"):
        raise DataError(f"{name}: a {model.family} model can't compare pictures with texts")
    return model
