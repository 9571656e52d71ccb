"""BLIP's official checkpoints: pre-training, captioning, matching and retrieval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from vlm.errors import WeightsError
from vlm.models.blip import HEADS, Blip, BlipConfig, Head
from vlm.weights.keymaps.blip import (
    DECODER,
    ENCODER,
    LEFT_OUT,
    MARKS,
    TRAINING,
    blip_rules,
    is_self_attention,
    shared_names,
    teacher_rules,
    tied,
)
from vlm.weights.layout import Layout, differing, image_config, text_config, unfit_towers

PROMPT = (1037, 3861, 1997)
"""Ids of "a picture of", which the official captioner was fine-tuned to go on from."""
ADDED = 2
"""Tokens behind the vocabulary: [DEC], then [ENC]."""


def infer_config(tensors: Mapping[str, Tensor], where: str) -> BlipConfig:
    """The settings that an official checkpoint's tensors tell; heads are 64 wide, [DEC] and [ENC] the last tokens.

    A file with a decoder alone is a captioner, which has learnt to go on from "a picture of". Raises WeightsError
    naming the head that a tower lacks, or the tensors that are missing or make no sense.
    """
    found = find_heads(tensors, where)
    image = image_config(tensors, where=where)
    prefix = ENCODER if "itc" in found else DECODER
    text = text_config(tensors, prefix, cross_width=image.width, types=False, where=where)
    space = tensors[MARKS["itc"]].shape[0] if "itc" in found else BlipConfig.embed_dim
    config = BlipConfig(
        image=image, text=text, heads=found, dec_id=text.vocab_size - ADDED, enc_id=text.vocab_size - ADDED + 1,
        prompt_ids=PROMPT if found == ("lm",) else (), embed_dim=space,
    )  # fmt: skip
    return replace(config, sharing=find_sharing(tensors, config))


def find_heads(tensors: Mapping[str, Any], where: str) -> tuple[Head, ...]:
    """The heads that are there. Raises WeightsError naming the one that a tower is nothing without."""
    found = tuple(head for head in HEADS if MARKS[head] in tensors)
    for head, tower in (("itc", ENCODER), ("lm", DECODER)):
        if head not in found and any(name.startswith(f"{tower}.") for name in tensors):
            raise WeightsError(
                f"{where}: a {tower} without the {head} head, no tensor {MARKS[head]} is there; expected a BLIP of "
                "pre-training, captioning, matching or retrieval"
            )
    if "itm" in found and "itc" not in found:
        raise WeightsError(f"{where}: an itm head without the itc head, no tensor {MARKS['itc']} is there")
    return found


def find_sharing(tensors: Mapping[str, Tensor], config: BlipConfig) -> Any:
    """What encoder and decoder share, by whether their tensors are the same."""
    most = shared_names(replace(config, sharing="all"))
    if differing(tensors, {copy: kept for copy, kept in most.items() if not is_self_attention(copy)}):
        return "none"
    own = {copy: kept for copy, kept in most.items() if is_self_attention(copy)}
    return "all" if own and not differing(tensors, own) else "all_but_self_attention"


def unfit(config: BlipConfig) -> dict[str, bool]:
    """Reasons why neither the official code nor transformers can hold the network, and whether they are so."""
    text = config.text
    return {
        "not every text layer looks at the image": text.cross_layers != tuple(range(text.layers)),
        f"its [DEC] and [ENC] are {config.dec_id} and {config.enc_id}, not the last two tokens": (
            (config.dec_id, config.enc_id) != (text.vocab_size - ADDED, text.vocab_size - ADDED + 1)
        ),
    }


def _unfit(config: BlipConfig) -> dict[str, bool]:
    return unfit_towers(config, types=False) | unfit(config)


def _twins(config: BlipConfig, suffix: str) -> dict[str, str]:
    return {} if suffix else tied(config)  # the teacher has no decoder


def _positions(config: BlipConfig, suffix: str) -> list[str]:
    encoder = [f"{ENCODER}{suffix}"] if "itc" in config.heads else []
    decoder = [DECODER] if "lm" in config.heads and not suffix else []
    return [f"{text}.embeddings.position_ids" for text in (*encoder, *decoder)]


BLIP = Layout(
    family="blip", title="BLIP", network=Blip, mark=r"text_encoder\.embeddings\..*|text_decoder\.bert\..*",
    infer=infer_config, rules=blip_rules, teacher_rules=teacher_rules, twins=_twins, positions=_positions,
    left_out=LEFT_OUT, training=TRAINING, unfit=_unfit,
)  # fmt: skip
