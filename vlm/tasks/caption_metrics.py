"""How near captions come to references: BLEU, ROUGE-L and CIDEr-D, as the COCO evaluation computes them.

Pure functions of words, one caption and several references for each picture. See `vlm.tasks.caption_tokens` for
what a word is, and `vlm.tasks.caption_report` for reading files and for intervals.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from vlm.errors import DataError

Words = Sequence[str]
ORDERS = 4
"""N-grams of 1 to this many words count, in BLEU and in CIDEr-D."""
# What the COCO evaluation adds so that nothing is divided by 0; a caption without a match keeps a score of about 0.
_TINY, _SMALL = 1e-15, 1e-9
BETA = 1.2
"""Weight of recall in ROUGE-L."""
SIGMA = 6.0
"""Width of CIDEr-D's penalty on other lengths, in words."""


def bleu_counts(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
    """What BLEU adds up over pictures (Papineni et al., 2002, §2): (n, 2 * ORDERS + 2).

    The columns are, for each order, n-grams that a reference holds as often and n-grams in all; then words of the
    caption and of the reference whose length is nearest, the shorter one of two.
    """
    rows = []
    for caption, texts in zip(captions, references, strict=True):
        most: Counter[tuple[str, ...]] = Counter()
        for text in texts:
            most |= _ngrams(text)
        right = [0] * ORDERS
        for gram, count in _ngrams(caption).items():
            right[len(gram) - 1] += min(count, most[gram])
        total = [max(0, len(caption) - order) for order in range(ORDERS)]
        nearest = min((abs(len(text) - len(caption)), len(text)) for text in texts)[1]
        rows.append([*right, *total, len(caption), nearest])
    return np.array(rows, dtype=np.float64).reshape(len(captions), 2 * ORDERS + 2)


def bleu(counts: np.ndarray) -> np.ndarray:
    """BLEU-1 to BLEU-4, (4,), from the sum over pictures of `bleu_counts`, or from one picture's row."""
    right, total = counts[:ORDERS], counts[ORDERS : 2 * ORDERS]
    length, wanted = counts[2 * ORDERS :]
    precision = np.cumsum(np.log((right + _TINY) / (total + _SMALL))) / np.arange(1, ORDERS + 1)
    ratio = (length + _TINY) / (wanted + _SMALL)
    return np.exp(precision + min(0.0, 1 - 1 / ratio))


def rouge_l(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
    """ROUGE-L of each picture (Lin, 2004, §3), (n,): F of the longest common subsequence.

    Precision and recall are each the best over the references, recall weighs more. 0 for a caption without words.
    """
    scores = []
    for caption, texts in zip(captions, references, strict=True):
        common = [_longest_common(caption, text) for text in texts]
        precision = max(common) / max(1, len(caption))
        recall = max(found / max(1, len(text)) for found, text in zip(common, texts, strict=True))
        weighed = recall + BETA**2 * precision
        scores.append((1 + BETA**2) * precision * recall / weighed if weighed else 0.0)
    return np.array(scores)


def cider_d(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
    """CIDEr-D of each picture (arXiv 1411.5726 §5 and §6), (n,), from 0 to 10.

    N-grams weigh more the fewer pictures have them in a reference, so a score depends on the other pictures.
    Raises DataError for a single picture, whose every n-gram would weigh log(1) = 0.
    """
    if len(captions) < 2:
        raise DataError(
            f"CIDEr-D of {len(captions)} picture: it weighs words by how few of the pictures have them, so it needs "
            "at least 2; BLEU and ROUGE-L don't"
        )
    texts = [[_ngrams(text) for text in some] for some in references]
    held = Counter(gram for some in texts for gram in set().union(*some))
    weights = {gram: math.log(len(texts)) - math.log(count) for gram, count in held.items()}
    unknown = math.log(len(texts))
    scores = []
    for caption, some in zip(captions, texts, strict=True):
        own = _weigh(_ngrams(caption), weights, unknown)
        near = [_similarity(own, _weigh(text, weights, unknown)) for text in some]
        scores.append(10.0 * float(np.mean(near)))
    return np.array(scores)


_Weighed = tuple[list[dict[tuple[str, ...], float]], np.ndarray, int]
"""Weighed n-grams by order, the norm of each order (ORDERS,), and the number of pairs of words."""


def _weigh(grams: Counter[tuple[str, ...]], weights: dict[tuple[str, ...], float], unknown: float) -> _Weighed:
    vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(ORDERS)]
    for gram, count in grams.items():
        vectors[len(gram) - 1][gram] = count * weights.get(gram, unknown)
    norms = np.array([math.sqrt(sum(value**2 for value in vector.values())) for vector in vectors])
    return vectors, norms, sum(count for gram, count in grams.items() if len(gram) == 2)


def _similarity(own: _Weighed, other: _Weighed) -> float:
    """Cosine over orders, own counts cut to the other's, less where the lengths differ (§6)."""
    (vectors, norms, length), (others, other_norms, other_length) = own, other
    products = np.array(
        [
            sum(min(value, theirs[gram]) * theirs[gram] for gram, value in vector.items() if gram in theirs)
            for vector, theirs in zip(vectors, others, strict=True)
        ]
    )
    scale = norms * other_norms
    cosines = np.divide(products, scale, out=np.zeros(ORDERS), where=scale > 0)
    return float(cosines.mean() * math.exp(-((length - other_length) ** 2) / (2 * SIGMA**2)))


def _ngrams(words: Words) -> Counter[tuple[str, ...]]:
    return Counter(
        tuple(words[start : start + order]) for order in range(1, ORDERS + 1) for start in range(len(words) - order + 1)
    )


def _longest_common(first: Words, second: Words) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        before = row
        row = [0]
        for place, other in enumerate(second):
            row.append(before[place] + 1 if word == other else max(row[place], before[place + 1]))
    return row[-1]
