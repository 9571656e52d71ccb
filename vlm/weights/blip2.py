"""LAVIS's BLIP-2 checkpoints of stage 1: their sizes, and the image encoder that they leave out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vlm.errors import WeightsError
from vlm.models.blip2 import HEADS, Blip2, Blip2Config
from vlm.models.qformer import QFormerConfig
from vlm.models.transformer import TransformerConfig
from vlm.models.vit import ViTConfig
from vlm.weights.files import read_tensors
from vlm.weights.keymaps.blip2 import BERT, LEFT_OUT, PROJECTIONS, lavis_heads, lavis_rules, tied
from vlm.weights.layout import HEAD_WIDTH, IMAGE, Layout, has, heads, image_config
from vlm.weights.rules import Rule, refuse

EVA_FILE = "eva_vit_g.pth"
"""Where LAVIS keeps the frozen image encoder, which its checkpoints leave out."""
EVA_LAYERS = 39
"""Of the 40 in that file, LAVIS takes these."""
EVA_HEAD_WIDTH = 88
FINAL_EPS = 1e-5
"""Of the norm behind the image encoder (ln_vision); the encoder's own norms have 1e-6."""
CROSS_EVERY = 2
"""Every other layer of the Q-Former looks at the image, from the first on."""
_EVA_LEFT_OUT = re.compile(r"(norm|fc_norm|head|lm_head)\..*|mask_token")


def infer_config(tensors: Mapping[str, Tensor], where: str) -> Blip2Config:
    """The settings that a checkpoint's tensors tell; [DEC] is the last token.

    Raises WeightsError naming what is missing or makes no sense.
    """
    refuse(where, missing=[name for name in ("vision_proj.weight", "temp") if name not in tensors])
    qformer = infer_qformer(tensors, where, words=True, speaks=True)
    return Blip2Config(
        image=infer_image(tensors, where), qformer=qformer, embed_dim=tensors["vision_proj.weight"].shape[0]
    )


def infer_image(tensors: Mapping[str, Tensor], where: str) -> ViTConfig:
    """The image encoder's sizes, with the norm behind it as its last. Raises WeightsError as `infer_config`."""
    if f"{IMAGE}.class_embedding" in tensors:
        raise WeightsError(f"{where}: looks with CLIP's ViT-L, expected EVA-CLIP's ViT-g, as most of LAVIS's BLIP-2 do")
    return image_config(tensors, where=where, head_width=EVA_HEAD_WIDTH, final_norm_eps=FINAL_EPS)


def infer_qformer(tensors: Mapping[str, Tensor], where: str, *, words: bool, speaks: bool) -> QFormerConfig:
    """The Q-Former's sizes; its heads are 64 wide.

    words: whether it is to read texts. speaks: whether it is to say some, which only stage 1 does. Raises
    WeightsError naming what is missing or makes no sense.
    """
    first, embeddings = f"{BERT}.encoder.layer.0", f"{BERT}.embeddings"
    needed = [
        "query_tokens", f"{first}.intermediate_query.dense.weight", f"{first}.crossattention.self.key.weight",
        *([f"{embeddings}.{name}_embeddings.weight" for name in ("word", "position")] if words else []),
    ]  # fmt: skip
    refuse(where, missing=[name for name in needed if name not in tensors])
    queries, mlp, key, *texts = (tensors[name].shape for name in needed)
    width, layer = queries[-1], re.compile(rf"{re.escape(BERT)}\.encoder\.layer\.(\d+)\.")
    layers = 1 + max(int(match[1]) for name in tensors if (match := layer.match(name)))
    text = TransformerConfig(
        vocab_size=texts[0][0] if words else 0, width=width, layers=layers, heads=heads(width, where),
        context_length=texts[1][0] if words else TransformerConfig.context_length, mlp_width=mlp[0],
        cross_layers=tuple(range(0, layers, CROSS_EVERY)), cross_width=key[-1],
    )  # fmt: skip
    last = text.vocab_size - 1 if words else QFormerConfig.dec_id
    return QFormerConfig(text=text, queries=queries[-2], speaks=speaks, instructed=words and not speaks, dec_id=last)


def with_image_encoder(
    tensors: Mapping[str, Tensor], path: Path, *, image: Path | str | None = None, layers: int = EVA_LAYERS
) -> dict[str, Tensor]:
    """The tensors of a LAVIS checkpoint, and where it has none of an image encoder those of another file.

    Args:
        tensors: what the checkpoint holds.
        path: of the checkpoint.
        image: a file of the image encoder alone, or with it; None for LAVIS's own beside the checkpoint.
        layers: the most that are taken of it; LAVIS leaves out the last.

    Raises:
        WeightsError: when there is no such file, naming what to put where.
    """
    if has(tensors, IMAGE):
        return dict(tensors)
    source = path.with_name(EVA_FILE) if image is None else Path(image)
    if not source.is_file():
        raise WeightsError(
            f"{path}: has no image encoder ({IMAGE}.*), which LAVIS keeps in {EVA_FILE}, and {source} isn't there: "
            f"put that file beside the checkpoint, or name one by vlm.load(..., image=FILE)"
        )
    return dict(tensors) | eva_tensors(read_tensors(source), layers=layers)


def eva_tensors(tensors: Mapping[str, Tensor], *, layers: int = EVA_LAYERS) -> dict[str, Tensor]:
    """What of an image encoder's file belongs into a checkpoint, under the checkpoint's names; see above."""
    own = {name: value for name, value in tensors.items() if name.startswith(f"{IMAGE}.")}
    if own:
        return own
    block = re.compile(r"blocks\.(\d+)\.")
    return {
        f"{IMAGE}.{name}": value
        for name, value in tensors.items()
        if not _EVA_LEFT_OUT.fullmatch(name) and not ((found := block.match(name)) and int(found[1]) >= layers)
    }


def without_types(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors of a Q-Former without its token types, which no published one has.

    Every word takes the first type, so that its position can hold it.
    """
    out, types = dict(tensors), "qformer.text.types.weight"
    if types in out:
        out["qformer.text.positions.weight"] = out["qformer.text.positions.weight"] + out.pop(types)[0]
    return out


def unfit_towers(image: ViTConfig, qformer: QFormerConfig) -> dict[str, bool]:
    """Reasons why LAVIS's image encoder and Q-Former can't hold ours, and whether they are so."""
    text = qformer.text
    return {
        "its activation isn't exact GELU": (text.activation, image.activation) != ("gelu", "gelu"),
        f"its last image norm's eps is {image.final_norm_eps or image.norm_eps}, not {FINAL_EPS}": (
            (image.final_norm_eps or image.norm_eps) != FINAL_EPS
        ),
        "its other norm_eps aren't 1e-12 and 1e-6": (text.norm_eps, image.norm_eps) != (1e-12, 1e-6),
        "its image tower has a norm before the first layer": image.pre_norm,
        f"its image tower's heads aren't {EVA_HEAD_WIDTH} wide": image.width != EVA_HEAD_WIDTH * image.heads,
        f"its Q-Former's heads aren't {HEAD_WIDTH} wide": text.width != HEAD_WIDTH * text.heads,
        f"its Q-Former's layers {list(text.cross_layers)} look at the image, not every other one from 0": (
            text.cross_layers != tuple(range(0, text.layers, CROSS_EVERY))
        ),
    }


def _knows(tensors: Mapping[str, Any]) -> bool:
    return has(tensors, BERT) and not any(f"{name}.weight" in tensors for name in PROJECTIONS)


def _rules(config: Blip2Config) -> list[Rule]:
    return [*lavis_rules(config.image, replace(config.qformer, speaks="itg" in config.heads)), *lavis_heads()]


def _no_teacher(config: Any) -> list[Rule]:
    return []


def _twins(config: Blip2Config, suffix: str) -> dict[str, str]:
    return {} if suffix else tied()


def _positions(config: Any, suffix: str) -> list[str]:
    return [] if suffix else [f"{BERT}.embeddings.position_ids"]


def _unfit(config: Blip2Config) -> dict[str, bool]:
    return unfit_towers(config.image, config.qformer) | {
        f"its heads are {', '.join(config.heads)}, not {', '.join(HEADS)}": config.heads != HEADS,
        f"its [DEC] is {config.dec_id}, not the last token": config.dec_id != config.text.vocab_size - 1,
    }


BLIP2 = Layout(
    family="blip2", title="BLIP-2", network=Blip2, knows=_knows, infer=infer_config, rules=_rules,
    teacher_rules=_no_teacher, twins=_twins, positions=_positions, left_out=LEFT_OUT, training=(), unfit=_unfit,
)  # fmt: skip
