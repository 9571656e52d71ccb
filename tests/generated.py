"""A small BLIP of `transformers` with random weights, and its decoder as ours, for tests of the search."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import BlipConfig, BlipForConditionalGeneration

from vlm.data.tokenizers import wordpiece
from vlm.data.transforms import ImageTransform
from vlm.models.blip import Blip
from vlm.models.cache import DecoderState
from vlm.weights.hf_blip import hf_blip_config
from vlm.weights.keymaps.blip import LEFT_OUT, hf_blip_rules, tied
from vlm.weights.loaded import VisionLanguageModel
from vlm.weights.rules import to_ours

PAD, START, END, VOCABULARY = 0, 58, 3, 60
SIZE = 32


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
    model: Any = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
        # Texts would hang on their beginning alone.
        for layer in model.text_decoder.bert.encoder.layer:
            layer.crossattention.output.dense.weight.mul_(2)
        model.text_decoder.cls.predictions.bias[end] += end_bias
    return model.eval()


def network(model: Any) -> Blip:
    """The same captioner as our own network."""
    tensors = model.state_dict()
    config = hf_blip_config(model.config.to_dict(), tensors, where="the reference")
    known = {name: value for name, value in tensors.items() if name not in tied(config)}
    ours = Blip(config)
    ours.load_state_dict(to_ours(known, hf_blip_rules(config), where="the reference", left_out=LEFT_OUT))
    return ours.eval().requires_grad_(False)


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
