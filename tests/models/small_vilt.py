"""Small ViLTs with random, distinct weights, and batches for them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vlm.data.batch import Batch, Tokens
from vlm.models.vilt import Vilt, ViltConfig
from vlm.models.vit import ViTConfig
from vlm.objectives.mlm import IGNORED

IMAGE = ViTConfig(image_size=24, patch_size=8, width=32, layers=2, heads=4, mlp_width=64)
SMALL = ViltConfig(IMAGE, vocab_size=50, context_length=12)
ALL_HEADS = replace(SMALL, heads=("itm", "mlm", "rank", "vqa", "nlvr2"), answers=("yes", "no", "two"))


def build(config: ViltConfig = SMALL, seed: int = 0) -> Vilt:
    """A network whose every tensor is random and large enough for each part to matter."""
    torch.manual_seed(seed)
    model = Vilt(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def pictures(rows: int, height: int = 24, width: int = 24, seed: int = 1) -> Tensor:
    return torch.randn(rows, 3, height, width, generator=torch.Generator().manual_seed(seed))


def texts(lengths: list[int], seed: int = 2) -> Tokens:
    """Random words between a start (1) and an end (2), padded with 0."""
    longest = max(lengths)
    ids = torch.randint(4, 50, (len(lengths), longest), generator=torch.Generator().manual_seed(seed))
    place, ends = torch.arange(longest)[None], torch.tensor(lengths)[:, None]
    ids = torch.where(place < ends - 1, ids, torch.where(place == ends - 1, 2, 0))
    ids[:, 0] = 1
    return Tokens(ids, place < ends)


def batch(rows: int = 6, *, masked: bool = True, ids: Tensor | None = None) -> Batch:
    """Rows with texts of several lengths; one inner token of each is hidden, and two of the first."""
    tokens = texts([3 + i % 5 for i in range(rows)])
    labels = torch.full_like(tokens.input_ids, IGNORED)
    labels[:, 1] = tokens.input_ids[:, 1]
    hidden = tokens.input_ids.clone()
    hidden[:, 1] = 3
    given = torch.stack([torch.arange(rows), 100 + torch.arange(rows)], dim=1) if ids is None else ids
    keys = tuple(str(i) for i in range(rows))
    whole = Batch(pictures(rows), tokens, given, keys)
    return replace(whole, masked_ids=hidden, labels=labels) if masked else whole
