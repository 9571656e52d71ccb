"""A small Q-Former with random, distinct weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tests.models.small_albef import VOCABULARY
from vlm.models.qformer import QFormer, QFormerConfig
from vlm.models.transformer import TransformerConfig

DEC, QUERIES, WIDTH = 49, 3, 32
TEXT = TransformerConfig(
    vocab_size=VOCABULARY, context_length=8, width=WIDTH, layers=3, heads=4, mlp_width=64, cross_layers=(0, 2),
    cross_width=24,
)  # fmt: skip
QFORMER = QFormerConfig(text=TEXT, queries=QUERIES, dec_id=DEC)
INSTRUCTED = replace(QFORMER, speaks=False, instructed=True)
SILENT = replace(QFORMER, text=replace(TEXT, vocab_size=0), speaks=False)


def build(config: QFormerConfig = QFORMER, seed: int = 0) -> QFormer:
    """A network whose every tensor is random and large enough for each part to matter."""
    torch.manual_seed(seed)
    model = QFormer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def pictures(rows: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, 5, 24, generator=torch.Generator().manual_seed(seed))
