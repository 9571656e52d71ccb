"""A small ALBEF with random, distinct weights, and batches with hidden tokens for it."""

from __future__ import annotations

import torch

from tests.models.small import key_mask, words
from vlm.data.batch import Batch, Tokens
from vlm.models.albef import Albef, AlbefConfig
from vlm.models.transformer import TransformerConfig
from vlm.models.vit import ViTConfig
from vlm.objectives.mlm import IGNORED

VOCABULARY = 50
ALBEF = AlbefConfig(
    image=ViTConfig(image_size=16, patch_size=8, width=24, layers=2, heads=4, mlp_width=48),
    text=TransformerConfig(
        vocab_size=VOCABULARY, context_length=8, width=32, layers=4, heads=4, mlp_width=64, token_types=2,
        cross_layers=(2, 3), cross_width=24,
    ),
    embed_dim=16,
)  # fmt: skip


def build(config: AlbefConfig = ALBEF, seed: int = 0) -> Albef:
    """A network whose every tensor is random and large enough for each part to matter."""
    torch.manual_seed(seed)
    model = Albef(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "log_scale":
                parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def batch(rows: int, length: int = 8, seed: int = 0, *, full: bool = False) -> Batch:
    """Distinct rows of random lengths; about a third of the tokens hidden, one at least."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, length + 1, (rows,), generator=generator)
    lengths[0] = length
    mask = torch.ones(rows, length, dtype=torch.bool) if full else key_mask(lengths.tolist(), length)
    ids = words(rows, length, seed).masked_fill(~mask, 0)
    hidden = (torch.rand(rows, length, generator=generator) < 0.3) & mask
    hidden[0, 1] = True
    return Batch(
        pixels=torch.randn(rows, 3, 16, 16, generator=generator),
        tokens=Tokens(ids, mask),
        ids=torch.arange(2 * rows).reshape(2, rows).T.contiguous(),
        keys=tuple(f"row{i}" for i in range(rows)),
        masked_ids=ids.masked_fill(hidden, 3),
        labels=ids.masked_fill(~hidden, IGNORED),
    )
