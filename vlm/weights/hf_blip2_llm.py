"""BLIP-2's stage 2 from and to ``transformers``: Blip2ForConditionalGeneration and InstructBLIP's, LLM included."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm.data.tokenizers import Tokenizer, wordpiece
from vlm.errors import WeightsError
from vlm.models.blip2_llm import Blip2Llm, Blip2LlmConfig, LlmConfig
from vlm.models.llm import LanguageModel
from vlm.models.lora import merge_lora
from vlm.weights.files import build, read_weights, write_model
from vlm.weights.hf_blip2 import (
    ADVICE,
    INSTRUCTED,
    SPEAKER,
    hf_config,
    qformer_config,
    read_config,
    unfit_qformer,
)
from vlm.weights.hf_parts import image_config, squashed, squashing, unfit_image
from vlm.weights.hf_tokenizer import bert_fast, llm_fast, take_image_token
from vlm.weights.keymaps.blip2 import LEFT_OUT, hf_rules
from vlm.weights.llm import complete, load_llm_tokenizer
from vlm.weights.loaded import VisionLanguageModel, exportable
from vlm.weights.rules import Rule, both, to_ours, to_theirs

LLM = "language_model."
UNREAD = r"qformer\.encoder\.layer\.\d+\.(intermediate|output)\..*"
"""A feed-forward for words, which their class has where it is set and never runs without words."""


def load_hf_speaker(folder: Path, settings: Mapping[str, Any], name: str = "", *, llm: str = "") -> VisionLanguageModel:
    """A folder of Blip2ForConditionalGeneration or InstructBlipForConditionalGeneration.

    Args:
        folder: with weights, the language model's and its tokenizer's files among them.
        settings: its config.json.
        name: for messages and for the model; the folder's if empty.
        llm: how our own copy names the folder, which its language model stays in; the folder's path if empty.

    Raises:
        WeightsError: that lists every tensor that is missing, unexpected or of another shape; or names the setting
            that doesn't fit.
    """
    where = name or str(folder)
    config, ours = read_speaker(folder, settings, where)
    config = replace(config, llm=replace(config.llm, name=llm or str(folder.resolve())))
    network = build(lambda: Blip2Llm(config), ours, where=where)
    complete(network, llm=str(folder))
    transform = squashed(folder, config.image.image_size)
    tokenizer = load_llm_tokenizer(str(folder))
    return VisionLanguageModel(network, tokenizer, transform, name=name or folder.name, family="blip2-llm")


def read_speaker(folder: Path, settings: Mapping[str, Any], where: str) -> tuple[Blip2LlmConfig, dict[str, Tensor]]:
    """Our settings and tensors of such a folder, without its language model; see `load_hf_speaker`."""
    instructed = settings["model_type"] == "instructblip"
    theirs = read_config("InstructBlipConfig" if instructed else "Blip2Config", settings, where)
    qformer = qformer_config(
        theirs.qformer_config, theirs.num_query_tokens, words=instructed, instructed=instructed, where=where
    )
    llm = LlmConfig(name="", width=theirs.text_config.hidden_size)
    config = Blip2LlmConfig(image=image_config(theirs.vision_config, where=where), qformer=qformer, llm=llm)
    unread = (UNREAD,) if getattr(theirs.qformer_config, "use_qformer_text_input", False) else ()
    tensors = read_weights(folder, without=LLM)
    return config, to_ours(tensors, _rules(config), where=where, left_out=(*LEFT_OUT, *unread))


def export_hf_speaker(model: VisionLanguageModel, folder: Path, *, near: bool = False) -> Path:
    """Write a folder that Blip2ForConditionalGeneration, or InstructBLIP's, and their processors read.

    The language model is written with it, and the processor begins texts as ours. LoRA is merged into what it stands
    beside. near: as for `vlm.weights.hf_blip2.export_hf_matcher`. Raises WeightsError when they can't hold the network
    or its preprocessing, or the folder can't be written.
    """

    def reasons(network: Any) -> dict[str, bool]:
        config, held = network.config, network.config.llm.weights
        return unfit_qformer(config.qformer) | unfit_image(config.image, model.transform, near=near) | {
            f"its language model is held as {held}": held in ("int8", "nf4"),
            "its language model isn't attached": network.llm is None,
            "its texts start before the visual prompt (llm.start_first)": config.llm.start_first,
        }  # fmt: skip

    network: Any = exportable(model, Blip2Llm, f"transformers' {SPEAKER}", reasons, advice=ADVICE)
    if network.config.lora.rank:
        network = copy.deepcopy(network)
        merge_lora(network)
    whole = _joined(network, model.tokenizer)
    processor = _processor(model, whole.config)

    def fill(target: Path) -> None:
        whole.save_pretrained(target)
        processor.save_pretrained(target)

    write_model(folder, fill)
    return folder


def _rules(config: Blip2LlmConfig) -> list[Rule]:
    return [*hf_rules(config.image, config.qformer), *both("projection", "language_projection")]


def _joined(network: Any, tokenizer: Tokenizer) -> Any:
    """Their network with our tensors and language model; its configuration names the image token, start and end."""
    import transformers

    config: Blip2LlmConfig = network.config
    speaker: LanguageModel = network.speaker
    inner: Any = speaker.inner
    image_token = take_image_token(tokenizer, rows=speaker.vocab_size)
    if image_token >= speaker.vocab_size:
        inner = _with_row(inner, like=tokenizer.pad_id)
    words: Any = copy.deepcopy(inner.config)
    words.bos_token_id, words.eos_token_id = tokenizer.start_id, tokenizer.end_id
    words.pad_token_id = tokenizer.pad_id
    kind, theirs = (INSTRUCTED, "InstructBlipConfig") if config.qformer.instructed else (SPEAKER, "Blip2Config")
    settings = hf_config(theirs, config.image, config.qformer, text_config=words.to_dict())
    settings = {name: value for name, value in settings.items() if name != "architectures"}
    full = getattr(transformers, theirs).from_dict(settings | {"image_token_index": image_token})
    with torch.device("meta"):
        whole = getattr(transformers, kind)(full)
    whole.language_model = inner
    tensors: dict[str, Tensor] = to_theirs(network.state_dict(), _rules(config))
    told = whole.load_state_dict(
        {name: value.detach().cpu() for name, value in tensors.items()}, strict=False, assign=True
    )
    missing = [name for name in told.missing_keys if not name.startswith(LLM)]
    if missing or told.unexpected_keys:
        raise WeightsError(f"transformers' {kind} of this version has other tensors: {missing}, {told.unexpected_keys}")
    return whole


def _with_row(inner: nn.Module, *, like: int) -> nn.Module:
    """A copy of a language model with a word more, as likely as the one called `like`, which is never said first."""
    grown: Any = copy.deepcopy(inner)
    count = grown.get_input_embeddings().weight.shape[0]
    grown.resize_token_embeddings(count + 1, mean_resizing=False)
    with torch.no_grad():
        for table in (grown.get_input_embeddings(), grown.get_output_embeddings()):
            table.weight[count] = table.weight[like]
            if getattr(table, "bias", None) is not None:
                table.bias[count] = table.bias[like]
    return grown


def _processor(model: VisionLanguageModel, config: Any) -> Any:
    import transformers

    pictures = transformers.BlipImageProcessor(**{
        name: value for name, value in squashing(model.transform).items() if not name.endswith(("_type", "_class"))
    })  # fmt: skip
    seq2seq = bool(config.text_config.is_encoder_decoder)
    fast = llm_fast(model.tokenizer, seq2seq=seq2seq, image_token=config.image_token_index)
    queries = config.num_query_tokens
    if config.model_type != "instructblip":
        return transformers.Blip2Processor(pictures, fast, num_query_tokens=queries)
    asked = bert_fast(wordpiece(max_length=config.qformer_config.max_position_embeddings))
    return transformers.InstructBlipProcessor(pictures, fast, asked, num_query_tokens=queries)
