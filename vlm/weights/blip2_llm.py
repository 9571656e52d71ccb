"""LAVIS's BLIP-2 checkpoints of stage 2, and InstructBLIP's: Q-Former and projection, without the language model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from vlm.data.llm_tokenizer import SPECIAL, VOCABULARY, special_ids
from vlm.data.tokenizers import Tokenizer, llm_tokenizer
from vlm.data.transforms import ImageTransform
from vlm.errors import WeightsError
from vlm.models.blip2_llm import Blip2Llm, Blip2LlmConfig, LlmConfig
from vlm.weights.blip2 import infer_image, infer_qformer, unfit_towers
from vlm.weights.files import build
from vlm.weights.keymaps.blip2 import BERT, LEFT_OUT, PROJECTIONS, lavis_rules
from vlm.weights.layout import Layout, has
from vlm.weights.llm import complete, load_llm_tokenizer
from vlm.weights.loaded import VisionLanguageModel
from vlm.weights.rules import Rule, both, refuse

logger = logging.getLogger("vlm.weights")

PROJECTION = "llm_proj"
"""What all three names of the layer before the language model are read as."""
OPT, T5, OTHER = "opt_proj", "t5_proj", PROJECTION
LINE_BREAKS = ("\n", "\u010a")
"""A line break in a vocabulary; the second is how byte-level ones write it."""
TRAINED_WITH = {
    (OPT, 2560): "facebook/opt-2.7b", (OPT, 4096): "facebook/opt-6.7b", (T5, 2048): "google/flan-t5-xl",
    (T5, 4096): "google/flan-t5-xxl", (OTHER, 4096): "Vicuna-7B v1.1", (OTHER, 5120): "Vicuna-13B v1.1",
}  # fmt: skip
"""The language models of LAVIS's published files, by the projection's name and width."""


def check_llm_named(tensors: Mapping[str, Tensor], llm: str, *, where: str) -> None:
    """Raise WeightsError, which tells what the projection was trained for, where no language model is named."""
    name = _projection(tensors)
    if not llm:
        width = len(tensors[f"{name}.weight"])
        known = TRAINED_WITH.get((name, width))
        guess = f"; LAVIS's own of this width is {known}" if known else ""
        raise WeightsError(
            f"{where}: holds a Q-Former and its projection ({name}) for a language model {width} wide, but not that "
            f"model: name it, as vlm.load(..., llm=NAME) or --llm NAME, a Hub repo id or a folder{guess}"
        )


def load_lavis_speaker(
    config: Blip2LlmConfig, own: Mapping[str, Tensor], llm: str, *, tensors: Mapping[str, Tensor], name: str
) -> VisionLanguageModel:
    """The model of a stage-2 checkpoint with the language model that it was trained with.

    Args:
        config: from `BLIP2_LLM.infer`.
        own: its tensors in our names.
        llm: Hub repo id or folder of the language model.
        tensors: what the file holds; OPT's texts end with a line break, as LAVIS trains them.
        name: for messages and for the model.

    Raises:
        WeightsError: the language model can't be read, or has another width.
    """
    config = replace(config, llm=replace(config.llm, name=llm))
    network = build(lambda: Blip2Llm(config), own, where=name)
    complete(network)
    tokenizer = load_llm_tokenizer(llm)
    if _projection(tensors) == OPT:
        tokenizer = _ending_lines(tokenizer)
    transform = ImageTransform(config.image.image_size)
    return VisionLanguageModel(network, tokenizer, transform, name=name, family="blip2-llm")


def named_alike(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors with one name for the projection. Raises WeightsError where a part of it is missing."""
    found = _projection(tensors)
    if not found:
        return dict(tensors)
    ends = {f"{found}.{end}": f"{PROJECTION}.{end}" for end in ("weight", "bias")}
    refuse(where, missing=[name for name in ends if name not in tensors])
    return {ends.get(name, name): value for name, value in tensors.items()}


def projection_name(name: str, network: Blip2Llm) -> str:
    """The inverse of `named_alike`: what LAVIS calls the tensor, by the kind of the language model."""
    kind = str(network.speaker.config.model_type)
    theirs = {"opt": OPT, "t5": T5}.get(kind, OTHER)
    return name.replace(f"{PROJECTION}.", f"{theirs}.") if name.startswith(f"{PROJECTION}.") else name


def _projection(tensors: Mapping[str, Any]) -> str:
    return next((name for name in PROJECTIONS if f"{name}.weight" in tensors), "")


def _knows(tensors: Mapping[str, Any]) -> bool:
    return has(tensors, BERT) and bool(_projection(tensors))


def _infer(tensors: Mapping[str, Tensor], where: str) -> Blip2LlmConfig:
    words = f"{BERT}.embeddings.word_embeddings.weight" in tensors
    qformer = infer_qformer(tensors, where, words=words, speaks=False)
    width = len(tensors[f"{PROJECTION}.weight"])
    return Blip2LlmConfig(image=infer_image(tensors, where), qformer=qformer, llm=LlmConfig(name="", width=width))


def _rules(config: Blip2LlmConfig) -> list[Rule]:
    return [*lavis_rules(config.image, config.qformer), *both("projection", PROJECTION)]


def _no_teacher(config: Any) -> list[Rule]:
    return []


def _no_twins(config: Any, suffix: str) -> dict[str, str]:
    return {}


def _positions(config: Any, suffix: str) -> list[str]:
    return [] if suffix else [f"{BERT}.embeddings.position_ids"]


def _unfit(config: Blip2LlmConfig) -> dict[str, bool]:
    return unfit_towers(config.image, config.qformer) | {
        "it has LoRA, which isn't merged": bool(config.lora.rank),
        "its texts start before the visual prompt (llm.start_first)": config.llm.start_first,
    }


def _ending_lines(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with a line break for its end token, where the vocabulary has one."""
    found: Any = tokenizer
    ids = found.engine.encode("\n", add_special_tokens=False).ids
    if len(ids) != 1 or found.engine.id_to_token(ids[0]) not in LINE_BREAKS:
        logger.warning(
            "OPT's texts end with a line break in LAVIS, but this vocabulary has none: its end token is kept"
        )
        return tokenizer
    end = special_ids(start=tokenizer.start_id, end=ids[0], pad=tokenizer.pad_id)
    return llm_tokenizer(VOCABULARY, max_length=tokenizer.max_length, files=found.files | {SPECIAL: end})


BLIP2_LLM = Layout(
    family="blip2-llm", title="BLIP-2 stage 2", network=Blip2Llm, knows=_knows, infer=_infer, rules=_rules,
    teacher_rules=_no_teacher, twins=_no_twins, positions=_positions, left_out=LEFT_OUT, training=(), unfit=_unfit,
)  # fmt: skip
