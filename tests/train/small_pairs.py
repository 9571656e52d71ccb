"""Small stages with pairs, rows with hidden tokens for them, and a run of ALBEF with its teacher."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.train.small import ALONE, batch, make_batches, trainer
from vlm.data.batch import Batch
from vlm.models.albef import Albef, AlbefConfig
from vlm.models.blip import Blip, BlipConfig
from vlm.models.blip2 import Blip2, Blip2Config
from vlm.models.qformer import QFormerConfig
from vlm.models.transformer import TransformerConfig
from vlm.models.vilt import Vilt, ViltConfig
from vlm.models.vit import ViTConfig
from vlm.train.config import TeacherConfig
from vlm.train.distributed import Ranks
from vlm.train.engine import Trainer

IMAGE = ViTConfig(image_size=16, patch_size=8, width=32, layers=2, heads=2, mlp_width=64)
TEXT = TransformerConfig(
    vocab_size=50, context_length=12, width=32, layers=3, heads=2, mlp_width=64, cross_layers=(1, 2)
)


def vilt(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return Vilt(ViltConfig(IMAGE, vocab_size=50, context_length=12, **settings))


def albef(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return Albef(AlbefConfig(IMAGE, TEXT, embed_dim=16, **settings))


def blip(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    text = replace(TEXT, cross_layers=(0, 1, 2))
    return Blip(BlipConfig(IMAGE, text, embed_dim=16, enc_id=49, dec_id=48, prompt_ids=(7, 8), **settings))


def blip2(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    qformer = QFormerConfig(replace(TEXT, cross_layers=(0, 2)), queries=3, dec_id=49)
    return Blip2(Blip2Config(IMAGE, qformer, embed_dim=16, **settings))


STAGES = {
    "vilt": vilt,
    "albef": albef,
    "albef mixed": partial(albef, hard_share=0.5),
    "blip": blip,
    "blip apart": partial(blip, sharing="none"),
    "blip as one": partial(blip, sharing="all"),
    "captioner": partial(blip, heads=("lm",)),
    "retriever": partial(blip, heads=("itc", "itm")),
    "blip2": blip2,
    "blip2 without itg": partial(blip2, itg_weight=0.0, prompt_ids=(7,)),
}


def hidden(numbers: list[int]) -> Batch:
    """The rows with one or two tokens of each text to be guessed, at places that follow from their numbers."""
    rows = batch(numbers)
    ids = rows.tokens["input_ids"]
    place = torch.arange(ids.shape[1])
    chosen = (place[None] % 3 == torch.tensor(numbers)[:, None] % 3) & rows.tokens["attention_mask"]
    return rows.with_masks(torch.where(chosen, 3, ids), torch.where(chosen, ids, -100))


def hidden_batches(here: Ranks = ALONE, broken: int = -1) -> Any:
    """The small job's batches with hidden tokens; sample `broken` has pixels that aren't finite."""

    def batches(epoch: int, skip: int) -> Iterator[Batch]:
        for rows in make_batches(here, broken=broken)(epoch, skip):
            numbers = [int(key.removeprefix("sample-")) for key in rows.keys]
            masks = hidden(numbers)
            yield rows.with_masks(masks.masked_ids, masks.labels)

    return batches


def albef_run(run: Path, here: Ranks = ALONE, *, job: dict | None = None, **settings: Any) -> Trainer:
    """A run of ALBEF with teacher and queue."""
    teacher = TeacherConfig(decay=0.9, queue=17, alpha=0.4, ramp=1.0)
    made = {"network": albef(), "batches": hidden_batches(here), "width": 16} | (job or {})
    return trainer(run, here, job=made, teacher=teacher, **settings)
