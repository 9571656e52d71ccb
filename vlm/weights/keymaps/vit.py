"""timm's own names for a vision transformer, which ALBEF and BLIP keep, and those of EVA, which BLIP-2 looks with."""

from __future__ import annotations

from vlm.models.vit import ViTConfig
from vlm.weights.rules import ZEROS, Rule, both, same


def vit_rules(config: ViTConfig, *, prefix: str) -> list[Rule]:
    """Rules for a plain vision transformer of this depth; `prefix` stands before their names."""
    parts = ["patch_embed.proj", "norm"]
    for i in range(config.layers):
        parts += [f"blocks.{i}.{part}" for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")]
    rules = [same(f"trunk.{name}", f"{prefix}{name}") for name in ("cls_token", "pos_embed")]
    return rules + [rule for part in parts for rule in both(f"trunk.{part}", f"{prefix}{part}")]


def eva_rules(config: ViTConfig, *, prefix: str, norm: str) -> list[Rule]:
    """Rules for EVA-CLIP's vision transformer, whose last norm stands outside of it under the name `norm`.

    Its keys have no bias. One would add the same to each of a query's scores, which softmax takes away again, so that
    ours can be left out when it is written.
    """
    apart = [f"blocks.{i}.attn.qkv" for i in range(config.layers)]
    moved = {f"trunk.{name}.bias" for name in apart} | {"trunk.norm.weight", "trunk.norm.bias"}
    return [
        *(rule for rule in vit_rules(config, prefix=prefix) if rule.ours[0] not in moved),
        *both("trunk.norm", norm),
        *(
            Rule(
                (f"trunk.{name}.bias",),
                (f"{prefix}{name[:-3]}q_bias", ZEROS, f"{prefix}{name[:-3]}v_bias"),
                their_shares=(1, 1, 1),
            )
            for name in apart
        ),
    ]
