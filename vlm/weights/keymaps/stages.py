"""From one stage of the lineage to the next, where the same part has another depth."""

from __future__ import annotations

from vlm.errors import WeightsError
from vlm.models.transformer import TransformerConfig

FRESH = r"text\.layers\.\d+\.cross_(attn|norm)\..*"
"""Tensors that an earlier stage needn't have: what a text looks at images with."""


def text_layers(theirs: int, text: TransformerConfig) -> dict[int, int]:
    """Which layer of a text tower with `theirs` layers each layer of ours begins as.

    A tower as deep as ours maps one to one. One as deep as the layers that see the text alone gives these, and
    its last ones once more to the F fusion layers: of L layers, L - F + j is fusion layer j. Raises WeightsError
    for any other depth.
    """
    fusion = len(text.cross_layers)
    alone = text.layers - fusion
    if theirs == text.layers:
        return {layer: layer for layer in range(theirs)}
    if theirs != alone or fusion > alone:
        known = f"{text.layers}, or {alone} where that is at least the {fusion} fusion layers"
        raise WeightsError(f"a text tower of {theirs} layers can't start one of {text.layers}; expected {known}")
    return {layer: layer if layer < alone else layer - fusion for layer in range(text.layers)}
