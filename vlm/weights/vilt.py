"""ViLT from and to ``transformers``: ViltModel and its classes for MLM, retrieval, VQA and NLVR2."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from vlm.data.transforms import ImageTransform
from vlm.errors import WeightsError, reason
from vlm.models.vilt import HEADS, Vilt, ViltConfig
from vlm.models.vit import ViTConfig
from vlm.weights.files import CONFIG, WEIGHTS, build, read_weights, write_json, write_model
from vlm.weights.hf_parts import (
    ACTS,
    FILTERS,
    PREPROCESSOR,
    activation_name,
    bert_tokenizer,
    read_preprocessor,
    read_tokenizer,
    square,
)
from vlm.weights.keymaps.vilt import HF_LEFT_OUT, hf_vilt_rules
from vlm.weights.loaded import VisionLanguageModel, exportable
from vlm.weights.rules import to_ours, to_theirs

ARCHITECTURES = {
    "ViltModel": None,
    "ViltForMaskedLM": "mlm",
    "ViltForImageAndTextRetrieval": "rank",
    "ViltForQuestionAnswering": "vqa",
    "ViltForImagesAndTextClassification": "nlvr2",
}
MARKS = {"itm": "itm_score.", "mlm": "mlm_score.", "rank": "rank_output.", "vqa": "classifier.", "nlvr2": "classifier."}


def load_hf_vilt(folder: Path, settings: Mapping[str, Any], name: str = "") -> VisionLanguageModel:
    """A folder of one of transformers' ViLT classes, with the heads that it holds.

    Where ``max_image_length`` says that a random part of the patches is taken, all are: a result is then the
    same each time.

    Args:
        folder: with weights and, if they are there, the processor's files.
        settings: its config.json.
        name: for messages and for the model; the folder's if empty.

    Raises:
        WeightsError: that lists every tensor that is missing, unexpected or of another shape; or names the head
            or the setting that doesn't fit.
    """
    where = name or str(folder)
    tensors = _renamed(read_weights(folder))
    config = hf_vilt_config(settings, _heads(settings, tensors, where), where=where)
    prefix = "vilt." if any(key.startswith("vilt.") for key in tensors) else ""
    rules = hf_vilt_rules(config, prefix=prefix)
    ours = to_ours(tensors, rules, where=where, left_out=HF_LEFT_OUT)
    network = build(lambda: Vilt(config), ours, where=where)
    sizes = {"max_length": config.context_length, "vocab_size": config.vocab_size}
    tokenizer, transform = read_tokenizer(folder, **sizes), _transform(folder, config)
    return VisionLanguageModel(network, tokenizer, transform, name=name or folder.name, family="vilt")


def hf_vilt_config(settings: Mapping[str, Any], heads: tuple[str, ...], *, where: str = "config.json") -> ViltConfig:
    """Our settings for a ViLT's ``config.json``; what it leaves out has transformers' defaults.

    Raises WeightsError where our network has no such setting.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import ViltConfig as Theirs

    try:
        theirs: Any = Theirs.from_dict(dict(settings))
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise WeightsError(f"{where}: not a ViLT's configuration ({reason(error)})") from error
    image_size, patch_size = (square(getattr(theirs, side), side, where) for side in ("image_size", "patch_size"))
    wrong = {
        f"hidden_act {theirs.hidden_act!r}: expected one of {', '.join(ACTS)}": theirs.hidden_act not in ACTS,
        "qkv_bias false: expected true": not theirs.qkv_bias,
        f"num_channels {theirs.num_channels}: expected 3": theirs.num_channels != 3,
        f"num_images {theirs.num_images}: expected 2": "nlvr2" in heads and theirs.num_images != 2,
    }
    if any(wrong.values()):
        raise WeightsError(f"{where}: {'; '.join(reason for reason, found in wrong.items() if found)}")
    answers = tuple(theirs.id2label[number] for number in sorted(theirs.id2label)) if "vqa" in heads else ()
    return ViltConfig(
        image=ViTConfig(
            image_size=image_size, patch_size=patch_size, width=theirs.hidden_size, layers=theirs.num_hidden_layers,
            heads=theirs.num_attention_heads, mlp_width=theirs.intermediate_size,
            activation=ACTS[theirs.hidden_act], norm_eps=theirs.layer_norm_eps,  # type: ignore[arg-type]
        ),
        vocab_size=theirs.vocab_size, context_length=theirs.max_position_embeddings,
        token_types=theirs.type_vocab_size, heads=heads, answers=answers,
    )  # fmt: skip


def export_hf_vilt(model: VisionLanguageModel, folder: Path) -> Path:
    """Write a folder that transformers' ViLT classes and ``ViltProcessor`` read.

    The class in its config.json is that of the last head among mlm, rank, vqa and nlvr2, else ViltModel; other
    heads are written beside it under their official names, which transformers leaves out with a warning.
    Raises WeightsError when they can't hold the network or its preprocessing, or the folder can't be written.
    """
    kind = str(model.tokenizer.to_dict()["kind"])

    def unfit(network: Vilt) -> dict[str, bool]:
        return {
            "it has a norm before the first layer": network.config.image.pre_norm,
            "its last norm has an eps of its own": network.config.image.own_final_eps,
            "it has a vqa and an nlvr2 head, which have one name there": {"vqa", "nlvr2"} <= set(network.config.heads),
            f"its pictures are preprocessed by {model.transform.resize!r}, not fit or squash": (
                model.transform.resize not in ("fit", "squash")
            ),
            f"its tokenizer is {kind!r}, not wordpiece": kind != "wordpiece",
        }

    network: Vilt = exportable(model, Vilt, "transformers' ViLT", unfit)
    config = network.config
    tensors = to_theirs(network.state_dict(), hf_vilt_rules(config))

    def fill(target: Path) -> None:
        save_file({name: value.cpu() for name, value in tensors.items()}, target / WEIGHTS, metadata={"format": "pt"})
        write_json(target / CONFIG, _hf_config(config))
        write_json(target / PREPROCESSOR, _hf_preprocessor(model.transform))
        model.tokenizer.save(target)
        write_json(target / "tokenizer_config.json", bert_tokenizer(model.tokenizer))

    write_model(folder, fill)
    return folder


def _heads(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> tuple[str, ...]:
    """The heads whose tensors are there. Raises WeightsError when the class needs one that isn't."""
    found = {head for head in ("itm", "mlm", "rank") if any(key.startswith(MARKS[head]) for key in tensors)}
    first = tensors.get("classifier.0.weight")
    if first is not None:  # of one picture's pooled state, or of two pictures' side by side
        found.add("vqa" if first.shape[-1] == settings.get("hidden_size", 768) else "nlvr2")
    for name in settings.get("architectures") or ():
        if name not in ARCHITECTURES:
            raise WeightsError(f"{where}: {name} isn't known; expected one of {', '.join(ARCHITECTURES)}")
        head = ARCHITECTURES[name]
        if head and head not in found:
            raise WeightsError(f"{where}: {name} needs the {head} head, but no tensor {MARKS[head]}* is there")
    return tuple(head for head in HEADS if head in found)


def _renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Older files keep the decoder's bias under another name, some under both."""
    older = tensors.pop("mlm_score.bias", None)
    return tensors if older is None else {"mlm_score.decoder.bias": older} | tensors


def _transform(folder: Path, config: ViltConfig) -> ImageTransform:
    settings = read_preprocessor(folder)
    size = settings.get("size", config.image.image_size)
    shortest = size if isinstance(size, int) else size.get("shortest_edge")
    multiple = settings.get("size_divisor", 32 if settings else config.image.patch_size)
    if shortest is not None and multiple % config.image.patch_size:
        raise WeightsError(f"{folder}: size_divisor {multiple} is no multiple of patch_size {config.image.patch_size}")
    if shortest is None and size.get("height") != size.get("width"):
        raise WeightsError(f"{folder}: pictures of size {size}, expected a shortest_edge or a square")
    return ImageTransform(
        shortest or size["height"],
        tuple(settings.get("image_mean", (0.5, 0.5, 0.5))),
        tuple(settings.get("image_std", (0.5, 0.5, 0.5))),
        "fit" if shortest is not None else "squash",
        FILTERS.get(settings.get("resample", 3), "bicubic"),  # type: ignore[arg-type]
        multiple,
    )


def _hf_config(config: ViltConfig) -> dict[str, Any]:
    from transformers import ViltConfig as Theirs

    image, second = config.image, "nlvr2" in config.heads
    theirs = Theirs(
        vocab_size=config.vocab_size, type_vocab_size=config.token_types, modality_type_vocab_size=2 + second,
        max_position_embeddings=config.context_length, hidden_size=image.width, num_hidden_layers=image.layers,
        num_attention_heads=image.heads, intermediate_size=image.mlp_width,
        hidden_act=activation_name(image.activation), layer_norm_eps=image.norm_eps, image_size=image.image_size,
        patch_size=image.patch_size, num_images=2 if second else -1,
    )  # fmt: skip
    if config.answers:
        theirs.id2label = dict(enumerate(config.answers))
        theirs.label2id = {answer: number for number, answer in enumerate(config.answers)}
    elif second:
        theirs.id2label, theirs.label2id = {0: "False", 1: "True"}, {"False": 0, "True": 1}
    names = [name for name, head in ARCHITECTURES.items() if head is None or head in config.heads]
    found: dict[str, Any] = theirs.to_dict()
    return found | {"architectures": names[-1:]}


def _hf_preprocessor(transform: ImageTransform) -> dict[str, Any]:
    side, fit = transform.size, transform.resize == "fit"
    shape = {"shortest_edge": side} if fit else {"height": side, "width": side}
    return {
        "image_processor_type": "ViltImageProcessor" if fit else "ViTImageProcessor", "do_resize": True,
        "size": shape, "size_divisor": transform.multiple, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(transform.mean), "image_std": list(transform.std),
        "resample": {value: key for key, value in FILTERS.items()}[transform.interpolation], "do_pad": fit,
    }  # fmt: skip
