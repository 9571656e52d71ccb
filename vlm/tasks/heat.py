"""Where a model looked: heat of each patch, by what the model's parts can tell. Tensors in, tensors out.

``grad-cam``: cross-attention times its gradient (ALBEF §4.6, figure 4). ``plan``: the word-patch transport plan
(ViLT, figure 4) times the cosine of word and patch; the plan alone gives every patch the same mass over all words, and
a lone word's is even. ``cam``: the cosine split into what each patch adds (arXiv 1512.04150), exact where the image's
feature is the mean of its patches, and for no other. ``rollout``: attention multiplied through an image encoder's
layers (arXiv 2005.00928); it knows nothing of the text, so it is the same for all. ``relevance``: rollout with each
attention weighted by its gradient towards the cosine with the text, or towards the matched logit where words and
patches share the layers (arXiv 2103.15679).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from vlm.errors import ConfigError, MissingVerbError, nearest
from vlm.models.attention import Attention
from vlm.objectives.wpa import cosine_cost
from vlm.weights.loaded import VisionLanguageModel

METHODS = ("grad-cam", "plan", "cam", "relevance", "rollout")
"""In the order in which `choose_method` prefers them."""
MIDDLE = 0
"""For the middle one of the fusion layers: the third of six, which ALBEF's figures show (§4.6)."""
MATCHED = 1


def methods(model: VisionLanguageModel) -> list[str]:
    """The methods that a model's parts allow, the best first."""
    network: Any = model.network
    trunk = getattr(getattr(network, "image", None), "trunk", None)
    # What queries make of an image is no pooled state of it.
    encodes = model.can("encode_image") and hasattr(trunk, "blocks") and hasattr(network.config, "image_pool")
    can = {
        "grad-cam": model.can("match_states") and hasattr(network, "text"),
        "plan": hasattr(network, "word_patch_plan"),
        "cam": encodes and network.config.image_pool == "mean",
        "relevance": encodes or _joint(network),
        "rollout": encodes,
    }
    return [name for name in METHODS if can[name]]


def choose_method(model: VisionLanguageModel, method: str = "auto") -> str:
    """The method, or a model's best for ``auto``.

    Raises ConfigError for an unknown name, MissingVerbError when the model can't.
    """
    if method not in (*METHODS, "auto"):
        raise ConfigError(f"method {method!r}{nearest(method, METHODS)}: expected auto, {', '.join(METHODS)}")
    able = methods(model)
    if not able:
        raise MissingVerbError(
            f"{model.name} is {model.kind} without a part that tells where it looks; CLIP's own ViT, ViLT "
            "and ALBEF can be explained"
        )
    if method != "auto" and method not in able:
        raise MissingVerbError(f"{model.name} is {model.kind} and has no {method}; it has {', '.join(able)}")
    return able[0] if method == "auto" else method


def heat(
    model: VisionLanguageModel,
    pixels: Tensor,
    tokens: Mapping[str, Tensor],
    *,
    method: str = "auto",
    layer: int = MIDDLE,
) -> Tensor:
    """Heat of each patch for each token, or for each text as a whole.

    Args:
        model: from `vlm.load`.
        pixels: (1, 3, H, W) of one picture.
        tokens: `input_ids` and `attention_mask`, each (1, L); for the methods behind `plan` (T, L).
        method: see `METHODS`.
        layer: of the fusion layers, from 1, for `grad-cam` alone; `MIDDLE` for the middle one. Behind the last one
            words no longer meet, so that there only the first token has heat.

    Returns:
        (L, h, w) at least 0 for `grad-cam` and `plan`, a map of each token; (T, h, w) for the others, a map of
        each text.

    Raises:
        ConfigError: for an unknown method, a layer that isn't there, and one for a method that has no use for it.
        MissingVerbError: when the model can't.
    """
    method, network = choose_method(model, method), cast(Any, model.network)
    if layer != MIDDLE and method != "grad-cam":
        raise ConfigError(
            f"layer {layer} (--layer): chooses a fusion layer for grad-cam alone, and here the method is {method}; "
            "leave it out, or choose grad-cam with a model that has it"
        )
    if method == "grad-cam":
        found = grad_cam(network, pixels, tokens, layer=layer)  # (L, N)
    elif method == "plan":
        found = weighed_plan(network, pixels, tokens)  # (L, N)
    elif method == "cam":
        found = patch_shares(network, pixels, tokens)  # (T, N)
    elif _joint(network):
        found = joint_relevance(network, pixels, tokens)  # (T, N)
    else:
        found = rollout(network, pixels, tokens if method == "relevance" else None)  # (T or 1, N)
        found = found.expand(len(tokens["input_ids"]), -1)
    return _placed(found, network, pixels)


@torch.no_grad()
def query_attention(model: VisionLanguageModel, pixels: Tensor, *, layer: int = MIDDLE) -> Tensor:
    """Where each query of a Q-Former looks: its cross-attention, meaned over heads (BLIP-2 §3.1).

    Args:
        model: either step of BLIP-2, from `vlm.load`.
        pixels: (1, 3, H, W) of one picture.
        layer: of those that look at the image, from 1; `MIDDLE` for the middle one.

    Returns:
        (Q, h, w) shares; what is missing to 1 goes to the image's first state, [CLS].

    Raises:
        ConfigError: for a layer that isn't there.
        MissingVerbError: when the model has no Q-Former, or one that reads a picture for a text.
    """
    network: Any = model.network
    if not hasattr(network, "qformer") or network.qformer.config.instructed:
        raise MissingVerbError(f"{model.name} is {model.kind}; only BLIP-2's queries look at a picture by themselves")
    chosen = _cross(network.qformer.text.layers, layer)
    with _cross_attention(chosen) as maps:
        network.qformer.queries(network.look(pixels))
    return _placed(maps[0][0].mean(dim=0), network, pixels)


def grad_cam(network: Any, pixels: Tensor, tokens: Mapping[str, Tensor], *, layer: int = MIDDLE) -> Tensor:
    """(L, N): relu of the matched logit's gradient, times the cross-attention, meaned over heads."""
    chosen = _cross(network.text.layers, layer)
    with torch.enable_grad(), _cross_attention(chosen) as maps:
        image, text = network.image_states(pixels).states, network.text_states(tokens)
        logits = network.match_states(text.states, text.mask, network.image_keys_values(image))  # (1, 2)
        (gradient,) = torch.autograd.grad(logits[:, MATCHED].sum(), maps)  # (1, H, L, N)
    return (maps[0].detach() * gradient.clamp(min=0))[0].mean(dim=0)


@torch.no_grad()
def weighed_plan(network: Any, pixels: Tensor, tokens: Mapping[str, Tensor]) -> Tensor:
    """(L, N): how much of each word goes to each patch, times their cosine, what is negative left out."""
    fused = network.fuse(pixels, tokens)
    similarity = 1 - cosine_cost(fused.words, fused.patches)  # (1, L, N)
    return (network.word_patch_plan(pixels, tokens) * similarity.clamp(min=0))[0]


def joint_relevance(network: Any, pixels: Tensor, tokens: Mapping[str, Tensor]) -> Tensor:
    """(T, N): what the first word, from which a pair is judged, takes from each patch (2103.15679 eq. 5 and 6)."""
    found = []
    for ids, real in zip(tokens["input_ids"], tokens["attention_mask"].bool(), strict=True):
        alone = {"input_ids": ids[real][None], "attention_mask": real[real][None]}
        with torch.enable_grad(), _self_attention(block.attn for block in network.image.trunk.blocks) as maps:
            gradients = torch.autograd.grad(network.match(pixels, alone)[:, MATCHED].sum(), maps)
        found.append(_flow(maps, gradients)[:, 0, int(real.sum()) :])
    return torch.cat(found)


@torch.no_grad()
def patch_shares(network: Any, pixels: Tensor, tokens: Mapping[str, Tensor]) -> Tensor:
    """(T, N): what each patch adds to the cosine with each text, what is negative left out."""
    patches = network.image_projection(network.image(pixels))[0]  # (N, D), not of unit norm: their mean is scaled
    return (network.encode_text(tokens) @ patches.T).clamp(min=0)


def rollout(network: Any, pixels: Tensor, tokens: Mapping[str, Tensor] | None = None) -> Tensor:
    """What the image feature takes from each patch, through all layers.

    Without tokens (1, N), attention alone: each layer is half attention, half the residual (2005.00928 §3).
    With tokens (T, N), each attention weighted by its gradient towards the cosine with each text, what is
    negative left out, and added to what came before (2103.15679 eq. 5 and 6).
    """
    with torch.enable_grad(), _self_attention(block.attn for block in network.image.trunk.blocks) as maps:
        image = network.encode_image(pixels)  # (1, D)
        if tokens is None:
            steps = [0.5 * one.detach().mean(dim=1) + 0.5 * _eye(one) for one in maps]
            return _pooled(network, _product(steps))
        with torch.no_grad():
            texts = network.encode_text(tokens)  # (T, D)
        found = []
        for similarity in (image @ texts.T)[0]:
            gradients = torch.autograd.grad(similarity, maps, retain_graph=True)
            found.append(_pooled(network, _flow(maps, gradients)))
    return torch.cat(found)


def _cross(layers: Iterable[Any], layer: int) -> Attention:
    """The cross-attention of one of the layers that have it, counted from 1. Raises ConfigError if there is none."""
    crosses: list[Attention] = [found.cross_attn for found in layers if found.cross_attn is not None]
    if not 0 <= layer <= len(crosses):
        raise ConfigError(
            f"layer {layer} doesn't exist; the fusion layers are 1 to {len(crosses)}, {MIDDLE} the middle"
        )
    return crosses[(layer or (len(crosses) + 1) // 2) - 1]


def _placed(found: Tensor, network: Any, pixels: Tensor) -> Tensor:
    """Maps (M, N) over an image's states as (M, h, w) over its patches."""
    patch = network.image.config.patch_size
    rows, columns = (side // patch for side in pixels.shape[-2:])
    return found.detach().float()[:, 1:].unflatten(1, (rows, columns))  # [CLS] is no place


def _joint(network: Any) -> bool:
    """Whether words and patches share the image encoder's layers."""
    return hasattr(network, "word_patch_plan") and not hasattr(network, "encode_image")


def _flow(maps: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """(1, N, N) through all layers, the residual's own share left out."""
    pairs = zip(maps, gradients, strict=True)
    steps = [(one.detach() * slope).clamp(min=0).mean(dim=1) + _eye(one) for one, slope in pairs]
    return _product(steps) - _eye(maps[0])


def _product(steps: list[Tensor]) -> Tensor:
    """The layers' (1, N, N) one after the other, the first rightmost."""
    total = steps[0]
    for step in steps[1:]:
        total = step @ total
    return total


def _pooled(network: Any, flow: Tensor) -> Tensor:
    """(1, N) of a flow (1, N, N): the rows that the image feature is pooled from."""
    return flow[:, 1:].mean(dim=1) if network.config.image_pool == "mean" else flow[:, 0]


def _eye(attention: Tensor) -> Tensor:
    return torch.eye(attention.shape[-1], device=attention.device, dtype=attention.dtype)[None]


@contextmanager
def _cross_attention(attention: Attention) -> Iterator[list[Tensor]]:
    """Notes the maps (B, H, L, N) of one of our attentions while it is used; fused kernels don't give them."""
    maps: list[Tensor] = []

    def explicit(module: nn.Module, given: tuple[Any, ...], _: Tensor) -> Tensor:
        x, source, mask = (*given, None)[:3]
        query = attention.q(x).unflatten(-1, (attention.heads, -1)).transpose(1, 2)  # (B, H, L, D / H)
        scores = query @ source.keys.transpose(-2, -1) * query.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        maps.append(_tracked(scores.softmax(dim=-1)))
        return attention.out((maps[-1] @ source.values).transpose(1, 2).flatten(2))

    hook = attention.register_forward_hook(explicit)
    try:
        yield maps
    finally:
        hook.remove()


@contextmanager
def _self_attention(attentions: Iterable[Any]) -> Iterator[list[Tensor]]:
    """Notes the maps (B, H, N, N) of timm's attentions, which give them to their dropout when not fused."""
    maps: list[Tensor] = []
    kept = [(attention, attention.fused_attn) for attention in attentions]
    hooks = [
        attention.attn_drop.register_forward_hook(lambda _, __, weights: maps.append(_tracked(weights)))
        for attention, _ in kept
    ]
    for attention, _ in kept:
        attention.fused_attn = False
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()
        for attention, fused in kept:
            attention.fused_attn = fused


def _tracked(weights: Tensor) -> Tensor:
    """The same tensor with a gradient, also where all weights are frozen."""
    return weights if weights.requires_grad else weights.requires_grad_()
