"""Zero-shot classification of a whole source: top-k with intervals, per class, and what was taken for what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm.data.sources import Label
from vlm.errors import ConfigError, DataError, counted
from vlm.objectives.itc import cosines
from vlm.tasks.features import SourceFeatures, source_features
from vlm.tasks.metrics import Figure, bootstrap, grouped_share
from vlm.tasks.zero_shot import ZeroShotClassifier, check_labels
from vlm.weights.loaded import VisionLanguageModel

Labels = Sequence[Label] | Sequence[str]
NO_LABEL, NOT_KEPT = -1, -2


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
    left_out: dict[str, int]
    """Pictures that aren't counted: ``unreadable``, ``no label`` (theirs isn't among the labels), ``not kept``."""

    def as_dict(self) -> dict[str, Any]:
        """JSON values, without the single pictures."""
        top = {f"top-{k}": figure.as_dict() for k, figure in self.top.items()}
        return {
            "model": self.model, "data": self.data, "labels": len(self.labels), "templates": self.templates,
            "pictures": len(self.truth), "left_out": self.left_out, **top,
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

    def confusion(self) -> np.ndarray:
        """(labels, labels) counts: row the true label, column the most probable one."""
        size = len(self.labels)
        return np.bincount(self.truth * size + self.predicted, minlength=size * size).reshape(size, size)


def evaluate_zero_shot(
    model: VisionLanguageModel,
    source: Any,
    labels: Labels,
    *,
    templates: str | Sequence[str] | None = None,
    depths: Sequence[int] = (1, 5),
    keep: Sequence[str] | None = None,
    features: SourceFeatures | None = None,
    seed: int = 0,
) -> ZeroShotReport:
    """Classify every picture of a source among `labels`.

    labels: words, or concepts with their names; a picture's own label is the one of its concept, or the word
    that is its name or main caption. Concepts that share a name share a label. depths: the k of each top-k.
    keep: concepts to count, with all labels still competing. features: from `source_features`, to use them
    again. Raises ConfigError for labels, templates or depths that can't be used, DataError when no picture's
    label is among the labels.
    """
    if not depths or min(depths) < 1:
        raise ConfigError(f"top-k: expected numbers of at least 1, such as 1 and 5, got {list(depths)}")
    names, of_concept = label_numbers(labels)
    classifier = ZeroShotClassifier(model, names, templates)
    found = features if features is not None else source_features(model, source, texts=False)
    truth = _truth(source, found.keys, of_concept, set(keep) if keep is not None else None)
    left_out = {
        "unreadable": len(source) - len(found.keys),
        "no label": int((truth == NO_LABEL).sum()),
        "not kept": int((truth == NOT_KEPT).sum()),
    }
    rows = np.flatnonzero(truth >= 0)
    if not len(rows):
        raise DataError(
            f"{source.name}: no picture's concept, name or caption is among the {counted(len(names), 'label')} "
            f"(first label: {names[0]!r}, first picture: {source.meta(0)['captions'][0]!r})"
        )
    order = _best(found.image[torch.from_numpy(rows)], classifier.features.cpu(), max(depths))
    truth = truth[rows]
    hits = {k: (order[:, :k] == truth[:, None]).any(axis=1) for k in depths}
    top = {k: grouped_share(hit, truth, min(1.0, k / len(names)), seed=seed) for k, hit in hits.items()}
    return ZeroShotReport(
        model.name, source.name, len(classifier.templates), names, top, truth, order[:, 0], hits, left_out
    )


def compare_templates(
    model: VisionLanguageModel,
    source: Any,
    labels: Labels,
    sets: Sequence[str],
    *,
    depths: Sequence[int] = (1, 5),
    keep: Sequence[str] | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Top-k of several template sets, and the paired difference from the first with its interval.

    sets: at least one name or sentence (see `resolve_templates`). Each row holds ``templates`` (the name),
    ``count``, ``top-K`` and ``top-K against FIRST``; the pictures are encoded once.
    """
    if not sets:
        raise ConfigError("template sets: none were given; name some, such as none,drawing,drawings")
    features = source_features(model, source, texts=False)
    rows: list[dict[str, Any]] = []
    first: ZeroShotReport | None = None
    for name in sets:
        report = evaluate_zero_shot(
            model, source, labels, templates=name, depths=depths, keep=keep, features=features, seed=seed
        )
        first = first or report
        row: dict[str, Any] = {"templates": name, "count": report.templates}
        for k, figure in report.top.items():
            gain = report.hits[k].astype(float) - first.hits[k].astype(float)
            low, high = bootstrap(gain, groups=report.truth, seed=seed)
            row[f"top-{k}"] = figure.as_dict()
            row[f"top-{k} against {sets[0]}"] = {
                "value": round(float(gain.mean()), 6), "low": round(low, 6), "high": round(high, 6),
            }  # fmt: skip
        rows.append(row)
    return rows


def label_numbers(labels: Labels) -> tuple[list[str], dict[str, int]]:
    """Different label words, and the number of each concept and word. Raises ConfigError as `check_labels`."""
    if all(isinstance(label, str) for label in labels):
        words = check_labels(labels)  # type: ignore[arg-type]
        return words, {_words(word): number for number, word in enumerate(words)}
    names: dict[str, int] = {}
    numbers: dict[str, int] = {}
    for label in labels:
        if not isinstance(label, Label):
            raise ConfigError(f"labels: expected words or concepts, not both; got {label!r}")
        numbers[label.concept] = names.setdefault(_words(label.name), len(names))
    return check_labels(list(names)), names | numbers


def _best(image: Tensor, text: Tensor, depth: int) -> np.ndarray:
    """(N, depth) numbers of the nearest labels, best first."""
    depth = min(depth, len(text))
    return np.concatenate([cosines(rows, text).topk(depth, dim=1).indices.numpy() for rows in image.split(1024)])


def _truth(source: Any, keys: Sequence[str], numbers: dict[str, int], keep: set[str] | None) -> np.ndarray:
    """(N,) label number of each row; NO_LABEL where it has none, NOT_KEPT where it isn't asked for."""
    truth = np.full(len(keys), NO_LABEL, dtype=np.int64)
    number = 0
    for row, key in enumerate(keys):
        # Rows are the source's samples in order, some missing; a joined source may hold one key twice.
        while number < len(source) and source.keys[number] != key:
            number += 1
        if number == len(source):
            raise DataError(f"{source.name}: the features given are of another source, {key!r} isn't where expected")
        meta = source.meta(number)
        number += 1
        concept = str(meta.get("concept", ""))
        if keep is not None and concept not in keep:
            truth[row] = NOT_KEPT
            continue
        for word in (concept, str(meta.get("name", "")), str(meta["captions"][0])):
            if _words(word) in numbers:
                truth[row] = numbers[_words(word)]
                break
    return truth


def _words(text: str) -> str:
    """The text with single spaces, as labels are read."""
    return " ".join(text.split())
