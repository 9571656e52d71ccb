"""From one stage of the lineage to the next, where the same part has another depth."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from vlm.errors import WeightsError
from vlm.models.transformer import TransformerConfig

FRESH = r"(text|decoder)\.layers\.\d+\.cross_(attn|norm)\..*"
"""Tensors that an earlier stage needn't have: what a text looks at images with."""


def text_layers(theirs: int, text: TransformerConfig) -> dict[int, int]:
    """Which layer of a text tower with `theirs` layers each layer of ours begins as.

    A tower as deep as ours maps one to one. One as deep as the layers that see the text alone gives these, and
    its last ones once more to the F fusion layers: of L layers, L - F + j is fusion layer j. A tower for two
    images has every fusion layer twice (ALBEF §5). Raises WeightsError for any other depth.
    """
    fusion = len(text.cross_layers) - len(text.cross_shared)
    alone = text.layers - len(text.cross_layers)
    if theirs == text.layers:
        return {layer: layer for layer in range(theirs)}
    if text.cross_shared and theirs == alone + fusion:
        return {layer: layer if layer < alone else alone + (layer - alone) // 2 for layer in range(text.layers)}
    if text.cross_shared or theirs != alone or fusion > alone:
        known = f"{text.layers} or {alone + fusion}"
        if not text.cross_shared:
            known = f"{text.layers}, or {alone} where that is at least the {fusion} fusion layers"
        raise WeightsError(f"a text tower of {theirs} layers can't start one of {text.layers}; expected {known}")
    return {layer: layer if layer < alone else layer - fusion for layer in range(text.layers)}


def layer_names(names: Iterable[str], numbers: Mapping[int, int], text: TransformerConfig) -> dict[str, str]:
    """Tensors of our text tower's layers, and those of an earlier stage that they begin as, by `text_layers`.

    Layers that share the keys and values of the one before have none to begin.
    """
    layer = re.compile(r"text\.layers\.(\d+)\.(.*)")
    found = [(int(match[1]), match[2]) for name in names if (match := layer.fullmatch(name))]
    return {
        f"text.layers.{ours}.{end}": f"text.layers.{theirs}.{end}"
        for ours, theirs in numbers.items()
        for number, end in found
        if number == theirs and not (ours in text.cross_shared and end.startswith("cross_attn.kv."))
    }


def decoder_names(names: Iterable[str], decoder: TransformerConfig, *, fusion_start: int) -> dict[str, str]:
    """Tensors of an answer decoder and its head, and those of ALBEF's fusion layers that they begin as (ALBEF §5)."""
    out = {}
    for name in names:
        part, _, end = name.partition(".")
        number, _, rest = end.removeprefix("layers.").partition(".")
        if part == "mlm_head":
            out[f"answer_head.{end}"] = name
        elif part == "text" and not end.startswith("layers."):
            out[f"decoder.{end}"] = name
        elif part == "text" and 0 <= int(number) - fusion_start < decoder.layers:
            out[f"decoder.layers.{int(number) - fusion_start}.{rest}"] = name
    return out
