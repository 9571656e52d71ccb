"""Matching: does a model tell a picture's own text from that of another picture?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vlm.data.loader import evaluation_batches
from vlm.errors import DataError
from vlm.tasks.metrics import Figure, bootstrap
from vlm.weights.loaded import VisionLanguageModel


@dataclass(frozen=True)
class MatchingReport:
    """Figures over pictures, each with its own text and with a foreign one."""

    model: str
    data: str
    accuracy: Figure
    """Share of the pairs, half of them matched, that ITM calls right."""
    order: Figure
    """Share of the pictures whose own text scores higher than the foreign one; ties count half."""

    def figures(self) -> dict[str, float]:
        """Plain numbers for a training log."""
        return {"match_accuracy": self.accuracy.value, "match_order": self.order.value}

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        figures = {"accuracy": self.accuracy.as_dict(), "order": self.order.as_dict()}
        return {"model": self.model, "data": self.data, **figures}


@torch.inference_mode()
def evaluate_matching(
    model: VisionLanguageModel, source: Any, *, batch_size: int = 64, seed: int = 0
) -> MatchingReport:
    """Match every picture with its own text and with one of the same batch that shares neither concept nor caption.

    Raises DataError when no picture has a foreign text, MissingVerbError for a model without `match`.
    """
    batches = evaluation_batches(source, tokenizer=model.tokenizer, transform=model.transform, batch_size=batch_size)
    rng = np.random.default_rng(seed)
    own: list[np.ndarray] = []
    foreign: list[np.ndarray] = []
    for batch in batches:
        other = ~(batch.ids[:, None, :] == batch.ids[None]).any(dim=-1)  # (b, b)
        rows = other.any(dim=1).nonzero().squeeze(1)
        if not len(rows):
            continue
        chosen = [int(rng.choice(other[row].nonzero().squeeze(1).numpy())) for row in rows]
        batch = batch.to(model.device)
        pixels = batch.pixels[rows].to(model.dtype)
        masks = {} if batch.pixel_mask is None else {"pixel_mask": batch.pixel_mask[rows]}
        for scores, picked in ((own, rows), (foreign, torch.tensor(chosen))):
            logits = model.match(pixels, batch.tokens.select(picked), **masks).float()  # (b, 2)
            scores.append((logits[:, 1] - logits[:, 0]).cpu().numpy())
    if not own:
        raise DataError(f"{source.name}: no picture has a foreign text to be told from; give more samples")
    matched, not_matched = np.concatenate(own), np.concatenate(foreign)
    right = ((matched > 0).astype(float) + (not_matched <= 0)) / 2
    before = (matched > not_matched) + 0.5 * (matched == not_matched)
    figures = [Figure(float(v.mean()), *bootstrap(v, seed=seed), 0.5, len(v)) for v in (right, before)]
    return MatchingReport(model.name, source.name, *figures)
