"""ALBEF's official pre-training checkpoints: student, teacher (names with ``_m``) and queue.

The temperature is a scalar, the inverse of our logit scale.
"""

from __future__ import annotations

from vlm.models.albef import AlbefConfig
from vlm.weights.keymaps.bert import bert_rules, mlm_head_rules, tied_head
from vlm.weights.keymaps.vit import vit_rules
from vlm.weights.rules import Rule, both, within

TEXT = "text_encoder{}.bert"
"""Of the student, or with ``_m`` the teacher."""
LEFT_OUT = (r"text_encoder(_m)?\.bert\.embeddings\.position_ids",)
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
    return tied_head(f"text_encoder{suffix}.cls.predictions", TEXT.format(suffix))


def _shared_rules(config: AlbefConfig, suffix: str) -> list[Rule]:
    return [
        *within("image", vit_rules(config.image, prefix=f"visual_encoder{suffix}.")),
        *within("text", bert_rules(config.text, prefix=f"{TEXT.format(suffix)}.")),
        *both("image_projection", f"vision_proj{suffix}"),
        *both("text_projection", f"text_proj{suffix}"),
        *mlm_head_rules("mlm_head", f"text_encoder{suffix}.cls.predictions"),
    ]
