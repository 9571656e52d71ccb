"""BLIP from and to ``transformers``: its classes for captioning, for matching and for question answering."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from vlm.errors import WeightsError, reason
from vlm.models.blip import Blip, BlipConfig
from vlm.models.common_space import log_scale
from vlm.models.transformer import TransformerConfig
from vlm.models.vqa import Vqa, VqaConfig, med_answer_decoder
from vlm.weights.blip import ADDED, find_heads, find_sharing, is_vqa, unfit, unfit_vqa
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
from vlm.weights.keymaps.blip import LEFT_OUT, MARKS, hf_blip_rules, hf_vqa_rules, tied, vqa_tied
from vlm.weights.layout import check_twins, unfit_pools
from vlm.weights.loaded import VisionLanguageModel, exportable
from vlm.weights.rules import Rule, to_ours, to_theirs

ARCHITECTURES = {
    "BlipForImageTextRetrieval": ("itc", "itm"),
    "BlipForConditionalGeneration": ("lm",),
    "BlipForQuestionAnswering": ("vqa",),
}
"""Classes and the heads that they need."""
VQA = "BlipForQuestionAnswering"
PROMPT = "prompt_ids"
"""Key in config.json of the prompt that a captioner was trained with, which transformers' classes have no place for."""


def load_hf_blip(folder: Path, settings: Mapping[str, Any], name: str = "") -> VisionLanguageModel:
    """A folder of one of transformers' BLIP classes, or of both, with the heads that it holds.

    [ENC] begins a text that is matched, and a question, as in the paper; transformers leaves [CLS] there unless its
    caller puts [ENC]. A captioner has no prompt, as there, unless `export_hf_blip` noted one; likewise the temperature.

    Args:
        folder: with weights and, if they are there, the processor's files.
        settings: its config.json.
        name: for messages and for the model; the folder's if empty.

    Raises:
        WeightsError: that lists every tensor that is missing, unexpected or of another shape; or names the head or
            the setting that doesn't fit.
    """
    where = name or str(folder)
    tensors = read_weights(folder)
    config = hf_blip_config(settings, tensors, where=where)
    kind = _kind(config)
    twins = kind.twins(config)
    check_twins(tensors, twins, where=where)
    known = {key: value for key, value in tensors.items() if key not in twins}
    ours = to_ours(known, kind.rules(config), where=where, left_out=LEFT_OUT)
    if isinstance(config, BlipConfig) and "itc" in config.heads:  # what only ranks has no temperature there
        temperature = noted_in(settings, TEMPERATURE, float, 1 / config.logit_scale_init, where=where)
        ours["log_scale"] = log_scale(1 / temperature).detach()
    network = build(lambda: kind.network(config), ours, where=where)
    tokenizer = read_tokenizer(folder, max_length=config.text.context_length, vocab_size=config.text.vocab_size)
    transform = squashed(folder, config.image.image_size)
    return VisionLanguageModel(network, tokenizer, transform, name=name or folder.name, family=kind.family)


def hf_blip_config(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], *, where: str) -> BlipConfig | VqaConfig:
    """Our settings for a BLIP's ``config.json`` and its heads; what it leaves out has transformers' defaults.

    Raises WeightsError where our network has no such setting, or the class lacks a head.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import BlipConfig as Theirs

    for name in settings.get("architectures") or ():
        if name not in ARCHITECTURES:
            raise WeightsError(f"{where}: {name} isn't known; expected one of {', '.join(ARCHITECTURES)}")
        for head in ARCHITECTURES[name]:
            if MARKS[head] not in tensors:
                raise WeightsError(f"{where}: {name} needs the {head} head, but no tensor {MARKS[head]} is there")
    try:
        theirs: Any = Theirs.from_dict(dict(settings))
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise WeightsError(f"{where}: not a BLIP's configuration ({reason(error)})") from error
    image, text = theirs.vision_config, theirs.text_config
    view, act = image_config(image, where=where), activation(text.hidden_act, where=where)
    words = TransformerConfig(
        vocab_size=text.vocab_size, context_length=text.max_position_embeddings, width=text.hidden_size,
        layers=text.num_hidden_layers, heads=text.num_attention_heads, mlp_width=text.intermediate_size,
        activation=act, norm_eps=text.layer_norm_eps,  # type: ignore[arg-type]
        cross_layers=tuple(range(text.num_hidden_layers)), cross_width=image.hidden_size,
    )  # fmt: skip
    dec, enc = text.bos_token_id, text.vocab_size - ADDED + 1
    if VQA in (settings.get("architectures") or ()) or is_vqa(tensors):
        return VqaConfig(view, words, med_answer_decoder(words), enc, dec, BlipConfig.label_smoothing)
    heads = find_heads(tensors, where)
    prompt = noted_in(settings, PROMPT, lambda ids: tuple(map(int, ids)), (), where=where)
    config = BlipConfig(
        view, words, heads, dec_id=dec, enc_id=enc, prompt_ids=prompt, embed_dim=theirs.image_text_hidden_size
    )
    return replace(config, sharing=find_sharing(tensors, config))


@dataclass(frozen=True)
class _Kind:
    """What a configuration's network is, and how transformers calls its tensors."""

    family: str
    network: Callable[[Any], nn.Module]
    rules: Callable[[Any], list[Rule]]
    twins: Callable[[Any], dict[str, str]]
    unfit: Callable[[Any], dict[str, bool]]


def _kind(config: BlipConfig | VqaConfig) -> _Kind:
    if isinstance(config, VqaConfig):
        return _Kind("vqa", Vqa, hf_vqa_rules, vqa_tied, unfit_vqa)
    return _Kind("blip", Blip, hf_blip_rules, tied, unfit)


def export_hf_blip(model: VisionLanguageModel, folder: Path) -> Path:
    """Write a folder that transformers' BLIP classes and ``BlipProcessor`` read.

    The class in its config.json is that of captioning where there is an lm head, else that of retrieval; of a
    network with all heads each class reads its own, and leaves the others out with a warning. Raises WeightsError
    when they can't hold the network or its preprocessing, or the folder can't be written.
    """
    vocabulary = str(model.tokenizer.to_dict()["kind"])

    def reasons(network: Any) -> dict[str, bool]:
        config = network.config
        return unfit_pools(config) | _kind(config).unfit(config) | {
            "it has no itm head": _heads(config) == ("itc",),
            "its text tower is pre-norm": config.text.norm != "post",
            "it has token types": bool(config.text.token_types),
            **unfit_image(config.image, model.transform),
            f"its tokenizer is {vocabulary!r}, not wordpiece": vocabulary != "wordpiece",
        }  # fmt: skip

    network: Any = exportable(model, (Blip, Vqa), "transformers' BLIP", reasons)
    config, kind = network.config, _kind(network.config)
    tensors = to_theirs(network.state_dict(), kind.rules(config))
    noted: dict[str, Any] = {}
    if getattr(config, "prompt_ids", ()):
        noted[PROMPT] = list(config.prompt_ids)
    if "itc" in _heads(config):
        noted[TEMPERATURE] = float(1 / network.logit_scale.detach())
    # Shared tensors once more under the decoder's names; safetensors refuses two names of one memory.
    tensors |= {copy: tensors[kept].clone() for copy, kept in kind.twins(config).items()}

    def fill(target: Path) -> None:
        save_file({name: value.cpu() for name, value in tensors.items()}, target / WEIGHTS, metadata={"format": "pt"})
        write_json(target / CONFIG, _hf_config(config) | noted)
        write_json(target / PREPROCESSOR, squashing(model.transform))
        model.tokenizer.save(target)
        write_json(target / "tokenizer_config.json", bert_tokenizer(model.tokenizer))

    write_model(folder, fill)
    return folder


def _heads(config: BlipConfig | VqaConfig) -> tuple[str, ...]:
    return ("vqa",) if isinstance(config, VqaConfig) else config.heads


def _hf_config(config: BlipConfig | VqaConfig) -> dict[str, Any]:
    from transformers import BlipConfig as Theirs

    text = config.text
    theirs = Theirs(
        vision_config=image_settings(config.image),
        text_config={
            "vocab_size": text.vocab_size, "hidden_size": text.width, "intermediate_size": text.mlp_width,
            "num_hidden_layers": text.layers, "num_attention_heads": text.heads,
            "max_position_embeddings": text.context_length, "hidden_act": activation_name(text.activation),
            "layer_norm_eps": text.norm_eps, "bos_token_id": config.dec_id,
        },
        image_text_hidden_size=getattr(config, "embed_dim", 256),  # of no use without an itc head
    )  # fmt: skip
    names = [name for name, needed in ARCHITECTURES.items() if set(needed) <= set(_heads(config))]
    found: dict[str, Any] = theirs.to_dict()
    return found | {"architectures": names[-1:]}
