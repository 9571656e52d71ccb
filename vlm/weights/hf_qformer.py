"""A Q-Former alone from and to ``transformers``: Blip2QFormerModel, which has neither queries nor words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vlm.data.tokenizers import wordpiece
from vlm.data.transforms import ImageTransform
from vlm.errors import ConfigError, WeightsError, with_article
from vlm.models.qformer import QFormer, QFormerConfig
from vlm.weights.files import CONFIG, WEIGHTS, build, read_weights, write_json, write_model
from vlm.weights.hf_blip2 import QFORMER, qformer_config, qformer_settings, read_config, unfit_qformer
from vlm.weights.keymaps.blip2 import HF_ALONE, LEFT_OUT, layer_rules
from vlm.weights.loaded import VisionLanguageModel
from vlm.weights.rules import to_ours, to_theirs

NOT_THEIRS = ("query_tokens", "text.tokens.weight", "text.positions.weight")


def load_hf_qformer(folder: Path, settings: Mapping[str, Any], name: str = "") -> VisionLanguageModel:
    """A folder of Blip2QFormerModel, as a model of the family ``qformer``: no image encoder, no verbs.

    Their class takes queries and words from outside, as embeddings, so its folder holds none: ours are zeros, 32
    queries as in the paper, and words and positions where it has a feed-forward for them. Arguments and errors as
    `vlm.weights.hf_blip2.load_hf_matcher`.
    """
    where = name or str(folder)
    config, ours = read_qformer(folder, settings, where)
    try:
        with torch.device("meta"):
            own = QFormer(config).state_dict()
    except ConfigError as error:
        raise WeightsError(f"{where}: {error}") from error
    rest = {name: torch.zeros(own[name].shape) for name in NOT_THEIRS if name in own}
    network = build(lambda: QFormer(config), ours | rest, where=where)
    return VisionLanguageModel(network, wordpiece(), ImageTransform(224), name=name or folder.name, family="qformer")


def read_qformer(folder: Path, settings: Mapping[str, Any], where: str) -> tuple[QFormerConfig, dict[str, Tensor]]:
    """Our settings and tensors of a folder of Blip2QFormerModel: those of its layers."""
    theirs = read_config("Blip2QFormerConfig", settings, where)
    config = qformer_config(theirs, QFormerConfig.queries, words=theirs.use_qformer_text_input, where=where)
    return config, to_ours(read_weights(folder), layer_rules(config, HF_ALONE), where=where, left_out=LEFT_OUT)


def export_hf_qformer(network: nn.Module, folder: Path | str) -> Path:
    """Write the layers of a Q-Former, or of a BLIP-2's, as a folder that Blip2QFormerModel reads.

    Queries and words are left out, since their class takes both from outside as embeddings. Raises WeightsError when
    it can't hold the layers, or the folder can't be written.
    """
    found: Any = getattr(network, "qformer", network)
    if not isinstance(found, QFormer):
        raise WeightsError(
            f"{with_article(type(network).__name__)} has no Q-Former, so it can't be written as a {QFORMER}"
        )
    config = found.config
    wrong = [reason for reason, so in unfit_qformer(config).items() if so]
    if wrong:
        raise WeightsError(f"this Q-Former can't be written as transformers' {QFORMER}: {'; '.join(wrong)}")
    from transformers import Blip2QFormerConfig

    words = bool(config.text.vocab_size)
    theirs = Blip2QFormerConfig(**qformer_settings(config), use_qformer_text_input=words)
    tensors = to_theirs(found.state_dict(), layer_rules(replace(config, speaks=False), HF_ALONE))

    def fill(target: Path) -> None:
        save_file({name: value.cpu() for name, value in tensors.items()}, target / WEIGHTS, metadata={"format": "pt"})
        write_json(target / CONFIG, theirs.to_dict() | {"architectures": [QFORMER]})

    write_model(Path(folder), fill)
    return Path(folder)
