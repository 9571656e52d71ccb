"""Features of a whole source, with what is known about each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm.data.loader import evaluation_batches
from vlm.errors import DataError
from vlm.weights.loaded import VisionLanguageModel


@dataclass(frozen=True)
class SourceFeatures:
    """Rows in the order of the source; unreadable pictures are missing."""

    image: Tensor
    """(N, D) on the CPU, unit norm; (N, Q, D) of BLIP-2's queries."""
    text: Tensor
    """(N, D) of the main captions; empty when texts were not asked for."""
    ids: np.ndarray
    """(N, 2): hashes of concept and caption."""
    keys: tuple[str, ...]


@torch.inference_mode()
def source_features(
    model: VisionLanguageModel, source: Any, *, texts: bool = True, batch_size: int = 128, workers: int = 0
) -> SourceFeatures:
    """Encode every picture of a source (and its main caption). Raises DataError when no picture can be read."""
    images, captions, ids = [], [], []
    keys: list[str] = []
    batches = evaluation_batches(
        source, tokenizer=model.tokenizer, transform=model.transform, batch_size=batch_size, workers=workers
    )
    for batch in batches:
        here = batch.to(model.device)
        images.append(model.encode_image(here.pixels.to(model.dtype)).float().cpu())
        if texts:
            captions.append(model.encode_text(here.tokens).float().cpu())
        ids.append(batch.ids.numpy())
        keys += batch.keys
    if not keys:
        raise DataError(f"{source.name}: no picture could be read")
    empty = images[0][:0]
    return SourceFeatures(torch.cat(images), torch.cat(captions) if texts else empty, np.concatenate(ids), tuple(keys))
