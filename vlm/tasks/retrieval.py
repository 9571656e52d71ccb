"""Retrieval both ways: pictures by text and texts by picture, in galleries of a fixed size.

First by features (ITC); then, where asked for, the nearest candidates again by the cross-encoder (ITM), as in ALBEF
§5. A model that only judges pairs (ViLT) ranks the whole gallery by them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vlm.errors import ConfigError, DataError
from vlm.objectives.itc import cosines
from vlm.tasks.features import SourceFeatures, source_features
from vlm.tasks.metrics import Figure, bootstrap, chance_at, ranks_of_best
from vlm.tasks.rerank import (
    Progress,
    Rows,
    Score,
    Scorer,
    check_rerank,
    make_scorer,
    nearest_candidates,
    pair_scores,
    reranked,
    source_rows,
)
from vlm.weights.loaded import VisionLanguageModel

DEPTHS = (1, 5, 10)
WAYS = ("text_to_image", "image_to_text")
Recall = dict[str, dict[int, Figure]]
"""By way, then by depth."""


@dataclass(frozen=True)
class Reranked:
    """Recall after the nearest candidates were scored again, pair by pair."""

    k: int
    """Candidates of a query that were scored."""
    score: str
    """``itm`` or ``itm+itc``, see `vlm.tasks.rerank.SCORES`."""
    pairs: int
    """Pairs that were run, each once for both ways."""
    recall: Recall

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"k": self.k, "score": self.score, "pairs": self.pairs, "recall": _json(self.recall)}


@dataclass(frozen=True)
class RetrievalReport:
    """Recall at 1, 5 and 10 each way; a query's positives share its concept or its caption."""

    model: str
    data: str
    gallery: int
    galleries: int
    queries: int
    recall: Recall
    """``text_to_image`` and ``image_to_text``, each by depth."""
    score: str = "itc"
    """What `recall` ranks by: cosines (``itc``), or every pair's matched logit (``itm``)."""
    pairs: int = 0
    """Pairs run for `recall`."""
    reranked: Reranked | None = None

    def figures(self) -> dict[str, float]:
        """Plain numbers for a training log, with their mean over directions and depths."""
        found = {f"{way}_r{k}": figure.value for way, at in self.recall.items() for k, figure in at.items()}
        return found | {"recall": sum(found.values()) / len(found)}

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        values = {
            "model": self.model, "data": self.data, "gallery": self.gallery, "galleries": self.galleries,
            "queries": self.queries, "score": self.score, "recall": _json(self.recall),
        }  # fmt: skip
        values |= {"pairs": self.pairs} if self.pairs else {}
        return values | ({"rerank": self.reranked.as_dict()} if self.reranked else {})


@dataclass(frozen=True)
class _Gallery:
    """Rows that are searched together; the first `queries` of them are asked for."""

    rows: np.ndarray
    queries: int
    positives: np.ndarray
    """(queries, rows)."""


def evaluate_retrieval(
    model: VisionLanguageModel,
    source: Any,
    *,
    distractors: Any = None,
    gallery: int = 500,
    rounds: int = 10,
    galleries: int = 0,
    rerank: int = 0,
    score: Score = "itm",
    seed: int = 0,
    progress: Progress | None = None,
) -> RetrievalReport:
    """Recall in galleries of `gallery` pictures and as many texts.

    Each round draws a gallery: as many rows of `source` as fit, the queries, and, when those are fewer, rows of
    `distractors` that are only candidates. Figures are means over rounds; intervals are bootstrapped over
    queries. A source larger than the gallery is cut into disjoint galleries instead.

    galleries: how many of them at most; 0 for all. rerank: how many of the nearest candidates of a query are
    scored again, each with the query as a pair, and ordered by `score`; those behind stay in their order. 0
    for none. A model without features of its own (ViLT) runs every pair, the gallery's size squared. progress: told of
    the pairs, see `pair_scores`.

    Raises ConfigError when a size is too small or the model can't choose candidates, MissingVerbError when it
    can't match, DataError when there are fewer than two rows.
    """
    if gallery < 2 or rounds < 1 or galleries < 0:
        raise ConfigError(
            f"gallery must be at least 2, rounds at least 1 and galleries at least 0, "
            f"got {gallery}, {rounds} and {galleries}"
        )
    check_rerank(rerank, score)
    whole = not model.can("encode_image") and model.can("match")
    if whole and (rerank or score != "itm"):
        raise ConfigError(
            f"{model.name} is {model.kind} without features to choose candidates by: it ranks the whole "
            "gallery by its pairs' matched logits; drop rerank and score, and bound the cost with gallery"
        )
    features, pairs, own = _read(model, source, distractors, paired=bool(rerank) or whole)
    if len(features.keys) < 2:
        raise DataError(f"{source.name}: {len(features.keys)} readable picture, retrieval needs at least 2")
    gallery = min(gallery, len(features.keys))
    drawn = _galleries(own, len(features.keys) - own, gallery, rounds, seed)[: galleries or None]
    built = [_built(features, rows, other + own) for rows, other in drawn]
    scores = {way: [_cosines(features, one, way) for one in built] for way in WAYS}
    asked = len({row for one in built for row in one.rows[: one.queries].tolist()})
    sizes = (model.name, source.name, gallery, len(built), asked)
    if pairs is None:
        return RetrievalReport(*sizes, _recall(scores, built, seed))
    scorer = make_scorer(model, pairs)
    again, count = _again(scores, built, scorer, rerank or gallery, score, progress)
    if whole:
        return RetrievalReport(*sizes, _recall(again, built, seed), score="itm", pairs=count)
    second = Reranked(min(rerank, gallery), score, count, _recall(again, built, seed))
    return RetrievalReport(*sizes, _recall(scores, built, seed), reranked=second)


def _read(
    model: VisionLanguageModel, source: Any, distractors: Any, *, paired: bool
) -> tuple[SourceFeatures, Rows | None, int]:
    """Features and, if `paired`, what pairs are scored from; of the source, then of the distractors.

    The number is how many rows are the source's.
    """
    sources = [source] if distractors is None else [source, distractors]
    rows: list[Rows] = []
    parts: list[SourceFeatures] = []
    for one in sources:
        if paired:
            features, pairs = source_rows(model, one)
            rows.append(pairs)
        else:
            features = source_features(model, one)
        parts.append(features)
    joined = SourceFeatures(
        torch.cat([part.image for part in parts]),
        torch.cat([part.text for part in parts]),
        np.concatenate([part.ids for part in parts]),
        tuple(key for part in parts for key in part.keys),
    )
    return joined, Rows.joined(rows) if paired else None, len(parts[0].keys)


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


def _built(features: SourceFeatures, own: np.ndarray, other: np.ndarray) -> _Gallery:
    rows = np.concatenate([own, other])
    ids = features.ids[rows]
    return _Gallery(rows, len(own), (ids[: len(own), None, :] == ids[None]).any(axis=2))


def _cosines(features: SourceFeatures, gallery: _Gallery, way: str) -> np.ndarray:
    """(queries, rows) cosines; all 0 for a model without features."""
    images, texts = features.image[gallery.rows], features.text[gallery.rows]
    ask, among = (texts, images) if way == "text_to_image" else (images, texts)
    return cosines(ask[: gallery.queries], among).numpy()


def _again(
    scores: dict[str, list[np.ndarray]],
    galleries: list[_Gallery],
    scorer: Scorer,
    k: int,
    score: str,
    progress: Progress | None,
) -> tuple[dict[str, list[np.ndarray]], int]:
    """The scores after re-ranking, and how many pairs were run: those of both ways and all galleries together."""
    chosen = {
        way: [nearest_candidates(here, one.positives, k) for here, one in zip(scores[way], galleries, strict=True)]
        for way in WAYS
    }
    pairs = [_pairs(one, chosen[way][number], way) for way in WAYS for number, one in enumerate(galleries)]
    found = pair_scores(scorer, np.concatenate(pairs), progress=progress)
    ends = np.cumsum([len(part) for part in pairs])
    parts = iter(np.split(found, ends[:-1]))
    again: dict[str, list[np.ndarray]] = {}
    for way in WAYS:
        again[way] = []
        for here, candidates in zip(scores[way], chosen[way], strict=True):
            new = next(parts).reshape(candidates.shape)
            if score == "itm+itc":
                new = new + np.take_along_axis(here, candidates, axis=1)
            again[way].append(reranked(here, candidates, new))
    return again, len(np.unique(np.concatenate(pairs), axis=0))


def _pairs(gallery: _Gallery, candidates: np.ndarray, way: str) -> np.ndarray:
    """(queries * k, 2) image row and text row of each query with each of its candidates."""
    asked = np.repeat(gallery.rows[: gallery.queries], candidates.shape[1])
    among = gallery.rows[candidates.reshape(-1)]
    return np.stack([among, asked] if way == "text_to_image" else [asked, among], axis=1)


def _recall(scores: dict[str, list[np.ndarray]], galleries: list[_Gallery], seed: int) -> Recall:
    groups = np.concatenate([one.rows[: one.queries] for one in galleries])
    joined = np.concatenate([one.positives for one in galleries])
    recall: Recall = {}
    for way, parts in scores.items():
        ranks = np.concatenate([ranks_of_best(part, one.positives) for part, one in zip(parts, galleries, strict=True)])
        recall[way] = {}
        for k in DEPTHS:
            hits = ranks < k
            low, high = bootstrap(hits, groups=groups, draws=500, seed=seed)
            recall[way][k] = Figure(float(hits.mean()), low, high, chance_at(k, joined), len(hits))
    return recall


def _json(recall: Recall) -> dict[str, Any]:
    return {way: {f"R@{k}": figure.as_dict() for k, figure in at.items()} for way, at in recall.items()}
