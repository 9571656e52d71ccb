"""The pointing game: four pictures in one, a text that names one of them; does the heat point at it?

As in the pointing game of Zhang et al. (arXiv 1608.00507), on collages, so that no boxes are needed and a guess is
right a quarter of the time. The control is the same architecture with random weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlm.data.images import decode_image
from vlm.errors import ConfigError, DataError
from vlm.tasks.explain import explain
from vlm.tasks.heat import MIDDLE, choose_method
from vlm.tasks.metrics import Figure, bootstrap, share
from vlm.weights.loaded import VisionLanguageModel

QUADRANTS = 4
CHANCE = 1 / QUADRANTS


@dataclass(frozen=True)
class Collage:
    """Four pictures of different concepts, and the one that the text names."""

    rows: tuple[int, int, int, int]
    """Of the source: top left, top right, bottom left, bottom right."""
    target: int
    """0 to 3."""
    text: str


@dataclass(frozen=True)
class Pointed:
    """Figures of one model over all collages."""

    hits: Figure
    """Share of collages whose hottest patch is in the right quadrant."""
    heat: Figure
    """Mean share of the heat in the right quadrant."""

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"hits": self.hits.as_dict(), "heat": self.heat.as_dict()}


@dataclass(frozen=True)
class PointingReport:
    """A model beside its control."""

    model: str
    data: str
    method: str
    seed: int
    trained: Pointed
    control: Pointed | None
    """The same architecture with random weights."""

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        values = {
            "model": self.model, "data": self.data, "method": self.method, "seed": self.seed,
            "collages": self.trained.hits.count, **self.trained.as_dict(),
        }  # fmt: skip
        return values | ({"random weights": self.control.as_dict()} if self.control else {})


def evaluate_pointing(
    model: VisionLanguageModel,
    source: Any,
    *,
    count: int = 200,
    method: str = "auto",
    layer: int = MIDDLE,
    control: bool = True,
    seed: int = 0,
) -> PointingReport:
    """Play on `count` collages drawn by `seed`.

    method, layer: as for `explain`. control: whether random weights play too. Raises ConfigError for settings
    that can't be used, MissingVerbError when the model can't tell where it looks, DataError when the source
    holds fewer than four concepts or a picture can't be read.
    """
    method = choose_method(model, method)
    collages = draw_collages(source, count, seed)
    trained = _play(model, source, collages, method, layer, seed)
    other = _play(random_weights(model, seed), source, collages, method, layer, seed) if control else None
    return PointingReport(model.name, source.name, method, seed, trained, other)


def draw_collages(source: Any, count: int, seed: int) -> list[Collage]:
    """Collages of pictures that share neither concept nor caption; the target's main caption is the text.

    Raises ConfigError for a count below 1, DataError when there are fewer than four different concepts.
    """
    if count < 1:
        raise ConfigError(f"collages must be at least 1, got {count}")
    captions = [str(source.meta(row)["captions"][0]) for row in range(len(source))]
    concepts = [str(source.meta(row).get("concept") or captions[row]) for row in range(len(source))]
    if min(len(set(concepts)), len(set(captions))) < QUADRANTS:
        raise DataError(f"{source.name}: {len(set(concepts))} different concepts, a collage needs {QUADRANTS}")
    rng = np.random.default_rng(seed)
    found: list[Collage] = []
    while len(found) < count:
        rows = tuple(rng.integers(0, len(source), QUADRANTS).tolist())
        target = int(rng.integers(QUADRANTS))
        if len({concepts[row] for row in rows}) == len({captions[row] for row in rows}) == QUADRANTS:
            found.append(Collage(rows, target, captions[rows[target]]))
    return found


def collage_picture(model: VisionLanguageModel, source: Any, collage: Collage) -> Image.Image:
    """The four pictures as the model would see each, side by side at half its size. Raises DataError."""
    side = model.transform.size // 2
    page = Image.new("RGB", (2 * side, 2 * side), "white")
    for place, row in enumerate(collage.rows):
        sample = source[row]
        part = model.transform.fit(decode_image(sample.image, name=sample.key))
        page.paste(part.resize((side, side), Image.Resampling.BICUBIC), (place % 2 * side, place // 2 * side))
    return page


def point(heat: np.ndarray, target: int) -> tuple[bool, float]:
    """Whether the hottest place of a map (h, w) lies in the target's quadrant, and the quadrant's share of heat.

    A tie with another quadrant, and a map without heat or with what isn't a number, count against. A patch on
    the border of an odd grid belongs to the quadrants on both sides.
    """
    doubled = heat.astype(np.float64).repeat(2, axis=0).repeat(2, axis=1)  # even sides
    quadrants = [half for rows in np.split(doubled, 2) for half in np.split(rows, 2, axis=1)]
    peaks, total = [part.max() for part in quadrants], doubled.sum()
    hit = all(peaks[target] > peak for place, peak in enumerate(peaks) if place != target)
    return hit, float(quadrants[target].sum() / total) if total > 0 else 0.0


def random_weights(model: VisionLanguageModel, seed: int) -> VisionLanguageModel:
    """The same architecture, untrained. Raises ConfigError for a foreign model, whose start isn't known."""
    config = getattr(model.network, "config", None)
    if config is None:
        raise ConfigError(
            f"{model.name}: a foreign model has no configuration of ours to start again from; drop control"
        )
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    network = type(model.network)(config).to(model.device, model.dtype).eval().requires_grad_(False)
    torch.set_rng_state(state)
    return VisionLanguageModel(network, model.tokenizer, model.transform, name=model.name, family=model.family)


def _play(
    model: VisionLanguageModel, source: Any, collages: list[Collage], method: str, layer: int, seed: int
) -> Pointed:
    hits, shares = [], []
    for collage in collages:
        picture = collage_picture(model, source, collage)
        found = explain(model, picture, collage.text, method=method, layer=layer, words=False)
        hit, part = point(found.whole, collage.target)
        hits.append(hit)
        shares.append(part)
    low, high = bootstrap(np.array(shares), seed=seed)
    return Pointed(share(hits, CHANCE), Figure(float(np.mean(shares)), low, high, CHANCE, len(shares)))
