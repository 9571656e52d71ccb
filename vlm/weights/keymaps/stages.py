"""From one stage of the lineage to the next, where the same part has another depth."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vlm.errors import WeightsError
from vlm.models.transformer import TransformerConfig

_LAYER = re.compile(r"(text|decoder)\.layers\.(\d+)\.(.*)")
FRESH = (
    r"(text|decoder)\.layers\.\d+\.cross_(attn|norm|merge)\..*"
    r"|qformer\.(query_tokens|lm_head\..*|text\.types\..*|text\.layers\.\d+\.cross_(attn|norm)\..*)"
)
"""Tensors that an earlier stage needn't have: what a text looks at images with, a Q-Former's queries and its head."""


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


@dataclass(frozen=True)
class Layers:
    """Which layer of an earlier stage's text tower each layer of MED begins as."""

    whole: dict[int, int]
    """Self-attention and feed-forward."""
    cross: dict[int, int]
    """What it looks at images with; layers that aren't there begin afresh."""

    def name(self, ours: str) -> str | None:
        """The earlier stage's name for a tensor of a layer of ours; None where it has none, others as they are."""
        match = _LAYER.fullmatch(ours)
        if match is None:
            return ours
        number = (self.cross if match[3].startswith("cross_") else self.whole).get(int(match[2]))
        return None if number is None else f"{match[1]}.layers.{number}.{match[3]}"


def med_layers(names: Iterable[str], text: TransformerConfig) -> Layers:
    """Layers of MED, given the names of an earlier stage's tensors.

    A tower as deep as ours maps one to one. ALBEF's, whose layers below the fusion are as many as ours, gives
    these, and its fusion layers give what they look at images with to our upper layers, last to last: an ALBEF
    started from a CLIP has its fusion layers from just these. Raises WeightsError for any other depth.
    """
    found = [match for name in names if (match := _LAYER.fullmatch(name))]
    part = "text" if any(match[1] == "text" for match in found) else "decoder"
    theirs = 1 + max((int(match[2]) for match in found if match[1] == part), default=-1)
    fused = sorted({int(match[2]) for match in found if match[1] == part and match[3].startswith("cross_attn.")})
    if theirs == text.layers:
        return Layers({i: i for i in range(theirs)}, {i: i for i in fused})
    if fused and theirs - len(fused) == text.layers:
        return Layers({i: i for i in range(text.layers)}, dict(zip(text.cross_layers[::-1], fused[::-1], strict=False)))
    raise WeightsError(
        f"a text tower of {theirs} layers, {len(fused)} of which look at images, can't start one of {text.layers}; "
        f"expected {text.layers}, or an ALBEF with {text.layers} layers below its fusion"
    )


def med_sources(name: str) -> list[str]:
    """Names that an earlier stage, or BLIP with other heads and sharing, may have for a tensor of MED; best first.

    The decoder begins as the decoder of a MED, whether it shares its layers or not, else as a text encoder; its
    head as one of masked language modelling.
    """
    part, _, rest = name.partition(".")
    if part in ("lm_head", "answer_head"):
        return [name, f"lm_head.{rest}", f"mlm_head.{rest}"]
    plain = rest.replace(".self_attn.decoder.", ".self_attn.text.").replace(".route_norm.decoder.", ".self_norm.")
    routed = rest.replace(".self_attn.text.", ".self_attn.decoder.").replace(".self_norm.", ".route_norm.decoder.")
    if part == "decoder":
        return [name, f"text.{routed}", f"text.{rest}"]
    if part == "text" and plain != rest:
        return [name, f"decoder.{plain}", f"text.{plain}"]
    if ".cross_other." in name:  # two images are looked at as one was
        return [name, name.replace(".cross_other.", ".cross_attn.")]
    return [name]


def qformer_sources(name: str) -> list[str]:
    """Names that another BLIP-2, or else a stage with a text encoder, may have for a tensor of ours; best first.

    Queries and words begin with one feed-forward, the text's, as in the official code; what queries look at images
    with begins afresh, also where that stage's words look at them.
    """
    part, _, rest = name.partition(".")
    if part == "image":
        return [name]
    if part != "qformer":
        return []
    rest = re.sub(r"\.(mlp|mlp_norm)\.query\.", r".\1.text.", rest)
    if rest.startswith("lm_head."):
        return [rest, rest.replace("lm_head.", "mlm_head.")]
    return [] if ".cross_" in rest else [rest]
