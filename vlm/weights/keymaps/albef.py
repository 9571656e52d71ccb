"""ALBEF's official pre-training checkpoints: student, teacher (names with ``_m``) and queue."""

from __future__ import annotations

from vlm.models.albef import AlbefConfig
from vlm.weights.keymaps.bert import bert_rules, mlm_head_rules
from vlm.weights.keymaps.vit import vit_rules
from vlm.weights.rules import Rule, both, within

TEMPERATURE = "temp"
"""Scalar; the inverse of our logit scale."""
QUEUE = {"image": "image_queue", "text": "text_queue"}
"""Stored as (D, Q)."""
POINTER = "queue_ptr"
POSITION_IDS = "text_encoder{}.bert.embeddings.position_ids"
"""0 to the longest text, (1, positions): no weight."""
LEFT_OUT = (r"text_encoder(_m)?\.bert\.embeddings\.position_ids", r"text_encoder(_m)?\.cls\.predictions\.decoder\..*")
TRAINING = (r"(visual_encoder|text_encoder|vision_proj|text_proj)_m\..*", r"(image|text)_queue", r"queue_ptr")
"""What only training needs."""


def albef_rules(config: AlbefConfig) -> list[Rule]:
    """Rules for the student, without the temperature."""
    return [*_shared_rules(config, ""), *both("itm_head", "itm_head")]


def teacher_rules(config: AlbefConfig) -> list[Rule]:
    """Rules for the teacher, in the student's names of ours; it has no ITM head and no temperature of its own."""
    return _shared_rules(config, "_m")


def tied(suffix: str) -> dict[str, str]:
    """Names that are stored twice, and the name of the same tensor that is read; suffix: ``_m`` for the teacher."""
    predictions = f"text_encoder{suffix}.cls.predictions"
    return {
        f"{predictions}.decoder.weight": f"text_encoder{suffix}.bert.embeddings.word_embeddings.weight",
        f"{predictions}.decoder.bias": f"{predictions}.bias",
    }


def _shared_rules(config: AlbefConfig, suffix: str) -> list[Rule]:
    text = f"text_encoder{suffix}"
    return [
        *within("image", vit_rules(config.image, prefix=f"visual_encoder{suffix}.")),
        *within("text", bert_rules(config.text, prefix=f"{text}.bert.")),
        *both("image_projection", f"vision_proj{suffix}"),
        *both("text_projection", f"text_proj{suffix}"),
        *mlm_head_rules("mlm_head", f"{text}.cls.predictions"),
    ]
