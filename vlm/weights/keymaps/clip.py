"""CLIP ViTs as ``transformers`` and as OpenAI and open_clip store them."""

from __future__ import annotations

from dataclasses import dataclass

from vlm.models.clip import ClipConfig
from vlm.weights.rules import Rule, both, same, split_attention

HF_LEFT_OUT = (r".*\.position_ids", r".*\.embeddings\.position_embedding\.position_ids")
OPEN_CLIP_LEFT_OUT = ("input_resolution", "context_length", "vocab_size", "attn_mask", r"text\.attn_mask")


@dataclass(frozen=True)
class Names:
    """How a family calls the parts of a layer, and where the towers' layers are."""

    image_layer: str
    text_layer: str
    norms: tuple[str, str]
    mlp: tuple[str, str]
    out: str
    qkv: tuple[str, ...]
    """Separate query, key and value (with a dot ending), or one fused tensor (with an underscore)."""


HF = Names(
    "vision_model.encoder.layers.{}", "text_model.encoder.layers.{}", ("layer_norm1", "layer_norm2"),
    ("mlp.fc1", "mlp.fc2"), "self_attn.out_proj",
    ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."),
)  # fmt: skip
OPEN_CLIP = Names(
    "visual.transformer.resblocks.{}", "{}transformer.resblocks.{}", ("ln_1", "ln_2"),
    ("mlp.c_fc", "mlp.c_proj"), "attn.out_proj", ("attn.in_proj_",),
)  # fmt: skip


def hf_clip_rules(config: ClipConfig) -> list[Rule]:
    """Rules for ``transformers`` CLIPModel."""
    image, text = "vision_model", "text_model"
    rules = [
        *_image_ends(config, f"{image}.embeddings.class_embedding", f"{image}.embeddings.position_embedding.weight"),
        same("image.trunk.patch_embed.proj.weight", f"{image}.embeddings.patch_embedding.weight"),
        *both("image.trunk.norm_pre", f"{image}.pre_layrnorm"),
        *both("image.trunk.norm", f"{image}.post_layernorm"),
        same("image_projection.weight", "visual_projection.weight"),
        same("text.tokens.weight", f"{text}.embeddings.token_embedding.weight"),
        same("text.positions.weight", f"{text}.embeddings.position_embedding.weight"),
        *both("text.final_norm", f"{text}.final_layer_norm"),
        same("text_projection.weight", "text_projection.weight"),
        Rule(("log_scale",), ("logit_scale",), shape=(1,), their_shape=()),
    ]
    for i in range(config.image.layers):
        rules += image_layer(i, HF.image_layer.format(i), HF)
    for i in range(config.text.layers):
        rules += _text_layer(i, HF.text_layer.format(i), HF)
    return rules


def open_clip_rules(config: ClipConfig, *, text_prefix: str = "") -> list[Rule]:
    """Rules for OpenAI's and open_clip's names; `text_prefix` is ``text.`` for open_clip's CustomTextCLIP."""
    rules = [
        *_image_ends(config, "visual.class_embedding", "visual.positional_embedding"),
        same("image.trunk.patch_embed.proj.weight", "visual.conv1.weight"),
        *both("image.trunk.norm_pre", "visual.ln_pre"),
        *both("image.trunk.norm", "visual.ln_post"),
        same("image_projection.weight", "visual.proj", transpose=True),
        same("text.tokens.weight", f"{text_prefix}token_embedding.weight"),
        same("text.positions.weight", f"{text_prefix}positional_embedding"),
        *both("text.final_norm", f"{text_prefix}ln_final"),
        same("text_projection.weight", f"{text_prefix}text_projection", transpose=True),
        Rule(("log_scale",), ("logit_scale",), shape=(1,), their_shape=()),
    ]
    for i in range(config.image.layers):
        rules += image_layer(i, OPEN_CLIP.image_layer.format(i), OPEN_CLIP)
    for i in range(config.text.layers):
        rules += _text_layer(i, OPEN_CLIP.text_layer.format(text_prefix, i), OPEN_CLIP)
    return rules


def _image_ends(config: ClipConfig, class_name: str, position_name: str) -> list[Rule]:
    width = config.image.width
    places = (config.image.image_size // config.image.patch_size) ** 2 + 1
    return [
        Rule(("image.trunk.cls_token",), (class_name,), shape=(1, 1, width), their_shape=(width,)),
        Rule(("image.trunk.pos_embed",), (position_name,), shape=(1, places, width), their_shape=(places, width)),
    ]


def image_layer(number: int, theirs: str, names: Names) -> list[Rule]:
    """Rules for layer `number` of our image encoder, which they call `theirs`."""
    ours = f"image.trunk.blocks.{number}"
    rules = [
        Rule(
            (f"{ours}.attn.qkv.{end}",),
            tuple(f"{theirs}.{name}{end}" for name in names.qkv),
            (len(names.qkv),),
            (1,) * len(names.qkv),
        )
        for end in ("weight", "bias")
    ]
    rules += both(f"{ours}.attn.proj", f"{theirs}.{names.out}")
    rules += both(f"{ours}.norm1", f"{theirs}.{names.norms[0]}") + both(f"{ours}.norm2", f"{theirs}.{names.norms[1]}")
    return (
        rules
        + both(f"{ours}.mlp.fc1", f"{theirs}.{names.mlp[0]}")
        + both(f"{ours}.mlp.fc2", f"{theirs}.{names.mlp[1]}")
    )


def _text_layer(number: int, theirs: str, names: Names) -> list[Rule]:
    ours = f"text.layers.{number}"
    if len(names.qkv) == 3:
        rules = split_attention(f"{ours}.self_attn.text", [f"{theirs}.{name[:-1]}" for name in names.qkv])
    else:
        rules = [
            Rule(
                (f"{ours}.self_attn.text.q.{end}", f"{ours}.self_attn.text.kv.{end}"),
                (f"{theirs}.{names.qkv[0]}{end}",),
                (1, 2),
                (3,),
            )
            for end in ("weight", "bias")
        ]
    rules += both(f"{ours}.self_attn.text.out", f"{theirs}.{names.out}")
    rules += both(f"{ours}.self_norm", f"{theirs}.{names.norms[0]}")
    rules += both(f"{ours}.mlp_norm.text", f"{theirs}.{names.norms[1]}")
    return (
        rules
        + both(f"{ours}.mlp.text.up", f"{theirs}.{names.mlp[0]}")
        + both(f"{ours}.mlp.text.down", f"{theirs}.{names.mlp[1]}")
    )
