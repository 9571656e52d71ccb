"""ALBEF's official pre-training checkpoints, for use and to train on, in both directions."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.data.tokenizers import wordpiece
from vlm.data.transforms import ImageTransform
from vlm.errors import WeightsError
from vlm.files import write_file
from vlm.models.albef import Albef, AlbefConfig
from vlm.models.transformer import TransformerConfig
from vlm.models.vit import ViTConfig
from vlm.weights.files import assign, read_tensors
from vlm.weights.keymaps.albef import (
    LEFT_OUT,
    POINTER,
    POSITION_IDS,
    QUEUE,
    TEMPERATURE,
    TRAINING,
    albef_rules,
    teacher_rules,
    tied,
)
from vlm.weights.loaded import VisionLanguageModel
from vlm.weights.rules import refuse, to_ours, to_theirs

HEAD_WIDTH = 64
_IMAGE, _TEXT = "visual_encoder", "text_encoder.bert"


@dataclass(frozen=True)
class AlbefTraining:
    """All that pre-training goes on with."""

    config: AlbefConfig
    network: dict[str, Tensor]
    """The student's tensors in our names."""
    teacher: dict[str, Tensor]
    """The teacher's; ITM head and temperature are the student's, since it has none of its own."""
    image_queue: Tensor
    """(Q, D) the teacher's features of earlier images."""
    text_queue: Tensor
    """(Q, D) the teacher's features of their texts."""
    pointer: int
    """Row of the queue that is overwritten next."""


def is_albef(tensors: Mapping[str, Any]) -> bool:
    """Whether the names are those of an official ALBEF pre-training checkpoint (BLIP's text encoder has no bert)."""
    return f"{_IMAGE}.cls_token" in tensors and any(name.startswith(f"{_TEXT}.") for name in tensors)


def load_albef(path: Path, *, name: str = "", tensors: Mapping[str, Tensor] | None = None) -> VisionLanguageModel:
    """The model of an official pre-training checkpoint, without its teacher and queue.

    tensors: what the file holds, where it was read already.
    Raises WeightsError that lists every tensor that doesn't fit.
    """
    tensors = read_tensors(path) if tensors is None else tensors
    where = name or str(path)
    config = infer_config(tensors, where=where)
    network = Albef(config)
    assign(network, _student(tensors, config, where=where), where=where)
    tokenizer = wordpiece(max_length=config.text.context_length)
    if tokenizer.vocab_size > config.text.vocab_size:
        raise WeightsError(
            f"{where}: the text tower knows {config.text.vocab_size} tokens, its tokenizer {tokenizer.vocab_size}"
        )
    transform = ImageTransform(config.image.image_size)
    return VisionLanguageModel(network, tokenizer, transform, name=name or path.stem, family="albef")


def load_albef_training(path: Path) -> AlbefTraining:
    """Student, teacher and queue of an official pre-training checkpoint.

    Raises WeightsError that lists every tensor that doesn't fit, also when teacher or queue are missing.
    """
    tensors, where = read_tensors(path), str(path)
    if not is_albef(tensors):
        raise WeightsError(
            f"{where}: not an official ALBEF checkpoint (no {_IMAGE}.* beside {_TEXT}.*); of another "
            "model give its folder"
        )
    config = infer_config(tensors, where=where)
    student = _student(tensors, config, where=where)
    queued = [*QUEUE.values(), POINTER]
    own = {key: value for key, value in tensors.items() if key not in queued and re.fullmatch(TRAINING[0], key)}
    refuse(where, missing=[key for key in queued if key not in tensors])
    _check_tied(tensors, tied("_m"), where=where)
    teacher = to_ours(own, teacher_rules(config), where=where, left_out=LEFT_OUT)
    image, text = (tensors[QUEUE[side]] for side in ("image", "text"))
    if image.shape != text.shape or image.ndim != 2 or len(image) != config.embed_dim:
        found = f"{QUEUE['image']} {tuple(image.shape)}, {QUEUE['text']} {tuple(text.shape)}"
        refuse(where, shapes=[f"{found}, expected ({config.embed_dim}, Q) twice"])
    return AlbefTraining(
        config, student, student | teacher, image.T.contiguous(), text.T.contiguous(), int(tensors[POINTER])
    )


def export_albef(model: VisionLanguageModel, path: Path | str, *, training: AlbefTraining | None = None) -> Path:
    """Write ``{"model": tensors}`` in the official names, as the official code reads it.

    training: teacher and queue to write beside the model, as pre-training needs them; without it the file holds
    what fine-tuning starts from. Raises WeightsError when the official code can't hold the network, saying why.
    """
    network = _exportable(model)
    config = network.config
    tensors = _official(network.state_dict(), config)
    if training is not None:
        tensors |= to_theirs(training.teacher, teacher_rules(config)) | _repeated(training.teacher, config, "_m")
        tensors |= {QUEUE["image"]: training.image_queue.T, QUEUE["text"]: training.text_queue.T}
        tensors[POINTER] = torch.tensor([training.pointer])
    # Tied names are one tensor here; each is written by itself, so that any reader takes them apart.
    whole = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    target = Path(path)
    write_file(target, lambda file: torch.save({"model": whole}, file), error=WeightsError)
    return target


def infer_config(tensors: Mapping[str, Tensor], *, where: str) -> AlbefConfig:
    """The settings that an official checkpoint's tensors tell; heads are 64 wide.

    Raises WeightsError naming the tensors that are missing or make no sense.
    """
    needed = [
        f"{_IMAGE}.patch_embed.proj.weight", f"{_IMAGE}.pos_embed", f"{_IMAGE}.blocks.0.mlp.fc1.weight",
        f"{_TEXT}.embeddings.word_embeddings.weight", f"{_TEXT}.embeddings.position_embeddings.weight",
        f"{_TEXT}.embeddings.token_type_embeddings.weight", f"{_TEXT}.encoder.layer.0.intermediate.dense.weight",
        "vision_proj.weight", TEMPERATURE,
    ]  # fmt: skip
    refuse(where, missing=[name for name in needed if name not in tensors])
    patch, places, hidden, words, positions, types, mlp, projection = (tensors[name].shape for name in needed[:-1])
    side = math.isqrt(places[1] - 1)
    width, vocabulary = words[1], words[0]
    if side**2 + 1 != places[1] or patch[0] % HEAD_WIDTH or width % HEAD_WIDTH:
        raise WeightsError(
            f"{where}: {places[1]} image positions, widths {patch[0]} and {width}; expected a square and [CLS], "
            f"and multiples of {HEAD_WIDTH}"
        )
    layer = re.compile(rf"{re.escape(_TEXT)}\.encoder\.layer\.(\d+)\.(\w+)")
    found = {(int(match[1]), match[2]) for name in tensors if (match := layer.match(name))}
    blocks = {int(name.split(".")[2]) for name in tensors if name.startswith(f"{_IMAGE}.blocks.")}
    return AlbefConfig(
        image=ViTConfig(
            image_size=side * patch[-1], patch_size=patch[-1], width=patch[0], layers=1 + max(blocks),
            heads=patch[0] // HEAD_WIDTH, mlp_width=hidden[0],
        ),
        text=TransformerConfig(
            vocab_size=vocabulary, context_length=positions[0], width=width, layers=1 + max(i for i, _ in found),
            heads=width // HEAD_WIDTH, mlp_width=mlp[0], token_types=types[0],
            cross_layers=tuple(sorted(i for i, part in found if part == "crossattention")), cross_width=patch[0],
        ),
        embed_dim=projection[0],
    )  # fmt: skip


def _student(tensors: Mapping[str, Tensor], config: AlbefConfig, *, where: str) -> dict[str, Tensor]:
    _check_tied(tensors, tied(""), where=where)
    known = {name: value for name, value in tensors.items() if name != TEMPERATURE}
    ours = to_ours(known, albef_rules(config), where=where, left_out=(*LEFT_OUT, *TRAINING))
    return ours | {"log_scale": -tensors[TEMPERATURE].float().log().reshape(1)}


def _official(ours: Mapping[str, Tensor], config: AlbefConfig) -> dict[str, Tensor]:
    temperature = {TEMPERATURE: ours["log_scale"].neg().exp().reshape(())}
    return temperature | to_theirs(ours, albef_rules(config)) | _repeated(ours, config, "")


def _repeated(ours: Mapping[str, Tensor], config: AlbefConfig, suffix: str) -> dict[str, Tensor]:
    """What the official layout holds beside its weights: tied tensors once more, and numbered positions."""
    decoder = dict(zip(tied(suffix), (ours["text.tokens.weight"], ours["mlm_head.bias"]), strict=True))
    return decoder | {POSITION_IDS.format(suffix): torch.arange(config.text.context_length)[None]}


def _check_tied(tensors: Mapping[str, Tensor], names: Mapping[str, str], *, where: str) -> None:
    for copy, kept in names.items():
        if copy in tensors and kept in tensors and not torch.equal(tensors[copy], tensors[kept]):
            raise WeightsError(f"{where}: {copy} differs from {kept}; this network has one tensor for both")


def _exportable(model: VisionLanguageModel) -> Albef:
    network = model.network
    if not isinstance(network, Albef):
        raise WeightsError(f"{model.name} is a {model.family} model; only ALBEF can be written as an ALBEF checkpoint")
    config, text, image = network.config, network.config.text, network.config.image
    checks = {
        "its image feature is a mean over patches": config.image_pool != "cls",
        f"its text feature is {config.text_pool!r}, not the [CLS] state": config.text_pool != "cls",
        "its projections have no bias": not config.projection_bias,
        "its text tower is pre-norm": text.norm != "post",
        "it has no token types": not text.token_types,
        "its activation isn't exact GELU": (text.activation, image.activation) != ("gelu", "gelu"),
        "its norm_eps aren't 1e-12 and 1e-6": (text.norm_eps, image.norm_eps) != (1e-12, 1e-6),
        "its image tower has a norm before the first layer": image.pre_norm,
        f"its heads aren't {HEAD_WIDTH} wide": {text.width // text.heads, image.width // image.heads} != {HEAD_WIDTH},
    }
    wrong = [reason for reason, found in checks.items() if found]
    if wrong:
        raise WeightsError(
            f"{model.name} can't be written as an official ALBEF checkpoint: {'; '.join(wrong)}. "
            "Keep it in vlm's own format (model.save)."
        )
    return network
