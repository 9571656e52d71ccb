"""ViLT as ``transformers`` stores it: ViltModel and the classes with a head on it."""

from __future__ import annotations

from vlm.models.vilt import ViltConfig
from vlm.weights.keymaps.bert import embedding_rules
from vlm.weights.keymaps.clip import Names, image_layer
from vlm.weights.rules import Rule, both, same

# The decoder's weight is the word embedding, stored once or twice.
HF_LEFT_OUT = (r"mlm_score\.decoder\.weight", r"(vilt\.)?embeddings\.text_embeddings\.(position|token_type)_ids")

HF = Names(
    "encoder.layer.{}", "", ("layernorm_before", "layernorm_after"), ("intermediate.dense", "output.dense"),
    "attention.output.dense",
    ("attention.attention.query.", "attention.attention.key.", "attention.attention.value."),
)  # fmt: skip

ITM = both("itm", "itm_score.fc")
"""The official name; transformers has no class for it."""
MLM = [
    *both("mlm.dense", "mlm_score.transform.dense"),
    *both("mlm.norm", "mlm_score.transform.LayerNorm"),
    same("mlm.bias", "mlm_score.decoder.bias"),
]
RANK = both("rank", "rank_output")


def hf_vilt_rules(config: ViltConfig, *, prefix: str = "vilt.") -> list[Rule]:
    """Rules for a model with this configuration's heads; a bare ViltModel has no `prefix`."""
    embeddings = f"{prefix}embeddings"
    kinds = f"{embeddings}.token_type_embeddings.weight"
    two = Rule(("modality", "second_image"), (kinds,), (2, 1), (1,))
    rules = [
        *embedding_rules("words.", f"{embeddings}.text_embeddings."),
        same("image.trunk.cls_token", f"{embeddings}.cls_token"),
        same("image.trunk.pos_embed", f"{embeddings}.position_embeddings"),
        *both("image.trunk.patch_embed.proj", f"{embeddings}.patch_embeddings.projection"),
        two if "nlvr2" in config.heads else same("modality", kinds),
        *both("image.trunk.norm", f"{prefix}layernorm"),
        *both("pooler", f"{prefix}pooler.dense"),
    ]
    for i in range(config.image.layers):
        rules += image_layer(i, prefix + HF.image_layer.format(i), HF)
    heads = {"itm": ITM, "mlm": MLM, "rank": RANK, "vqa": _classifier("vqa"), "nlvr2": _classifier("nlvr2")}
    return rules + [rule for head in config.heads for rule in heads[head]]


def _classifier(ours: str) -> list[Rule]:
    parts = {"up": "0", "norm": "1", "out": "3"}
    return [rule for part, number in parts.items() for rule in both(f"{ours}.{part}", f"classifier.{number}")]
