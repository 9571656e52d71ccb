"""Scores of pairs by a cross-encoder (ITM), with everything that pairs share computed once.

A picture's states and a text's unimodal states are computed once a row; a picture's keys and values once for all
the texts that meet it. A model without such parts (ViLT) runs whole on each pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vlm.data.batch import Batch
from vlm.data.loader import evaluation_batches
from vlm.errors import ConfigError, DataError
from vlm.tasks.features import SourceFeatures
from vlm.weights.loaded import VisionLanguageModel

Score = Literal["itm", "itm+itc"]
SCORES = ("itm", "itm+itc")
"""``itm``: the matched logit (index 1 of `match`), as ALBEF's evaluation takes it. ``itm+itc``: that logit plus
the cosine of the features, as BLIP's does."""
TEXTS_AT_ONCE = 64
"""Texts of about one length that meet a picture together: fewer means less padding, more means fewer passes."""
MATCHED = 1

Progress = Callable[[int, int], None]
"""Told how many pairs were run, and how many there are."""
Scorer = Callable[[int, np.ndarray], Tensor]
"""(image row, text rows (T,)) to their matched logits (T,) on the CPU."""


@dataclass(frozen=True)
class Texts:
    """Rows of different lengths, end to end."""

    values: Tensor
    """(all tokens, ...): states or ids of the real tokens."""
    starts: np.ndarray
    """(N + 1,) where each row starts, and the end of the last."""

    @staticmethod
    def of(rows: Tensor, mask: Tensor) -> Texts:
        """From padded rows (N, L, ...) and their mask (N, L)."""
        mask = mask.bool()
        lengths = mask.sum(dim=1).cpu().numpy()
        return Texts(rows[mask].cpu(), np.concatenate([[0], np.cumsum(lengths)]))

    @staticmethod
    def joined(parts: list[Texts]) -> Texts:
        """Several one after the other."""
        lengths = np.concatenate([np.diff(part.starts) for part in parts])
        return Texts(torch.cat([part.values for part in parts]), np.concatenate([[0], np.cumsum(lengths)]))

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """(T,) tokens of the chosen rows."""
        return self.starts[rows + 1] - self.starts[rows]

    def padded(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """The chosen rows (T, L, ...), zeros behind, and their mask (T, L)."""
        lengths = torch.from_numpy(self.lengths(rows))
        place = torch.arange(int(lengths.max()))  # (L,)
        mask = place < lengths[:, None]  # (T, L)
        index = torch.from_numpy(self.starts[rows])[:, None] + place
        found = self.values[torch.where(mask, index, 0)]
        found[~mask] = 0
        return found, mask


@dataclass(frozen=True)
class Rows:
    """What pairs are made of, a picture and a text in each row; on the CPU."""

    pictures: list[Tensor]
    """Image states (P, W) each, or pixels (3, H, W) for a model that shares nothing."""
    texts: Texts
    """Unimodal states (W each), or token ids."""

    @staticmethod
    def joined(parts: list[Rows]) -> Rows:
        """Rows of several sources one after the other."""
        return Rows(
            [picture for part in parts for picture in part.pictures], Texts.joined([part.texts for part in parts])
        )


def has_states(model: VisionLanguageModel) -> bool:
    """Whether pairs of this model can be scored from states that are computed once."""
    return model.can("match_states")


@torch.inference_mode()
def source_rows(
    model: VisionLanguageModel, source: Any, *, batch_size: int = 64, workers: int = 0
) -> tuple[SourceFeatures, Rows]:
    """All rows of a source, each picture and each main caption encoded once.

    Returns the features (empty for a model without `encode_image`) and what pairs are scored from; memory is
    that of the image states, 1.8 MB a picture for 577 states of 768. Raises MissingVerbError when the model
    can't match, DataError when no picture can be read.
    """
    if not has_states(model):
        model.match  # noqa: B018  # refuses a model without it, by name
    images: list[Tensor] = []
    texts: list[Tensor] = []
    pictures: list[Tensor] = []
    words: list[Texts] = []
    ids: list[np.ndarray] = []
    keys: list[str] = []
    for batch in evaluation_batches(
        source, tokenizer=model.tokenizer, transform=model.transform, batch_size=batch_size, workers=workers
    ):
        image, text, picture, word = _encode(model, batch.to(model.device))
        images.append(image.float().cpu())
        texts.append(text.float().cpu())
        pictures += picture
        words.append(word)
        ids.append(batch.ids.numpy())
        keys += batch.keys
    if not keys:
        raise DataError(f"{source.name}: no picture could be read")
    features = SourceFeatures(torch.cat(images), torch.cat(texts), np.concatenate(ids), tuple(keys))
    return features, Rows(pictures, Texts.joined(words))


def _encode(model: VisionLanguageModel, batch: Batch) -> tuple[Tensor, Tensor, list[Tensor], Texts]:
    """Features of pictures and texts, and what their pairs are scored from."""
    network: Any = model.network
    pixels, mask = batch.pixels.to(model.dtype), batch.tokens.attention_mask
    if has_states(model):
        image, text = network.image_states(pixels), network.text_states(batch.tokens)
        return image.features, text.features, list(image.states.cpu()), Texts.of(text.states, text.mask)
    whole, pictures = Texts.of(batch.tokens.input_ids, mask), _without_padding(batch)
    if not model.can("encode_image"):
        nothing = pixels.new_zeros(len(pixels), 0)
        return nothing, nothing, pictures, whole
    return model.encode_image(pixels), model.encode_text(batch.tokens), pictures, whole


def _without_padding(batch: Batch) -> list[Tensor]:
    """Pixels (3, h, w) of each picture, on the CPU."""
    pixels = batch.pixels.cpu()
    if batch.pixel_mask is None:
        return list(pixels)
    mask = batch.pixel_mask.cpu()
    sizes = zip(mask[:, :, 0].sum(dim=1).tolist(), mask[:, 0].sum(dim=1).tolist(), strict=True)
    return [one[:, :high, :wide] for one, (high, wide) in zip(pixels, sizes, strict=True)]


def make_scorer(model: VisionLanguageModel, rows: Rows) -> Scorer:
    """What scores one picture with several texts, texts of about one length at a time."""

    network: Any = model.network

    def cached(image: int, texts: np.ndarray) -> Tensor:
        states = rows.pictures[image][None].to(model.device)  # (1, P, W)
        seen = network.image_keys_values(states)  # once for all the texts
        parts = []
        for some in texts_at_once(texts):
            words, mask = rows.texts.padded(some)
            parts.append(network.match_states(words.to(model.device), mask.to(model.device), seen))
        return torch.cat(parts)

    def whole(image: int, texts: np.ndarray) -> Tensor:
        pixels = rows.pictures[image][None].to(model.device, model.dtype)  # (1, 3, h, w)
        parts = []
        for some in texts_at_once(texts):
            ids, mask = (part.to(model.device) for part in rows.texts.padded(some))
            tokens = {"input_ids": ids, "attention_mask": mask}
            parts.append(model.match(pixels.expand(len(some), -1, -1, -1), tokens))
        return torch.cat(parts)

    def texts_at_once(texts: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            yield texts[start : start + TEXTS_AT_ONCE]

    score = cached if has_states(model) else whole

    @torch.inference_mode()
    def scorer(image: int, texts: np.ndarray) -> Tensor:
        order = np.argsort(rows.texts.lengths(texts), kind="stable")  # like lengths together: little padding
        found = torch.empty(len(texts))
        found[torch.from_numpy(order)] = score(image, texts[order])[:, MATCHED].float().cpu()
        return found

    return scorer


def pair_scores(scorer: Scorer, pairs: np.ndarray, *, progress: Progress | None = None) -> np.ndarray:
    """Matched logits (P,) of pairs (P, 2) of an image row and a text row, each different pair scored once.

    Pictures come one after the other, each with all its texts, so that its keys and values are made once. progress:
    called before the first of them, and after each.
    """
    different, place = np.unique(pairs, axis=0, return_inverse=True)  # sorted by image
    scores = np.empty(len(different), dtype=np.float64)
    images, starts = np.unique(different[:, 0], return_index=True)
    if progress is not None:
        progress(0, len(different))
    for image, start, end in zip(images, starts, [*starts[1:], len(different)], strict=True):
        scores[start:end] = scorer(int(image), different[start:end, 1]).numpy()
        if progress is not None:
            progress(int(end), len(different))
    return scores[place.reshape(-1)]


def nearest_candidates(scores: np.ndarray, positives: np.ndarray, k: int) -> np.ndarray:
    """(queries, k) candidates with the highest bi-encoder scores, best first; ties go to the negatives.

    scores, positives: (queries, candidates).
    """
    return np.lexsort((positives, -scores), axis=1)[:, :k]


def reranked(scores: np.ndarray, candidates: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Scores in whose order the candidates stand first, by `found`, and all others behind, as they stood.

    scores: (queries, n) of the bi-encoder. candidates: (queries, k). found: (queries, k), their new scores.
    Returns (queries, n) float64.
    """
    final = scores.astype(np.float64)
    rest = final.copy()
    np.put_along_axis(rest, candidates, -np.inf, axis=1)
    highest = rest.max(axis=1, keepdims=True, initial=0.0, where=np.isfinite(rest))
    shifted = found - np.min(found, axis=1, keepdims=True, initial=np.inf, where=np.isfinite(found))
    np.put_along_axis(final, candidates, highest + 1 + shifted, axis=1)
    return final


def check_rerank(k: int, score: str) -> Score:
    """The score, if it and the depth exist. Raises ConfigError otherwise."""
    if k < 0:
        raise ConfigError(f"rerank must be 0 (off) or the number of candidates to score again, got {k}")
    if score not in SCORES:
        raise ConfigError(f"score {score!r}: expected one of {', '.join(SCORES)}")
    if score != "itm" and not k:
        raise ConfigError(f"score {score!r} orders what is re-ranked, and rerank is 0; give the number of candidates")
    return "itm" if score == "itm" else "itm+itc"
