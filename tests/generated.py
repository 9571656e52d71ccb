"""A small BLIP of `transformers` with random weights, and its decoder as ours, for tests of the search."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import BlipConfig as HFBlipConfig
from transformers import BlipForConditionalGeneration

from vlm.data.tokenizers import wordpiece
from vlm.data.transforms import ImageTransform
from vlm.models.blip import Blip, BlipConfig
from vlm.models.cache import DecoderState
from vlm.models.transformer import TransformerConfig
from vlm.models.vit import ViTConfig
from vlm.weights.loaded import VisionLanguageModel

PAD, START, END, VOCABULARY = 0, 58, 3, 60
SIZE = 32
EMBEDDINGS = {"tokens": "word_embeddings", "positions": "position_embeddings", "embed_norm": "LayerNorm"}
LAYER = {
    "self_norm": "attention.output.LayerNorm", "cross_norm": "crossattention.output.LayerNorm",
    "mlp_norm": "output.LayerNorm", "up": "intermediate.dense", "down": "output.dense",
}  # fmt: skip
VISION = {
    "trunk.": "", "cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding", "blocks": "encoder.layers", "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection", "norm1": "layer_norm1", "norm2": "layer_norm2",
}  # fmt: skip


def reference(
    seed: int = 0, *, end_bias: float = 2.0, vocabulary: int = VOCABULARY, start: int = START, end: int = END
) -> Any:
    """A captioner of `transformers` whose texts differ from picture to picture and end after some tokens."""
    torch.manual_seed(seed)
    text: dict[str, Any] = dict(
        vocab_size=vocabulary, hidden_size=32, encoder_hidden_size=32, intermediate_size=64, projection_dim=16,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=40,
        bos_token_id=start, eos_token_id=2, pad_token_id=PAD, sep_token_id=end,
    )  # fmt: skip
    vision: dict[str, Any] = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=SIZE, patch_size=8
    )
    model: Any = BlipForConditionalGeneration(HFBlipConfig(text_config=text, vision_config=vision))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
        # Texts would hang on their beginning alone.
        for layer in model.text_decoder.bert.encoder.layer:
            layer.crossattention.output.dense.weight.mul_(2)
        model.text_decoder.cls.predictions.bias[end] += end_bias
    return model.eval()


def network(model: Any) -> Blip:
    """The same captioner as our own network, tensor by tensor."""
    text, vision = model.config.text_config, model.config.vision_config
    config = BlipConfig(
        image=ViTConfig(
            image_size=vision.image_size, patch_size=vision.patch_size, width=vision.hidden_size,
            layers=vision.num_hidden_layers, heads=vision.num_attention_heads, mlp_width=vision.intermediate_size,
            norm_eps=vision.layer_norm_eps,
        ),
        text=TransformerConfig(
            vocab_size=text.vocab_size, context_length=text.max_position_embeddings, width=text.hidden_size,
            layers=text.num_hidden_layers, heads=text.num_attention_heads, mlp_width=text.intermediate_size,
            norm_eps=text.layer_norm_eps, cross_layers=tuple(range(text.num_hidden_layers)),
            cross_width=text.encoder_hidden_size,
        ),
        heads=("lm",), dec_id=text.bos_token_id, enc_id=text.bos_token_id + 1,
    )  # fmt: skip
    ours, foreign = Blip(config), model.state_dict()
    found = {}
    for name in ours.state_dict():
        places = _foreign(name)
        found[name] = torch.cat([foreign[place] for place in places])
    ours.load_state_dict(found)
    return ours.eval().requires_grad_(False)


def _foreign(name: str) -> list[str]:
    """The tensors of `transformers` that make one of ours."""
    part, _, rest = name.partition(".")
    leaf = name.rpartition(".")[2]
    if part == "image":
        for ours, theirs in VISION.items():
            rest = rest.replace(ours, theirs)
        return [f"vision_model.{rest.replace('norm.', 'post_layernorm.') if rest.startswith('norm.') else rest}"]
    if part == "lm_head":
        inner = rest if rest == "bias" else f"transform.{rest.replace('norm', 'LayerNorm')}"
        return [f"text_decoder.cls.predictions.{inner}"]
    base, top = "text_decoder.bert", rest.split(".")[0]
    if top in EMBEDDINGS:
        return [f"{base}.embeddings.{EMBEDDINGS[top]}.{leaf}"]
    _, number, module, *inner = rest.split(".")
    layer = f"{base}.encoder.layer.{number}"
    if module in ("self_attn", "cross_attn"):
        place = f"{layer}.{'attention' if module == 'self_attn' else 'crossattention'}"
        kinds = {"q": ["self.query"], "kv": ["self.key", "self.value"], "out": ["output.dense"]}
        return [f"{place}.{kind}.{leaf}" for kind in kinds[inner[-2]]]
    return [f"{layer}.{LAYER[inner[-2] if module == 'mlp' else module]}.{leaf}"]


def stepper(model: Any, pixels: Tensor, *, capacity: int = 0) -> tuple[Callable[[Tensor, DecoderState], Tensor], Any]:
    """Step and state for `vlm.generate` over the pictures, with the weights of `model`."""
    ours = network(model)
    image = ours.decoder_keys_values(ours.image_states(pixels).states)

    def step(tokens: Tensor, state: DecoderState) -> Tensor:
        return ours.decode(tokens, image=state.image, cache=state.cache)

    return step, DecoderState(image, capacity=capacity)


def captioner(model: Any, *, name: str = "small") -> VisionLanguageModel:
    """What `vlm.load` would give."""
    transform = ImageTransform(SIZE, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "squash", "bicubic")
    return VisionLanguageModel(network(model), wordpiece(max_length=32), transform, name=name, family="blip")


def pictures(count: int, seed: int = 1) -> Tensor:
    """Random pixels (count, 3, 32, 32), the first ones the same for any count."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(3, SIZE, SIZE, generator=generator) * 2 for _ in range(count)])
