"""The two sides of the CLIP benchmark: the same shape, texts and optimiser, each with its own step.

Heavy imports stand inside the functions, so that a process that measures one side never loads the other.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

CONTEXT = 77  # open_clip's and OpenAI's


@dataclass(frozen=True)
class Shape:
    """Sizes of both towers and the batch."""

    image_size: int
    patch_size: int
    image_width: int
    image_layers: int
    image_heads: int
    text_width: int
    text_layers: int
    text_heads: int
    embed_dim: int
    batch: int


PRESETS = {
    "vit-b-32": Shape(224, 32, 768, 12, 12, 512, 12, 8, 512, batch=16),
    "tiny": Shape(96, 16, 256, 7, 4, 384, 6, 12, 384, batch=128),
}


@dataclass(frozen=True)
class Material:
    """What a measured step takes: pictures shared by both sides, and each side's tokens of the same texts."""

    pixels: Any
    ours: list[Any]
    theirs: list[Any]


def read_captions(options: argparse.Namespace) -> list[str]:
    """The texts of a source (their first captions), or the lines of a file."""
    if options.captions:
        lines = options.captions.read_text(encoding="utf-8").splitlines()
        return [line.strip() for line in lines if line.strip()]
    from vlm.data.captions import first_caption
    from vlm.data.sources import open_source

    source = open_source(options.data)
    return [first_caption(source.meta(i)) for i in range(len(source))]


def make_material(options: argparse.Namespace, shape: Shape, *, batches: int) -> Material:
    """Real texts in batches from length buckets, tokenised for both sides, and random pictures."""
    import numpy as np
    import torch

    from vlm.data.batch import Batch
    from vlm.data.plan import plan
    from vlm.data.samples import caption_id
    from vlm.data.tokenizers import clip_bpe

    captions = read_captions(options)
    if len(captions) < shape.batch:
        raise SystemExit(f"{len(captions)} captions are too few for a batch of {shape.batch}")
    lengths = np.array([len(caption) for caption in captions])
    chosen: list[Any] = []
    while len(chosen) < batches:
        epoch = plan(lengths, shape.batch, seed=0, epoch=len(chosen), bucket_batches=16)
        chosen += [rows for rows in epoch if len(rows) == shape.batch]
    generator = torch.Generator().manual_seed(0)
    size = (shape.batch, 3, shape.image_size, shape.image_size)
    pixels = torch.randn(size, generator=generator).to(options.device)
    tokenize, keys = clip_bpe(max_length=CONTEXT), tuple(map(str, range(shape.batch)))
    ours, theirs = [], []
    for rows in chosen[:batches]:
        texts = [captions[i] for i in rows]
        tokens = tokenize(texts)
        ids = torch.tensor([[int(i), caption_id(text)] for i, text in zip(rows, texts, strict=True)])
        ours.append(Batch(pixels, tokens, ids, keys).to(options.device))
        # The very same ids, padded to the model's context as open_clip's tokenizer does.
        spare = CONTEXT - tokens.input_ids.shape[1]
        theirs.append(torch.nn.functional.pad(tokens.input_ids, (0, spare)).to(options.device))
    return Material(pixels, ours, theirs)


def autocast(options: argparse.Namespace) -> Any:
    """The precision of the forward pass."""
    import torch

    kind = torch.device(options.device).type
    return torch.autocast(kind, torch.bfloat16, enabled=options.precision == "bf16")


def our_network(shape: Shape) -> Any:
    """Our CLIP with OpenAI's layout, so that both sides have the same tensors."""
    from vlm.models.clip import Clip, ClipConfig
    from vlm.models.transformer import TransformerConfig
    from vlm.models.vit import ViTConfig

    image = ViTConfig(
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        width=shape.image_width,
        layers=shape.image_layers,
        heads=shape.image_heads,
        mlp_width=4 * shape.image_width,
        pre_norm=True,
        norm_eps=1e-5,
    )
    text = TransformerConfig(
        vocab_size=49408,
        context_length=CONTEXT,
        width=shape.text_width,
        layers=shape.text_layers,
        heads=shape.text_heads,
        mlp_width=4 * shape.text_width,
        causal=True,
        norm="pre",
        norm_eps=1e-5,
    )
    return Clip(ClipConfig(image, text, embed_dim=shape.embed_dim, text_pool="eot"))


def open_clip_network(shape: Shape) -> Any:
    """open_clip's CLIP of the same shape."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    image = CLIPVisionCfg(
        layers=shape.image_layers,
        width=shape.image_width,
        head_width=shape.image_width // shape.image_heads,
        patch_size=shape.patch_size,
        image_size=shape.image_size,
    )
    text = CLIPTextCfg(
        context_length=CONTEXT,
        vocab_size=49408,
        width=shape.text_width,
        heads=shape.text_heads,
        layers=shape.text_layers,
    )
    return CLIP(embed_dim=shape.embed_dim, vision_cfg=image, text_cfg=text)


def our_side(options: argparse.Namespace, shape: Shape, material: Material) -> Callable[[int], None]:
    """A function that makes our training step number n."""
    import torch

    from vlm.train.distributed import Ranks
    from vlm.train.step import StepContext, backward

    network = our_network(shape).to(options.device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    here = Ranks(0, 1, torch.device(options.device))
    context = StepContext(here, network, lambda: autocast(options), seed=0, accumulate=1)

    def step(number: int) -> None:
        optimizer.zero_grad()
        backward(network, material.ours[number], context, step=number, loss_scale=1.0)
        optimizer.step()
        network.clamp_()

    return step


def open_clip_side(options: argparse.Namespace, shape: Shape, material: Material) -> Callable[[int], None]:
    """A function that makes open_clip's training step number n, as its training loop does."""
    import open_clip
    import torch

    network = open_clip_network(shape).to(options.device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    contrast = open_clip.ClipLoss(cache_labels=True)

    def step(number: int) -> None:
        optimizer.zero_grad()
        with autocast(options):
            loss = contrast(*network(material.pixels, material.theirs[number])[:3])
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            network.logit_scale.clamp_(0, math.log(100))
        loss.item()  # ours reads its losses' values too

    return step


def count(network: Any) -> int:
    """Parameters of a network."""
    return sum(parameter.numel() for parameter in network.parameters())
