"""Retrieval both ways: pictures by text and texts by picture, in galleries of a fixed size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vlm.errors import ConfigError, DataError
from vlm.tasks.features import SourceFeatures, source_features
from vlm.tasks.metrics import Figure, bootstrap, chance_at, ranks_of_best
from vlm.weights.loaded import VisionLanguageModel

DEPTHS = (1, 5, 10)


@dataclass(frozen=True)
class RetrievalReport:
    """Recall at 1, 5 and 10 each way; a query's positives share its concept or its caption."""

    model: str
    data: str
    gallery: int
    galleries: int
    queries: int
    recall: dict[str, dict[int, Figure]]
    """``text_to_image`` and ``image_to_text``, each by depth."""

    def figures(self) -> dict[str, float]:
        """Plain numbers for a training log, with their mean over directions and depths."""
        found = {f"{way}_r{k}": figure.value for way, at in self.recall.items() for k, figure in at.items()}
        return found | {"recall": sum(found.values()) / len(found)}

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        recall = {way: {f"R@{k}": f.as_dict() for k, f in at.items()} for way, at in self.recall.items()}
        return {
            "model": self.model, "data": self.data, "gallery": self.gallery, "galleries": self.galleries,
            "queries": self.queries, "recall": recall,
        }  # fmt: skip


def evaluate_retrieval(
    model: VisionLanguageModel,
    source: Any,
    *,
    distractors: Any = None,
    gallery: int = 500,
    rounds: int = 10,
    seed: int = 0,
) -> RetrievalReport:
    """Recall in galleries of `gallery` pictures and as many texts.

    Each round draws a gallery: as many rows of `source` as fit, the queries, and, when those are fewer, rows of
    `distractors` that are only candidates. Figures are means over rounds; intervals are bootstrapped over
    queries. A source larger than the gallery is cut into disjoint galleries instead. Raises ConfigError when
    a gallery or the rounds are too small, DataError when there are fewer than two rows.
    """
    if gallery < 2 or rounds < 1:
        raise ConfigError(f"gallery must be at least 2 and rounds at least 1, got {gallery} and {rounds}")
    rows = source_features(model, source)
    extra = source_features(model, distractors) if distractors is not None else None
    available = len(rows.keys) + (len(extra.keys) if extra else 0)
    if available < 2:
        raise DataError(f"{source.name}: {available} readable picture, retrieval needs at least 2")
    gallery = min(gallery, available)
    drawn = _galleries(len(rows.keys), len(extra.keys) if extra else 0, gallery, rounds, seed)
    return _report(model.name, source.name, rows, extra, drawn, gallery, seed)


def _galleries(own: int, extra: int, size: int, rounds: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows and distractor rows of each gallery."""
    rng = np.random.default_rng(seed)
    none = np.zeros(0, dtype=np.int64)
    if own >= size:
        order = rng.permutation(own)
        return [(order[i : i + size], none) for i in range(0, own - size + 1, size)]
    missing = size - own
    count = rounds if extra > missing else 1
    return [(np.arange(own), rng.permutation(extra)[:missing]) for _ in range(count)]


def _report(
    model: str,
    data: str,
    rows: SourceFeatures,
    extra: SourceFeatures | None,
    galleries: list[tuple[np.ndarray, np.ndarray]],
    size: int,
    seed: int,
) -> RetrievalReport:
    ranks: dict[str, list[np.ndarray]] = {"text_to_image": [], "image_to_text": []}
    positives, query = [], []
    for own, other in galleries:
        images, texts, ids = rows.image[own], rows.text[own], rows.ids[own]
        if extra is not None and len(other):
            images = torch.cat([images, extra.image[other]])
            texts = torch.cat([texts, extra.text[other]])
            ids = np.concatenate([ids, extra.ids[other]])
        queries = len(own)
        same = (ids[:queries, None, :] == ids[None]).any(axis=2)  # (queries, candidates)
        to_image = (texts[:queries] @ images.T).numpy()
        to_text = (images[:queries] @ texts.T).numpy()
        ranks["text_to_image"].append(ranks_of_best(to_image, same))
        ranks["image_to_text"].append(ranks_of_best(to_text, same))
        positives.append(same)
        query.append(own)
    groups, joined = np.concatenate(query), np.concatenate(positives)
    recall: dict[str, dict[int, Figure]] = {}
    for way, found in ranks.items():
        recall[way] = {}
        for k in DEPTHS:
            hits = np.concatenate(found) < k
            low, high = bootstrap(hits, groups=groups, draws=500, seed=seed)
            recall[way][k] = Figure(float(hits.mean()), low, high, chance_at(k, joined), len(hits))
    return RetrievalReport(model, data, size, len(galleries), len(set(groups.tolist())), recall)
