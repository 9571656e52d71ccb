"""timm's own names for a vision transformer, which ALBEF and BLIP keep."""

from __future__ import annotations

from vlm.models.vit import ViTConfig
from vlm.weights.rules import Rule, both, same


def vit_rules(config: ViTConfig, *, prefix: str) -> list[Rule]:
    """Rules for a plain vision transformer of this depth; `prefix` stands before their names."""
    parts = ["patch_embed.proj", "norm"]
    for i in range(config.layers):
        parts += [f"blocks.{i}.{part}" for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")]
    rules = [same(f"trunk.{name}", f"{prefix}{name}") for name in ("cls_token", "pos_embed")]
    return rules + [rule for part in parts for rule in both(f"trunk.{part}", f"{prefix}{part}")]
