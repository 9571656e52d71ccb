"""BLIP-2's stage 1 from and to ``transformers``: Blip2ForImageTextRetrieval; and what stage 2 shares with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vlm.errors import WeightsError, reason
from vlm.models.blip2 import Blip2, Blip2Config
from vlm.models.qformer import QFormerConfig
from vlm.models.transformer import TransformerConfig
from vlm.models.vit import ViTConfig
from vlm.weights.blip2 import without_types
from vlm.weights.files import CONFIG, WEIGHTS, build, read_weights, write_json, write_model
from vlm.weights.hf_parts import (
    PREPROCESSOR,
    TEMPERATURE,
    activation,
    activation_name,
    bert_tokenizer,
    image_config,
    image_settings,
    noted_in,
    read_tokenizer,
    squashed,
    squashing,
    unfit_image,
)
from vlm.weights.keymaps.bert import mlm_head_rules
from vlm.weights.keymaps.blip2 import LEFT_OUT, hf_heads, hf_rules
from vlm.weights.loaded import VisionLanguageModel, exportable
from vlm.weights.rules import Rule, to_ours, to_theirs

MATCHER, QFORMER = "Blip2ForImageTextRetrieval", "Blip2QFormerModel"
SPEAKER, INSTRUCTED = "Blip2ForConditionalGeneration", "InstructBlipForConditionalGeneration"
ARCHITECTURES = (MATCHER, SPEAKER, "Blip2Model", INSTRUCTED, QFORMER)
DEFAULTS = {"blip-2": SPEAKER, "instructblip": INSTRUCTED, "blip_2_qformer": QFORMER}
"""By model type, the class of a folder that doesn't say."""
ADVICE = ". An eps alone may change with --near: where states vary by 1 or more, features shift by millionths"
HEAD = "cls.predictions"
"""What their class has no place for: the head that says words stands beside its tensors, under BERT's name, and
transformers leaves it out; as it does the temperature in config.json."""


def load_hf_blip2(folder: Path, settings: Mapping[str, Any], name: str = "", *, llm: str = "") -> VisionLanguageModel:
    """A folder of one of transformers' classes of BLIP-2 or InstructBLIP; arguments and errors as `load_hf_matcher`.

    llm: see `vlm.weights.hf_blip2_llm.load_hf_speaker`.
    """
    kind = architecture(settings, name or str(folder))
    if kind == MATCHER:
        return load_hf_matcher(folder, settings, name)
    if kind == QFORMER:
        from vlm.weights.hf_qformer import load_hf_qformer

        return load_hf_qformer(folder, settings, name)
    from vlm.weights.hf_blip2_llm import load_hf_speaker

    return load_hf_speaker(folder, settings, name, llm=llm)


def architecture(settings: Mapping[str, Any], where: str) -> str:
    """The class that config.json names. Raises WeightsError, with the known ones, for another."""
    kinds = settings.get("architectures") or [DEFAULTS[settings["model_type"]]]
    for kind in kinds:
        if kind not in ARCHITECTURES:
            raise WeightsError(f"{where}: {kind} isn't known; expected one of {', '.join(ARCHITECTURES)}")
    return str(kinds[0])


def load_hf_matcher(folder: Path, settings: Mapping[str, Any], name: str = "") -> VisionLanguageModel:
    """A folder of Blip2ForImageTextRetrieval, with the head that says words where one was written beside it.

    Args:
        folder: with weights and, if they are there, the processor's files.
        settings: its config.json; without a temperature, which their class has none of, ours is the paper's first.
        name: for messages and for the model; the folder's if empty.

    Raises:
        WeightsError: that lists every tensor that is missing, unexpected or of another shape; or names the setting
            that doesn't fit.
    """
    where = name or str(folder)
    config, ours = read_matcher(folder, settings, where)
    network = build(lambda: Blip2(config), ours, where=where)
    text = config.text
    tokenizer = read_tokenizer(folder, max_length=text.context_length, vocab_size=text.vocab_size)
    transform = squashed(folder, config.image.image_size)
    return VisionLanguageModel(network, tokenizer, transform, name=name or folder.name, family="blip2")


def read_matcher(folder: Path, settings: Mapping[str, Any], where: str) -> tuple[Blip2Config, dict[str, Tensor]]:
    """Our settings and tensors of a folder of Blip2ForImageTextRetrieval; see `load_hf_matcher`."""
    tensors = read_weights(folder)
    theirs = read_config("Blip2Config", settings, where)
    speaks = f"{HEAD}.bias" in tensors
    queries = theirs.num_query_tokens
    qformer = qformer_config(theirs.qformer_config, queries, words=True, speaks=speaks, where=where)
    config = Blip2Config(
        image=image_config(theirs.vision_config, where=where), qformer=qformer, embed_dim=theirs.image_text_hidden_size,
        heads=("itc", "itm", "itg") if speaks else ("itc", "itm"),
    )  # fmt: skip
    ours = to_ours(tensors, _rules(config), where=where, left_out=LEFT_OUT)
    temperature = noted_in(settings, TEMPERATURE, float, 1 / config.logit_scale_init, where=where)
    return config, ours | {"log_scale": torch.tensor([temperature]).log().neg()}


def export_hf_matcher(model: VisionLanguageModel, folder: Path, *, near: bool = False) -> Path:
    """Write a folder that Blip2ForImageTextRetrieval and ``Blip2Processor`` read.

    near: whether the last image norm's eps may become that of the others, since they have one for all: of LAVIS's
    checkpoints it is 1e-05 and the others 1e-06. Raises WeightsError when they can't hold the network or its
    preprocessing, or the folder can't be written.
    """
    vocabulary = str(model.tokenizer.to_dict()["kind"])

    def reasons(network: Any) -> dict[str, bool]:
        config = network.config
        return unfit_qformer(config.qformer) | unfit_image(config.image, model.transform, near=near) | {
            "it has no itm head": "itm" not in config.heads,
            f"its tokenizer is {vocabulary!r}, not wordpiece": vocabulary != "wordpiece",
        }  # fmt: skip

    network: Any = exportable(model, Blip2, f"transformers' {MATCHER}", reasons, advice=ADVICE)
    config = network.config
    tensors = to_theirs(without_types(network.state_dict()), _rules(config))
    found = hf_config("Blip2Config", config.image, config.qformer) | {
        "architectures": [MATCHER], "image_text_hidden_size": config.embed_dim,
        TEMPERATURE: float(1 / network.logit_scale.detach()),
    }  # fmt: skip

    def fill(target: Path) -> None:
        save_file({name: value.cpu() for name, value in tensors.items()}, target / WEIGHTS, metadata={"format": "pt"})
        write_json(target / CONFIG, found)
        write_json(target / PREPROCESSOR, squashing(model.transform) | {"processor_class": "Blip2Processor"})
        model.tokenizer.save(target)
        write_json(target / "tokenizer_config.json", bert_tokenizer(model.tokenizer))

    write_model(folder, fill)
    return folder


def read_config(kind: str, settings: Mapping[str, Any], where: str) -> Any:
    """transformers' configuration of this class; what config.json leaves out has their defaults.

    Raises WeightsError where it isn't one.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    try:
        return getattr(transformers, kind).from_dict(dict(settings))
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        raise WeightsError(f"{where}: not a {kind} ({reason(error)})") from error


def qformer_config(
    found: Any, queries: int, *, words: bool, where: str, speaks: bool = False, instructed: bool = False
) -> QFormerConfig:
    """Our settings for the ``qformer_config`` of a BLIP-2's or InstructBLIP's configuration, and so many queries.

    words: whether it reads texts. Raises WeightsError where our network has no such setting.
    """
    text = TransformerConfig(
        vocab_size=found.vocab_size if words else 0, context_length=found.max_position_embeddings,
        width=found.hidden_size, layers=found.num_hidden_layers, heads=found.num_attention_heads,
        mlp_width=found.intermediate_size,
        activation=activation(found.hidden_act, where=where),  # type: ignore[arg-type]
        norm_eps=found.layer_norm_eps,
        cross_layers=tuple(range(0, found.num_hidden_layers, found.cross_attention_frequency)),
        cross_width=found.encoder_hidden_size,
    )  # fmt: skip
    last = found.vocab_size - 1
    return QFormerConfig(text, queries, speaks, instructed, dec_id=last)


def hf_config(kind: str, image: ViTConfig, qformer: QFormerConfig, **more: Any) -> dict[str, Any]:
    """The inverse of `read_config` and `qformer_config`: config.json for this class. more: its further settings."""
    import transformers

    text = qformer.text
    words = {} if qformer.instructed else {"use_qformer_text_input": bool(text.vocab_size)}
    theirs = getattr(transformers, kind)(
        vision_config=image_settings(image),
        qformer_config=qformer_settings(qformer) | words,
        num_query_tokens=qformer.queries, **more,
    )  # fmt: skip
    found: dict[str, Any] = theirs.to_dict()
    return found


def qformer_settings(config: QFormerConfig) -> dict[str, Any]:
    """What ``qformer_config`` says of a Q-Former's sizes."""
    text = config.text
    return {
        "vocab_size": text.vocab_size or TransformerConfig.vocab_size, "hidden_size": text.width,
        "num_hidden_layers": text.layers, "num_attention_heads": text.heads, "intermediate_size": text.mlp_width,
        "hidden_act": activation_name(text.activation), "max_position_embeddings": text.context_length,
        "layer_norm_eps": text.norm_eps, "cross_attention_frequency": _frequency(text),
        "encoder_hidden_size": text.cross_width or text.width,
    }  # fmt: skip


def unfit_qformer(config: QFormerConfig) -> dict[str, bool]:
    """Reasons why transformers' Q-Former can't hold ours, and whether they are so."""
    text = config.text
    return {
        f"its Q-Former's layers {list(text.cross_layers)} look at the image, not every so many from 0": (
            text.cross_layers != tuple(range(0, text.layers, _frequency(text)))
        )
    }


def _frequency(text: TransformerConfig) -> int:
    return text.cross_layers[1] - text.cross_layers[0] if len(text.cross_layers) > 1 else text.layers


def _rules(config: Blip2Config) -> list[Rule]:
    said = mlm_head_rules("qformer.lm_head", HEAD) if "itg" in config.heads else []
    return [*hf_rules(config.image, config.qformer), *hf_heads(), *said]
