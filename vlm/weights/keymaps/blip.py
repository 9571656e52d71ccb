"""BLIP as the official code and as ``transformers`` store it: they differ in the image encoder's names alone.

Encoder and decoder stand apart there: what they share is stored under both names, and read under the encoder's.
"""

from __future__ import annotations

import re

from vlm.models.blip import BlipConfig
from vlm.models.vit import ViTConfig
from vlm.models.vqa import VqaConfig
from vlm.weights.keymaps.bert import bert_rules, mlm_head_rules, route_rules, tied_head
from vlm.weights.keymaps.clip import Names, image_layer
from vlm.weights.keymaps.vit import vit_rules
from vlm.weights.rules import Rule, both, same, within

ENCODER, DECODER, HEAD = "text_encoder", "text_decoder.bert", "text_decoder.cls.predictions"
MARKS = {"itc": "vision_proj.weight", "itm": "itm_head.weight", "lm": f"{HEAD}.bias", "vqa": f"{HEAD}.bias"}
"""A tensor of each head."""
LEFT_OUT = (r"(text_encoder(_m)?|text_decoder\.bert)\.embeddings\.position_ids", r"vision_model\..*\.position_ids")
TRAINING = (
    r"(visual_encoder|text_encoder|vision_proj|text_proj)_m\..*", r"(image|text|idx)_queue", r"queue_ptr|ptr_queue",
)  # fmt: skip
"""What only training needs; the last names are those of retrieval, whose queue also holds the pictures' numbers."""

HF = Names(
    "vision_model.encoder.layers.{}", "", ("layer_norm1", "layer_norm2"), ("mlp.fc1", "mlp.fc2"),
    "self_attn.projection", ("self_attn.qkv.",),
)  # fmt: skip


def blip_rules(config: BlipConfig) -> list[Rule]:
    """Rules for the official student, without the temperature."""
    return [*within("image", vit_rules(config.image, prefix="visual_encoder.")), *_text_rules(config)]


def hf_blip_rules(config: BlipConfig) -> list[Rule]:
    """Rules for transformers' classes, all heads side by side; none has a temperature."""
    return [*hf_image_rules(config.image), *_text_rules(config)]


def teacher_rules(config: BlipConfig) -> list[Rule]:
    """Rules for the official teacher, in the student's names of ours; it has no decoder and no ITM head."""
    return [
        *within("image", vit_rules(config.image, prefix="visual_encoder_m.")),
        *within("text", bert_rules(config.text, prefix=f"{ENCODER}_m.")),
        *both("image_projection", "vision_proj_m"),
        *both("text_projection", "text_proj_m"),
    ]


def vqa_rules(config: VqaConfig) -> list[Rule]:
    """Rules for the official network of question answering; question encoder and answer decoder share nothing."""
    return [*within("image", vit_rules(config.image, prefix="visual_encoder.")), *_vqa_text(config)]


def hf_vqa_rules(config: VqaConfig) -> list[Rule]:
    """Rules for transformers' BlipForQuestionAnswering."""
    return [*hf_image_rules(config.image), *_vqa_text(config)]


def vqa_tied(config: VqaConfig) -> dict[str, str]:
    """Names that are stored twice, and the name of the same tensor that is read."""
    return tied_head(HEAD, DECODER)


def tied(config: BlipConfig) -> dict[str, str]:
    """Names that are stored twice, and the name of the same tensor that is read."""
    twins = tied_head(HEAD, DECODER) if "lm" in config.heads else {}
    shared = shared_names(config)
    return shared | {copy: shared.get(kept, kept) for copy, kept in twins.items()}


def shared_names(config: BlipConfig) -> dict[str, str]:
    """The decoder's names of what it shares with the encoder, and the encoder's."""
    if apart(config) or "lm" not in config.heads:
        return {}
    ends = [name for rule in bert_rules(config.text) for name in rule.theirs]
    own = config.sharing == "all_but_self_attention"
    return {f"{DECODER}.{end}": f"{ENCODER}.{end}" for end in ends if not (own and is_self_attention(end))}


def is_self_attention(name: str) -> bool:
    """Whether a tensor of a text transformer belongs to a self-attention or the norm behind it."""
    return re.search(r"encoder\.layer\.\d+\.attention\.", name) is not None


def apart(config: BlipConfig) -> bool:
    """Whether the decoder is a transformer of its own."""
    return config.sharing == "none" or "itc" not in config.heads


def _vqa_text(config: VqaConfig) -> list[Rule]:
    return [
        *within("text", bert_rules(config.text, prefix=f"{ENCODER}.")),
        *within("decoder", bert_rules(config.decoder, prefix=f"{DECODER}.")),
        *mlm_head_rules("answer_head", HEAD),
    ]


def _text_rules(config: BlipConfig) -> list[Rule]:
    rules: list[Rule] = []
    if "itc" in config.heads:
        rules += within("text", bert_rules(config.text, prefix=f"{ENCODER}."))
        rules += both("image_projection", "vision_proj") + both("text_projection", "text_proj")
    if "itm" in config.heads:
        rules += both("itm_head", "itm_head")
    if "lm" in config.heads:
        rules += mlm_head_rules("lm_head", HEAD)
        if apart(config):
            rules += within("decoder", bert_rules(config.text, prefix=f"{DECODER}."))
        elif config.sharing == "all_but_self_attention":
            rules += within("text", route_rules(config.text, "decoder", prefix=f"{DECODER}."))
    return rules


def hf_image_rules(config: ViTConfig) -> list[Rule]:
    """Rules for transformers' image encoder of BLIP, BLIP-2 and InstructBLIP."""
    embeddings = "vision_model.embeddings"
    return [
        same("image.trunk.cls_token", f"{embeddings}.class_embedding"),
        same("image.trunk.pos_embed", f"{embeddings}.position_embedding"),
        *both("image.trunk.patch_embed.proj", f"{embeddings}.patch_embedding"),
        *both("image.trunk.norm", "vision_model.post_layernorm"),
        *(rule for i in range(config.layers) for rule in image_layer(i, HF.image_layer.format(i), HF)),
    ]
