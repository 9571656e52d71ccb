"""Small heads on top of a network's states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.errors import MissingVerbError
from vlm.models.pairing import begun
from vlm.models.transformer import Transformer, activation
from vlm.models.vit import ViT


@dataclass(frozen=True)
class Prediction:
    """What a head says, and how wrong that is where the truth was given."""

    logits: Tensor
    """(B, classes), or (A, L - 1, V) for the tokens of answers."""
    loss: Tensor | None = None
    """Scalar: the mean over rows; over questions for VQA."""


FEW = 4
"""Rows up to which MKL takes the embedding from the left twice as fast (measured on an EPYC, width 768)."""


class ClassifierHead(nn.Module):
    """Classes of a pooled pair: linear, norm, GELU, linear (ViLT's VQA and NLVR2 heads)."""

    def __init__(self, width: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, classes)

    def forward(self, pooled: Tensor) -> Tensor:
        """Map (B, width) to (B, classes) logits."""
        return self.out(F.gelu(self.norm(self.up(pooled))))


class MlmHead(nn.Module):
    """BERT's prediction of masked tokens: linear, activation, norm, and the token embedding as the last matrix.

    The embedding is given with each call, so that its tensor is stored once.
    """

    def __init__(self, width: int, vocab_size: int, *, norm_eps: float = 1e-12, act: str = "gelu") -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.act = activation(act)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, states: Tensor, embedding: Tensor) -> Tensor:
        """Map (..., D) states to (..., V) logits; `embedding` is the (V, D) token embedding."""
        hidden = self.norm(self.act(self.dense(states)))
        rows = hidden.numel() // hidden.shape[-1]
        if torch.is_grad_enabled() or rows > FEW or hidden.device.type != "cpu":
            return F.linear(hidden, embedding, self.bias)
        logits = (embedding @ hidden.reshape(rows, -1).T).T + self.bias  # (rows, V)
        return logits.reshape(*hidden.shape[:-1], -1)


def fused_states(
    image: ViT, text: Transformer, pixels: Tensor, tokens: Mapping[str, Tensor], start: int | None = None
) -> tuple[Tensor, Tensor]:
    """Fused states (B, L, D) of texts that look at their images, and the mask (B, L) of real tokens.

    start: the texts' first token; None keeps the tokenizer's.
    """
    mask, words = tokens["attention_mask"].bool(), text.embed(begun(tokens["input_ids"], start))
    return text(words, key_mask=mask, image=text.image_states(image(pixels))), mask


def no_head(stage: str, head: str, heads: Iterable[str]) -> MissingVerbError:
    """The error of a network that lacks the head that a verb needs; heads: those it has."""
    known = ", ".join(heads) or "none"
    return MissingVerbError(f"this {stage} has no {head} head (it has: {known}); load or train one that has it")
