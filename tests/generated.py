"""A small BLIP of `transformers` with random weights, and its decoder as ours, for tests of the search."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import BlipConfig, BlipForConditionalGeneration

from vlm.models.cache import DecoderState
from vlm.models.heads import MlmHead
from vlm.models.transformer import Transformer, TransformerConfig

PAD, START, END, VOCABULARY = 0, 58, 3, 60
SIZE = 32


def reference(seed: int = 0, *, end_bias: float = 2.0) -> Any:
    """A captioner of `transformers` whose texts differ from picture to picture and end after some tokens."""
    torch.manual_seed(seed)
    text: dict[str, Any] = dict(
        vocab_size=VOCABULARY, hidden_size=32, encoder_hidden_size=32, intermediate_size=64, projection_dim=16,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=40,
        bos_token_id=START, eos_token_id=2, pad_token_id=PAD, sep_token_id=END,
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
        model.text_decoder.cls.predictions.bias[END] += end_bias
    return model.eval()


def decoder(model: Any) -> tuple[Transformer, MlmHead]:
    """The text decoder of a BLIP of `transformers` as our own networks, tensor by tensor."""
    sizes = model.config.text_config
    layers = tuple(range(sizes.num_hidden_layers))
    network = Transformer(
        TransformerConfig(
            vocab_size=sizes.vocab_size,
            context_length=sizes.max_position_embeddings,
            width=sizes.hidden_size,
            layers=len(layers),
            heads=sizes.num_attention_heads,
            mlp_width=sizes.intermediate_size,
            causal=True,
            norm_eps=sizes.layer_norm_eps,
            cross_layers=layers,
            cross_width=sizes.encoder_hidden_size,
        )
    )
    head = MlmHead(sizes.hidden_size, sizes.vocab_size, norm_eps=sizes.layer_norm_eps)
    foreign = model.text_decoder.state_dict()
    network.load_state_dict({name: _tensor(foreign, name) for name in network.state_dict()})
    predictions = "cls.predictions"
    head.load_state_dict(
        {
            "dense.weight": foreign[f"{predictions}.transform.dense.weight"],
            "dense.bias": foreign[f"{predictions}.transform.dense.bias"],
            "norm.weight": foreign[f"{predictions}.transform.LayerNorm.weight"],
            "norm.bias": foreign[f"{predictions}.transform.LayerNorm.bias"],
            "bias": foreign[f"{predictions}.bias"],
        }
    )
    return network.eval(), head.eval()


def _tensor(foreign: dict[str, Tensor], name: str) -> Tensor:
    heads = {"tokens": "word_embeddings", "positions": "position_embeddings", "embed_norm": "LayerNorm"}
    part, _, rest = name.partition(".")
    if part in heads:
        return foreign[f"bert.embeddings.{heads[part]}.{rest}"]
    _, number, module, *inner = name.split(".")
    layer, leaf = f"bert.encoder.layer.{number}", name.rpartition(".")[2]
    if module in ("self_attn", "cross_attn"):
        place = f"{layer}.{'attention' if module == 'self_attn' else 'crossattention'}"
        kind = inner[-2]
        if kind == "kv":
            return torch.cat([foreign[f"{place}.self.{one}.{leaf}"] for one in ("key", "value")])
        return foreign[f"{place}.self.query.{leaf}" if kind == "q" else f"{place}.output.dense.{leaf}"]
    places = {
        "self_norm": "attention.output.LayerNorm", "cross_norm": "crossattention.output.LayerNorm",
        "mlp_norm": "output.LayerNorm", "up": "intermediate.dense", "down": "output.dense",
    }  # fmt: skip
    return foreign[f"{layer}.{places[inner[-2] if module == 'mlp' else module]}.{leaf}"]


def stepper(model: Any, pixels: Tensor, *, capacity: int = 0) -> tuple[Callable[[Tensor, DecoderState], Tensor], Any]:
    """Step and state for `vlm.generate` over the pictures, with the weights of `model`."""
    network, head = decoder(model)
    with torch.no_grad():
        image = network.image_states(model.vision_model(pixels).last_hidden_state)

    def step(tokens: Tensor, state: DecoderState) -> Tensor:
        x = network.embed(tokens, past=state.cache.length)
        x = network(x, image=state.image, cache=state.cache)
        return head(x[:, -1], network.tokens.weight)

    return step, DecoderState(image, capacity=capacity)


def pictures(count: int, seed: int = 1) -> Tensor:
    """Random pixels (count, 3, 32, 32), the first ones the same for any count."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(3, SIZE, SIZE, generator=generator) * 2 for _ in range(count)])
