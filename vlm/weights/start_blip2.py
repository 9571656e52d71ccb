"""Parts of a published BLIP-2 that training starts from, of LAVIS's files and of transformers' folders."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vlm.errors import WeightsError
from vlm.models.qformer import QFormerConfig
from vlm.models.vit import ViTConfig
from vlm.weights.blip2 import EVA_FILE, infer_qformer
from vlm.weights.blip2_llm import PROJECTION, named_alike
from vlm.weights.hf_blip2 import QFORMER, architecture, read_matcher
from vlm.weights.hf_blip2_llm import read_speaker
from vlm.weights.hf_qformer import read_qformer
from vlm.weights.keymaps.blip2 import BERT, LEFT_OUT, lavis_heads, lavis_rules, tied
from vlm.weights.layout import IMAGE, has
from vlm.weights.official import TEMPERATURE, read_official
from vlm.weights.rules import both, to_ours

logger = logging.getLogger("vlm.weights")


@dataclass(frozen=True)
class Parts:
    """What a network can begin with."""

    tensors: dict[str, Tensor]
    """In our names."""
    qformer: QFormerConfig
    image: ViTConfig | None
    """None where there is no image encoder."""


def lavis_parts(path: Path, tensors: Mapping[str, Tensor]) -> Parts:
    """Of a LAVIS checkpoint of either stage; without its image encoder where neither it nor its folder holds one.

    Raises WeightsError as `vlm.weights.official.read_official`.
    """
    if has(tensors, IMAGE) or path.with_name(EVA_FILE).is_file():
        found = read_official(path, tensors=tensors)
        return Parts(found.network, found.config.qformer, found.config.image)
    where = str(path)
    logger.info("%s: has no image encoder, and no %s stands beside it: that begins otherwise", path, EVA_FILE)
    alike = named_alike(tensors, where)
    second = f"{PROJECTION}.weight" in alike
    words = not second or f"{BERT}.embeddings.word_embeddings.weight" in alike
    qformer = infer_qformer(alike, where, words=words, speaks=not second)
    more = both("projection", PROJECTION) if second else lavis_heads()
    known = {name: value for name, value in alike.items() if name != TEMPERATURE and name not in tied()}
    ours = to_ours(known, [*lavis_rules(None, qformer), *more], where=where, left_out=LEFT_OUT)
    ours = {name: value for name, value in ours.items() if not name.startswith("image.")}  # a norm of another encoder
    if TEMPERATURE in alike:
        ours["log_scale"] = -alike[TEMPERATURE].float().log().reshape(1)
    return Parts(ours, qformer, None)


def hf_parts(network: nn.Module, folder: Path, settings: Mapping[str, Any]) -> Parts:
    """Of a folder of one of transformers' classes, without its language model.

    A Blip2QFormerModel holds no queries and no words: `network` keeps its own. Raises WeightsError as `vlm.load`.
    """
    where, kind = str(folder), architecture(settings, str(folder))
    if kind == QFORMER:
        config, tensors = read_qformer(folder, settings, where)
        own = {name: value for name, value in network.state_dict().items() if name.startswith("qformer.")}
        return Parts(own | {f"qformer.{name}": value for name, value in tensors.items()}, config, None)
    whole, tensors = (read_matcher if kind.endswith("Retrieval") else read_speaker)(folder, settings, where)
    return Parts(tensors, whole.qformer, whole.image)


def check_alike(network: nn.Module, parts: Parts, where: str) -> None:
    """Raise WeightsError, naming each setting, where the network's parts have other heads, norms or activations.

    Shapes don't tell these, and weights would mean nothing under others.
    """
    config: Any = network.config
    pairs: list[tuple[str, Any, Any]] = []
    if parts.image is not None:
        names = ("patch_size", "heads", "activation", "norm_eps", "own_final_eps", "pre_norm")
        pairs += [(f"image.{name}", getattr(config.image, name), getattr(parts.image, name)) for name in names]
        if parts.image.own_final_eps:
            last = "final_norm_eps"
            pairs.append((f"image.{last}", getattr(config.image, last), getattr(parts.image, last)))
    for name in ("heads", "activation", "norm_eps", "cross_layers"):
        pairs.append((f"qformer.text.{name}", getattr(config.qformer.text, name), getattr(parts.qformer.text, name)))
    wrong = [f"model.{name} is {ours}, expected {theirs}" for name, ours, theirs in pairs if ours != theirs]
    if wrong:
        raise WeightsError(f"{where}: this network has other settings: {'; '.join(wrong)}")
