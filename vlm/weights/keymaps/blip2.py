"""BLIP-2 as LAVIS and as ``transformers`` store it: the Q-Former, what stands around it, and InstructBLIP's.

LAVIS keeps BERT's names, with ``_query`` behind those of the queries' feed-forward. Of a Q-Former without words it
leaves out what words need. The language model is not a matter of these tables: see `vlm.weights.blip2_llm`.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlm.models.qformer import QFormerConfig
from vlm.models.vit import ViTConfig
from vlm.weights.keymaps.bert import (
    cross_attention,
    feed_forward,
    mlm_head_rules,
    self_attention,
    tied_head,
)
from vlm.weights.keymaps.blip import hf_image_rules
from vlm.weights.keymaps.vit import eva_rules
from vlm.weights.rules import Rule, both, same, within


@dataclass(frozen=True)
class Names:
    """How a family calls the parts of a Q-Former."""

    words: str
    """Before the names of the word and position embeddings, with its dot."""
    norm: str
    """The norm on queries and words."""
    layer: str
    """A layer, by number."""
    inner: str
    """The projections of an attention."""


QFORMER, BERT, HEAD = "Qformer", "Qformer.bert", "Qformer.cls.predictions"
LAVIS = Names(f"{BERT}.embeddings.", f"{BERT}.embeddings.LayerNorm", f"{BERT}.encoder.layer.{{}}", "self")
HF = Names("embeddings.", "qformer.layernorm", "qformer.encoder.layer.{}", "attention")
HF_INSTRUCT = Names(
    "qformer.embeddings.", "qformer.embeddings.layernorm", "qformer.encoder.layer.{}", "attention"
)  # fmt: skip
HF_ALONE = Names("embeddings.", "layernorm", "encoder.layer.{}", "attention")
"""Blip2QFormerModel, which has neither queries nor words of its own."""
PROJECTIONS = ("opt_proj", "t5_proj", "llm_proj")
"""LAVIS's names of the linear layer before the language model."""
LEFT_OUT = (rf"{BERT}\.embeddings\.position_ids", r".*\.position_ids")


def qformer_rules(config: QFormerConfig, names: Names) -> list[Rule]:
    """Rules for queries, words and layers, without the head that says words."""
    text = config.text
    return [
        Rule(
            ("query_tokens",), ("query_tokens",), shape=(config.queries, text.width),
            their_shape=(1, config.queries, text.width),
        ),
        *(word_rules(names) if text.vocab_size else []),
        *layer_rules(config, names),
    ]  # fmt: skip


def word_rules(names: Names) -> list[Rule]:
    """Rules for the word and position embeddings."""
    return [
        same("text.tokens.weight", f"{names.words}word_embeddings.weight"),
        same("text.positions.weight", f"{names.words}position_embeddings.weight"),
    ]


def layer_rules(config: QFormerConfig, names: Names) -> list[Rule]:
    """Rules for the layers and the norm before them."""
    rules = both("text.embed_norm", names.norm)
    for i in range(config.text.layers):
        ours, theirs = f"text.layers.{i}", names.layer.format(i)
        rules += self_attention(f"{ours}.self_attn.text", f"{ours}.self_norm", theirs, inner=names.inner)
        if i in config.text.cross_layers:
            rules += cross_attention(ours, f"{theirs}.crossattention", inner=names.inner)
        rules += feed_forward(ours, theirs, route="query", end="_query")
        if config.text.vocab_size:
            rules += feed_forward(ours, theirs)
    return rules


def lavis_rules(image: ViTConfig | None, qformer: QFormerConfig) -> list[Rule]:
    """Rules for LAVIS's image encoder (None where the file has none of it but its last norm) and Q-Former."""
    looks = both("trunk.norm", "ln_vision") if image is None else lavis_image_rules(image)
    speaks = mlm_head_rules("lm_head", HEAD) if qformer.speaks else []
    return [*within("image", looks), *within("qformer", [*qformer_rules(qformer, LAVIS), *speaks])]


def lavis_image_rules(image: ViTConfig) -> list[Rule]:
    """Rules for LAVIS's image encoder and the norm behind it."""
    return eva_rules(image, prefix="visual_encoder.", norm="ln_vision")


def lavis_heads() -> list[Rule]:
    """Rules for the heads of stage 1, without the temperature."""
    return _heads("vision_proj", "text_proj")


def hf_rules(image: ViTConfig, qformer: QFormerConfig) -> list[Rule]:
    """Rules for transformers' image encoder and Q-Former, of BLIP-2 or, where it is instructed, of InstructBLIP."""
    names = HF_INSTRUCT if qformer.instructed else HF
    return [*hf_image_rules(image), *within("qformer", qformer_rules(qformer, names))]


def hf_heads() -> list[Rule]:
    """Rules for the heads of Blip2ForImageTextRetrieval, which has no temperature."""
    return _heads("vision_projection", "text_projection")


def tied() -> dict[str, str]:
    """Names that LAVIS stores twice, and the name of the same tensor that is read."""
    return tied_head(HEAD, BERT)


def _heads(image: str, text: str) -> list[Rule]:
    return [*both("image_projection", image), *both("text_projection", text), *both("itm_head", "itm_head")]
