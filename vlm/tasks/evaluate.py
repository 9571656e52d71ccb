"""Zero-shot classification of a whole source: top-k with intervals, per class, and what was taken for what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vlm.data.sources import Label
from vlm.errors import DataError
from vlm.tasks.features import SourceFeatures, source_features
from vlm.tasks.metrics import Figure, bootstrap, grouped_share
from vlm.tasks.zero_shot import ZeroShotClassifier
from vlm.weights.loaded import VisionLanguageModel


@dataclass(frozen=True)
class ZeroShotReport:
    """Figures over all pictures whose label is known."""

    model: str
    data: str
    templates: int
    labels: list[str]
    top: dict[int, Figure]
    """By k; intervals are bootstrapped over classes, since pictures of one class hang together."""
    truth: np.ndarray
    """(N,) label number of each picture."""
    predicted: np.ndarray
    """(N,) most probable label."""
    hits: dict[int, np.ndarray]
    """By k, whether each picture's label was among the k first."""

    def as_dict(self) -> dict[str, Any]:
        """JSON values, without the single pictures."""
        top = {f"top-{k}": figure.as_dict() for k, figure in self.top.items()}
        return {
            "model": self.model, "data": self.data, "labels": len(self.labels), "templates": self.templates,
            "pictures": len(self.truth), **top,
        }  # fmt: skip

    def per_class(self) -> list[dict[str, Any]]:
        """A row for each label that has pictures: its count, top-k shares, and what it is mostly taken for."""
        rows = []
        for number in np.unique(self.truth):
            mine = self.truth == number
            found, counts = np.unique(self.predicted[mine], return_counts=True)
            row: dict[str, Any] = {"label": self.labels[number], "pictures": int(mine.sum())}
            row |= {f"top-{k}": round(float(hits[mine].mean()), 4) for k, hits in self.hits.items()}
            rows.append(row | {"most often": self.labels[found[counts.argmax()]]})
        return rows


def evaluate_zero_shot(
    model: VisionLanguageModel,
    source: Any,
    labels: Sequence[Label] | Sequence[str],
    *,
    templates: str | Sequence[str] | None = None,
    depths: Sequence[int] = (1, 5),
    keep: Sequence[str] | None = None,
    features: SourceFeatures | None = None,
    seed: int = 0,
) -> ZeroShotReport:
    """Classify every picture of a source among `labels`.

    labels: words, or concepts with their names; a picture's own label is the one of its concept, or the word
    that is its name or main caption. Concepts that share a name share a label. keep: concepts to count, with
    all labels still competing. features: from `source_features`, to use them again. Raises DataError when no
    picture's label is among the labels.
    """
    names, of_concept = _label_numbers(labels)
    found = features if features is not None else source_features(model, source, texts=False)
    classifier = ZeroShotClassifier(model, names, templates)
    truth = _truth(source, found.keys, of_concept, set(keep) if keep is not None else None)
    counted = np.flatnonzero(truth >= 0)
    if not len(counted):
        raise DataError(
            f"{source.name}: no picture's concept, name or caption is among the {len(names)} labels "
            f"(first label: {names[0]!r}, first picture: {source.meta(0)['captions'][0]!r})"
        )
    image = found.image[torch.from_numpy(counted)]
    logits = image @ classifier.features.float().cpu().T
    order = logits.topk(min(max(depths), len(names)), dim=1).indices.numpy()
    truth = truth[counted]
    hits = {k: (order[:, :k] == truth[:, None]).any(axis=1) for k in depths}
    top = {k: grouped_share(hit, truth, min(1.0, k / len(names)), seed=seed) for k, hit in hits.items()}
    return ZeroShotReport(model.name, source.name, len(classifier.templates), names, top, truth, order[:, 0], hits)


def compare_templates(
    model: VisionLanguageModel,
    source: Any,
    labels: Sequence[Label] | Sequence[str],
    sets: Sequence[str],
    *,
    keep: Sequence[str] | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Top-1 and top-5 of several template sets, and the paired difference from the first with its interval."""
    features = source_features(model, source, texts=False)
    rows: list[dict[str, Any]] = []
    first: ZeroShotReport | None = None
    for name in sets:
        report = evaluate_zero_shot(model, source, labels, templates=name, keep=keep, features=features, seed=seed)
        first = first or report
        row: dict[str, Any] = {"templates": name, "count": report.templates}
        for k, figure in report.top.items():
            gain = report.hits[k].astype(float) - first.hits[k].astype(float)
            low, high = bootstrap(gain, groups=report.truth, seed=seed)
            row[f"top-{k}"] = figure.as_dict()
            row[f"top-{k} against {first_name(sets)}"] = {
                "value": round(float(gain.mean()), 6), "low": round(low, 6), "high": round(high, 6),
            }  # fmt: skip
        rows.append(row)
    return rows


def first_name(sets: Sequence[str]) -> str:
    """The set that others are compared with."""
    return sets[0]


def _label_numbers(labels: Sequence[Label] | Sequence[str]) -> tuple[list[str], dict[str, int]]:
    """Different label words, and the number of each concept or word."""
    names: dict[str, int] = {}
    numbers: dict[str, int] = {}
    for label in labels:
        word = label.name if isinstance(label, Label) else str(label)
        number = names.setdefault(word, len(names))
        numbers[label.concept if isinstance(label, Label) else word] = number
        numbers.setdefault(word, number)
    return list(names), numbers


def _truth(source: Any, keys: Sequence[str], numbers: dict[str, int], keep: set[str] | None) -> np.ndarray:
    """(N,) label number of each row, -1 where it has none or isn't counted."""
    place = {key: number for number, key in enumerate(source.keys)}
    truth = np.full(len(keys), -1, dtype=np.int64)
    for row, key in enumerate(keys):
        meta = source.meta(place[key])
        concept = str(meta.get("concept", ""))
        if keep is not None and concept not in keep:
            continue
        for word in (concept, str(meta.get("name", "")), str(meta["captions"][0])):
            if word in numbers:
                truth[row] = numbers[word]
                break
    return truth
