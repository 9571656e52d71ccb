"""BLIP's official checkpoints: pre-training, captioning, matching, retrieval and question answering."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from vlm.errors import WeightsError
from vlm.models.blip import HEADS, Blip, BlipConfig, Head
from vlm.models.vqa import Vqa, VqaConfig, med_answer_decoder
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
    vqa_rules,
    vqa_tied,
)
from vlm.weights.layout import IMAGE, Layout, differing, has, image_config, text_config, unfit_towers
from vlm.weights.rules import Rule

PROMPT = (1037, 3861, 1997)
"""Ids of "a picture of", which the official captioner was fine-tuned to go on from."""
ADDED = 2
"""Tokens behind the vocabulary: [DEC], then [ENC]."""
TYPES = f"{ENCODER}.embeddings.token_type_embeddings.weight"
"""What BLIP hasn't got, and ALBEF's fine-tuned files have under BLIP's names."""


def infer_config(tensors: Mapping[str, Tensor], where: str) -> BlipConfig:
    """The settings that an official checkpoint's tensors tell; heads are 64 wide, [DEC] and [ENC] the last tokens.

    A file with a decoder alone is a captioner, which has learnt to go on from "a picture of". Raises WeightsError
    naming the head that a tower lacks, or the tensors that are missing or make no sense.
    """
    _refuse_albef(tensors, where)
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
        if head not in found and has(tensors, tower):
            raise WeightsError(
                f"{where}: a {tower} without the {head} head, no tensor {MARKS[head]} is there; expected a BLIP of "
                "pre-training, captioning, matching, retrieval or question answering"
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


def is_vqa(tensors: Mapping[str, Any]) -> bool:
    """Whether names are those of an encoder and a decoder that were fine-tuned for question answering."""
    return has(tensors, ENCODER, DECODER) and not any(MARKS[head] in tensors for head in ("itc", "itm"))


def infer_vqa(tensors: Mapping[str, Tensor], where: str) -> VqaConfig:
    """The settings of question answering that an official checkpoint's tensors tell, as `infer_config`."""
    _refuse_albef(tensors, where)
    if MARKS["vqa"] not in tensors:
        raise WeightsError(f"{where}: no vqa head, no tensor {MARKS['vqa']} is there")
    image = image_config(tensors, where=where)
    text = text_config(tensors, ENCODER, cross_width=image.width, types=False, where=where)
    decoder = text_config(tensors, DECODER, cross_width=text.width, types=False, where=where)
    return VqaConfig(
        image=image, text=text, decoder=replace(decoder, causal=True), dec_id=text.vocab_size - ADDED,
        enc_id=text.vocab_size - ADDED + 1, label_smoothing=BlipConfig.label_smoothing,
    )  # fmt: skip


def unfit_vqa(config: VqaConfig) -> dict[str, bool]:
    """As `unfit`, for question answering."""
    text, same = config.text, med_answer_decoder(config.text)
    return unfit(config) | {
        "its answer decoder isn't as its question encoder": config.decoder != same,
        f"its image and text are {config.image.width} and {text.width} wide, not the same": (
            config.image.width != text.width
        ),
    }


def unfit(config: BlipConfig | VqaConfig) -> dict[str, bool]:
    """Reasons why neither the official code nor transformers can hold the network, and whether they are so."""
    text = config.text
    return {
        "not every text layer looks at the image": text.cross_layers != tuple(range(text.layers)),
        f"its [DEC] and [ENC] are {config.dec_id} and {config.enc_id}, not the last two tokens": (
            (config.dec_id, config.enc_id) != (text.vocab_size - ADDED, text.vocab_size - ADDED + 1)
        ),
    }


def _refuse_albef(tensors: Mapping[str, Any], where: str) -> None:
    if TYPES in tensors:
        raise WeightsError(
            f"{where}: a fine-tuned ALBEF, which has {TYPES}; of the official ALBEF only the file of pre-training, "
            "ALBEF.pth, is read (its names begin with text_encoder.bert): load that, or start training from it"
        )


def _knows(tensors: Mapping[str, Any]) -> bool:
    return has(tensors, IMAGE) and (has(tensors, f"{ENCODER}.embeddings") or has(tensors, DECODER))


def _knows_vqa(tensors: Mapping[str, Any]) -> bool:
    return has(tensors, IMAGE) and is_vqa(tensors)


def _unfit(config: BlipConfig) -> dict[str, bool]:
    return unfit_towers(config, types=False) | unfit(config)


def _twins(config: BlipConfig, suffix: str) -> dict[str, str]:
    return {} if suffix else tied(config)  # the teacher has no decoder


def _positions(config: BlipConfig, suffix: str) -> list[str]:
    encoder = [f"{ENCODER}{suffix}"] if "itc" in config.heads else []
    decoder = [DECODER] if "lm" in config.heads and not suffix else []
    return [f"{text}.embeddings.position_ids" for text in (*encoder, *decoder)]


def _vqa_positions(config: VqaConfig, suffix: str) -> list[str]:
    return [] if suffix else [f"{text}.embeddings.position_ids" for text in (ENCODER, DECODER)]


def _no_teacher(config: Any) -> list[Rule]:
    return []


def _vqa_twins(config: VqaConfig, suffix: str) -> dict[str, str]:
    return {} if suffix else vqa_tied(config)


def _unfit_vqa(config: VqaConfig) -> dict[str, bool]:
    return unfit_towers(config, types=False) | unfit_vqa(config)


BLIP = Layout(
    family="blip", title="BLIP", network=Blip, knows=_knows,
    infer=infer_config, rules=blip_rules, teacher_rules=teacher_rules, twins=_twins, positions=_positions,
    left_out=LEFT_OUT, training=TRAINING, unfit=_unfit,
)  # fmt: skip
BLIP_VQA = Layout(
    family="vqa", title="BLIP VQA", network=Vqa, knows=_knows_vqa, infer=infer_vqa, rules=vqa_rules,
    teacher_rules=_no_teacher, twins=_vqa_twins, positions=_vqa_positions, left_out=LEFT_OUT, training=TRAINING,
    unfit=_unfit_vqa,
)  # fmt: skip
