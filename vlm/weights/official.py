"""Official checkpoints of ALBEF, BLIP and BLIP-2, for use and to train on, in both directions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm.data.tokenizers import wordpiece
from vlm.data.transforms import ImageTransform
from vlm.errors import WeightsError
from vlm.files import write_file
from vlm.weights.albef import ALBEF
from vlm.weights.blip import BLIP, BLIP_VQA
from vlm.weights.blip2 import BLIP2, with_image_encoder, without_types
from vlm.weights.blip2_llm import BLIP2_LLM, check_llm_named, load_lavis_speaker, named_alike, projection_name
from vlm.weights.files import build, read_tensors
from vlm.weights.layout import IMAGE, Layout, check_twins
from vlm.weights.loaded import VisionLanguageModel, exportable
from vlm.weights.rules import refuse, to_ours, to_theirs

LAYOUTS = (ALBEF, BLIP_VQA, BLIP, BLIP2, BLIP2_LLM)  # question answering first: its names are some of pre-training's
TEMPERATURE = "temp"
"""Scalar; the inverse of our logit scale."""
QUEUE = {"image": "image_queue", "text": "text_queue"}
"""Stored as (D, Q)."""
POINTER, RETRIEVAL_POINTER = "queue_ptr", "ptr_queue"


@dataclass(frozen=True)
class Training:
    """What pre-training goes on with beside the student."""

    teacher: dict[str, Tensor]
    """The teacher's tensors in our names; what it has none of, such as an ITM head, is the student's."""
    image_queue: Tensor
    """(Q, D) the teacher's features of earlier images."""
    text_queue: Tensor
    """(Q, D) the teacher's features of their texts."""
    pointer: int
    """Row of the queue that is overwritten next."""


@dataclass(frozen=True)
class Official:
    """An official checkpoint in our names."""

    layout: Layout
    config: Any
    network: dict[str, Tensor]
    """The student's tensors."""
    training: Training | None
    """Teacher and queue; None where they weren't asked for, or the file has neither."""


def layout_of(tensors: Mapping[str, Any]) -> Layout | None:
    """Whose official names these are; None for none of them."""
    return next((layout for layout in LAYOUTS if layout.knows(tensors)), None)


def read_official(
    path: Path,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    training: bool = False,
    image: Path | str | None = None,
) -> Official:
    """Read an official checkpoint.

    tensors: what the file holds, where it was read already. training: whether to take teacher and queue along. image:
    see `vlm.weights.blip2.with_image_encoder`, for a BLIP-2. Raises WeightsError that lists every tensor that doesn't
    fit, also where a part of teacher or queue is missing.
    """
    tensors, where = read_tensors(path) if tensors is None else tensors, str(path)
    layout = layout_of(tensors)
    if layout is None:
        raise WeightsError(
            f"{where}: not an official ALBEF, BLIP or BLIP-2 checkpoint (no {IMAGE}.* beside text_encoder.* or "
            "text_decoder.*, no Qformer.bert.*); of another model give its folder"
        )
    if layout in (BLIP2, BLIP2_LLM):
        tensors = named_alike(with_image_encoder(tensors, path, image=image), where)
    config = layout.infer(tensors, where)
    network = _student(tensors, layout, config, where)
    taught = training and any(re.fullmatch(pattern, name) for pattern in layout.training for name in tensors)
    return Official(layout, config, network, _training(tensors, layout, config, network, where) if taught else None)


def load_official(
    path: Path,
    *,
    name: str = "",
    tensors: Mapping[str, Tensor] | None = None,
    image: Path | str | None = None,
    llm: str = "",
) -> VisionLanguageModel:
    """The model of an official checkpoint, without its teacher and queue.

    llm: the language model of a stage-2 BLIP-2, see `vlm.weights.blip2_llm.load_lavis_speaker`. Other arguments and
    errors as for `read_official`.
    """
    tensors = read_tensors(path) if tensors is None else tensors
    if layout_of(tensors) is BLIP2_LLM:
        check_llm_named(tensors, llm, where=name or str(path))  # before anything large is read
    found = read_official(path, tensors=tensors, image=image)
    if found.layout is BLIP2_LLM:
        return load_lavis_speaker(found.config, found.network, llm, tensors=tensors, name=name or path.stem)
    if llm:
        raise WeightsError(f"{name or path}: {found.layout.title} speaks without a language model; leave llm out")
    network = build(lambda: found.layout.network(found.config), found.network, where=name or str(path))
    tokenizer = wordpiece(max_length=found.config.text.context_length)
    if tokenizer.vocab_size > found.config.text.vocab_size:
        raise WeightsError(
            f"{name or path}: the text tower knows {found.config.text.vocab_size} tokens, its tokenizer "
            f"{tokenizer.vocab_size}"
        )
    transform = ImageTransform(found.config.image.image_size)
    return VisionLanguageModel(network, tokenizer, transform, name=name or path.stem, family=found.layout.family)


def export_official(model: VisionLanguageModel, path: Path | str, *, training: Training | None = None) -> Path:
    """Write ``{"model": tensors}`` in the official names, as the official code reads it.

    training: teacher and queue to write beside the model, as pre-training needs them; without it the file holds
    what fine-tuning starts from. Raises WeightsError when the official code can't hold the network, saying why.
    """
    layout = next((one for one in LAYOUTS if one.family == model.family), None)
    if layout is None:
        titles = ", ".join(one.title for one in LAYOUTS)
        raise WeightsError(f"{model.name} is {model.kind}; only {titles} have an official file of this kind")
    network: Any = exportable(
        model, nn.Module, f"an official {layout.title} checkpoint", lambda network: layout.unfit(network.config)
    )
    ours, config = without_types(network.state_dict()), network.config
    tensors = to_theirs(ours, layout.rules(config))
    if "log_scale" in ours:
        tensors[TEMPERATURE] = ours["log_scale"].neg().exp().reshape(())
    tensors |= _repeated(tensors, layout, config, "")
    if layout is BLIP2_LLM:
        tensors = {projection_name(key, network): value for key, value in tensors.items()}
    if training is not None:
        tensors |= to_theirs(training.teacher, layout.teacher_rules(config))
        tensors |= _repeated(tensors, layout, config, "_m")
        tensors |= {QUEUE["image"]: training.image_queue.T, QUEUE["text"]: training.text_queue.T}
        tensors[POINTER] = torch.tensor([training.pointer])
    # Tied names are one tensor here; each is written by itself, so that any reader takes them apart.
    whole = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    target = Path(path)
    write_file(target, lambda file: torch.save({"model": whole}, file), error=WeightsError)
    return target


def _student(tensors: Mapping[str, Tensor], layout: Layout, config: Any, where: str) -> dict[str, Tensor]:
    twins = layout.twins(config, "")
    check_twins(tensors, twins, where=where)
    known = {name: value for name, value in tensors.items() if name != TEMPERATURE and name not in twins}
    ours = to_ours(known, layout.rules(config), where=where, left_out=(*layout.left_out, *layout.training))
    if TEMPERATURE in tensors:
        ours["log_scale"] = -tensors[TEMPERATURE].float().log().reshape(1)
    elif "itc" in getattr(config, "heads", ()):  # what only ranks needs no temperature, and BLIP's ITM files have none
        ours["log_scale"] = torch.tensor([config.logit_scale_init]).log()
    return ours


def _training(
    tensors: Mapping[str, Tensor], layout: Layout, config: Any, student: Mapping[str, Tensor], where: str
) -> Training:
    pointer = RETRIEVAL_POINTER if RETRIEVAL_POINTER in tensors else POINTER
    queued = [*QUEUE.values(), pointer]
    refuse(where, missing=[name for name in queued if name not in tensors])
    twins = layout.twins(config, "_m")
    check_twins(tensors, twins, where=where)
    beside = {*queued, *twins, "idx_queue"}
    own = {
        name: value
        for name, value in tensors.items()
        if name not in beside and any(re.fullmatch(pattern, name) for pattern in layout.training)
    }
    teacher = to_ours(own, layout.teacher_rules(config), where=where, left_out=layout.left_out)
    image, text = (tensors[QUEUE[side]] for side in ("image", "text"))
    if image.shape != text.shape or image.ndim != 2 or len(image) != config.embed_dim:
        found = f"{QUEUE['image']} {tuple(image.shape)}, {QUEUE['text']} {tuple(text.shape)}"
        refuse(where, shapes=[f"{found}, expected ({config.embed_dim}, Q) twice"])
    place, rows = tensors[pointer], image.shape[1]
    if place.numel() != 1 or not 0 <= place.item() < rows:
        raise WeightsError(f"{where}: {pointer} is {place.tolist()}, expected a row of the queue, 0 to {rows - 1}")
    return Training({**student, **teacher}, image.T.contiguous(), text.T.contiguous(), int(place))


def _repeated(tensors: Mapping[str, Tensor], layout: Layout, config: Any, suffix: str) -> dict[str, Tensor]:
    """What the official layout holds beside its weights: tied tensors once more, and numbered positions."""
    twins = {copy: tensors[kept] for copy, kept in layout.twins(config, suffix).items()}
    text = config.qformer.text if hasattr(config, "qformer") else config.text
    numbers = torch.arange(text.context_length)[None]
    return twins | dict.fromkeys(layout.positions(config, suffix), numbers)
