"""The filter: does a text belong to its picture (BLIP §3.3)?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlm.errors import MissingVerbError
from vlm.models.blip import Blip
from vlm.models.heads import no_head
from vlm.models.pairing import take_images
from vlm.weights.loaded import VisionLanguageModel

MATCHED = 1


class Verdict(NamedTuple):
    """What the filter thinks of a pair."""

    itm: float
    """Probability that they match."""
    itc: float
    """Cosine of their features."""


class Judge:
    """Scores of several texts for each picture, which is encoded once for all of them."""

    def __init__(self, model: VisionLanguageModel) -> None:
        """Raises MissingVerbError, which names the head, for a model that can't match."""
        need_heads(model, "itm")
        self.model = model

    @torch.inference_mode()
    def verdicts(self, pixels: Tensor, texts: Sequence[Sequence[str]]) -> list[list[Verdict | None]]:
        """Judge the texts (B lists) of preprocessed pictures (B, 3, H, W); an empty text has no verdict.

        The first texts of all pictures run together, then the second ones: web texts aren't padded to the length of
        synthetic ones, nor the other way round.
        """
        network: Any = self.model.network
        states = network.image_states(pixels.to(self.model.device, self.model.dtype))
        image = network.image_keys_values(states.states)  # once for every text
        found: list[list[Verdict | None]] = [[None] * len(some) for some in texts]
        for place in range(max((len(some) for some in texts), default=0)):
            rows = [row for row, some in enumerate(texts) if place < len(some) and some[place].strip()]
            if not rows:
                continue
            tokens, chosen = self.model.tokens([texts[row][place] for row in rows]), torch.tensor(rows)
            chosen = chosen.to(self.model.device)
            seen = image if len(rows) == len(texts) else take_images(image, chosen)
            words = network.text_states(tokens)
            itc = (states.features[chosen] * words.features).sum(dim=1)  # (n,)
            itm = network.match_states(words.states, words.mask, seen).float().softmax(dim=1)[:, MATCHED]
            for row, matched, cosine in zip(rows, itm.tolist(), itc.float().tolist(), strict=True):
                found[row][place] = Verdict(matched, cosine)
        return found


def need_heads(model: VisionLanguageModel, *heads: str) -> None:
    """Raises MissingVerbError, which names the head, for a model that has no such ones."""
    if not isinstance(model.network, Blip):
        raise MissingVerbError(
            f"{model.name}: {model.kind} has no {', '.join(heads)} head of a MED; CapFilt needs a BLIP"
        )
    for head in heads:
        if head not in model.network.config.heads:
            raise no_head(f"BLIP, {model.name},", head, model.network.config.heads)
