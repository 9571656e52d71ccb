"""BERT and MiniLM (``transformers`` BertModel): our post-norm text transformer with token types.

ALBEF and BLIP keep BERT's names, also those of a BERT with cross-attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm.models.transformer import TransformerConfig
from vlm.weights.rules import Rule, both, same, split_attention

LEFT_OUT = (r"(bert\.)?embeddings\.position_ids", r"(bert\.)?pooler\..*", r"cls\..*")


def bert_rules(config: TransformerConfig, *, prefix: str = "") -> list[Rule]:
    """Rules for a text transformer of this shape and its route ``text``; `prefix` stands before their names."""
    rules = embedding_rules("", f"{prefix}embeddings.", types=bool(config.token_types))
    for i in range(config.layers):
        ours, theirs = f"layers.{i}", f"{prefix}encoder.layer.{i}"
        rules += self_attention(f"{ours}.self_attn.text", f"{ours}.self_norm", theirs)
        rules += feed_forward(ours, theirs)
        if i in config.cross_layers:
            rules += cross_attention(ours, f"{theirs}.crossattention")
    return rules


def route_rules(config: TransformerConfig, route: str, *, prefix: str = "") -> list[Rule]:
    """Rules for another route's self-attention and norm; `prefix` stands before their names."""
    return [
        rule
        for i in range(config.layers)
        for rule in self_attention(
            f"layers.{i}.self_attn.{route}", f"layers.{i}.route_norm.{route}", f"{prefix}encoder.layer.{i}"
        )
    ]


def tied_head(head: str, text: str) -> dict[str, str]:
    """The last matrix of a head `head` and its bias, and the names of the same tensors that are read."""
    return {
        f"{head}.decoder.weight": f"{text}.embeddings.word_embeddings.weight",
        f"{head}.decoder.bias": f"{head}.bias",
    }


def mlm_head_rules(ours: str, theirs: str) -> list[Rule]:
    """Rules for BERT's head of masked language modelling, without its tied last matrix."""
    return [
        *both(f"{ours}.dense", f"{theirs}.transform.dense"),
        *both(f"{ours}.norm", f"{theirs}.transform.LayerNorm"),
        same(f"{ours}.bias", f"{theirs}.bias"),
    ]


def self_attention(ours: str, norm: str, theirs: str, *, inner: str = "self") -> list[Rule]:
    """Rules for the self-attention of a layer `theirs` and the norm behind it; inner: their name of its projections."""
    attention = f"{theirs}.attention"
    return [
        *split_attention(ours, [f"{attention}.{inner}.{name}" for name in ("query", "key", "value")]),
        *both(f"{ours}.out", f"{attention}.output.dense"),
        *both(norm, f"{attention}.output.LayerNorm"),
    ]


def cross_attention(ours: str, theirs: str, *, inner: str = "self") -> list[Rule]:
    """Rules for what our layer looks at images with; inner as in `self_attention`.

    Our kv is their key and value; the query has another width, so it stands alone.
    """
    rules = [
        *both(f"{ours}.cross_attn.q", f"{theirs}.{inner}.query"),
        *both(f"{ours}.cross_attn.out", f"{theirs}.output.dense"),
        *both(f"{ours}.cross_norm", f"{theirs}.output.LayerNorm"),
    ]
    for end in ("weight", "bias"):
        kv = tuple(f"{theirs}.{inner}.{name}.{end}" for name in ("key", "value"))
        rules.append(Rule((f"{ours}.cross_attn.kv.{end}",), kv, (1,), (1, 1)))
    return rules


def feed_forward(ours: str, theirs: str, *, route: str = "text", end: str = "") -> list[Rule]:
    """Rules for a route's feed-forward of a layer and the norm behind it; end: stands behind their parts' names."""
    return [
        *both(f"{ours}.mlp.{route}.up", f"{theirs}.intermediate{end}.dense"),
        *both(f"{ours}.mlp.{route}.down", f"{theirs}.output{end}.dense"),
        *both(f"{ours}.mlp_norm.{route}", f"{theirs}.output{end}.LayerNorm"),
    ]


def embedding_rules(ours: str, theirs: str, *, types: bool = True) -> list[Rule]:
    """Rules for words, positions, token types where there are some, and their norm; both prefixes with their dots."""
    return [
        same(f"{ours}tokens.weight", f"{theirs}word_embeddings.weight"),
        same(f"{ours}positions.weight", f"{theirs}position_embeddings.weight"),
        *([same(f"{ours}types.weight", f"{theirs}token_type_embeddings.weight")] if types else []),
        *both(f"{ours}embed_norm", f"{theirs}LayerNorm"),
    ]


def bert_config(settings: Mapping[str, Any]) -> TransformerConfig:
    """Our settings for a BERT ``config.json``."""
    acts = {
        "gelu": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "quick_gelu": "quick_gelu",
    }
    return TransformerConfig(
        vocab_size=settings["vocab_size"],
        context_length=settings["max_position_embeddings"],
        width=settings["hidden_size"],
        layers=settings["num_hidden_layers"],
        heads=settings["num_attention_heads"],
        mlp_width=settings["intermediate_size"],
        activation=acts[settings.get("hidden_act", "gelu")],  # type: ignore[arg-type]
        norm_eps=settings.get("layer_norm_eps", 1e-12),
        token_types=settings.get("type_vocab_size", 2),
    )
