"""The one text transformer; CLIP's text tower, ALBEF's text and fusion, MED and Q-Former are settings of it.

A layer is self-attention, optional cross-attention to image states, and a feed-forward. Two things may come
in several routes inside a layer, each tensor stored once: self-attention (BLIP's encoder and decoder share
all but it, arXiv 2201.12086 §3.1) and the feed-forward (the Q-Former's queries have their own,
arXiv 2301.12597 §3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlm.errors import ConfigError, nearest
from vlm.models.attention import Attention, Real, attention_mask, real_tokens
from vlm.models.cache import KeyValues, KVCache

Looked = KeyValues | tuple[KeyValues, KeyValues]
"""What a layer looks at: one image, or two of them (`TransformerConfig.cross_twin`)."""
_ACTIVATIONS = ("gelu", "quick_gelu", "gelu_tanh")


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and settings of a text transformer."""

    vocab_size: int = 30522
    """Rows of the token embedding; 0 for a transformer without words, such as a Q-Former of queries alone."""
    context_length: int = 512
    """Longest text, in tokens, that has a position embedding."""
    width: int = 384
    """Features of a token."""
    layers: int = 6
    heads: int = 12
    mlp_width: int = 1536
    """Hidden features of the feed-forward."""
    causal: bool = False
    """Whether a token sees only itself and what stands before it, unless a call says otherwise."""
    norm: Literal["pre", "post"] = "post"
    """`pre` as in CLIP (with a final norm), `post` as in BERT (with a norm on the embeddings)."""
    activation: Literal["gelu", "quick_gelu", "gelu_tanh"] = "gelu"
    norm_eps: float = 1e-12
    token_types: int = 0
    """Rows of the token-type embedding; 0 for none. BERT has 2, of which a single text uses row 0."""
    cross_layers: tuple[int, ...] = ()
    """Layers that look at image states after their self-attention."""
    cross_width: int = 0
    """Features of those image states; 0 for `width`."""
    cross_shared: tuple[int, ...] = ()
    """Those of `cross_layers` without keys and values of their own: they take what the layer before projects, of
    another image (ALBEF's NLVR2, arXiv 2107.07651 §5)."""
    cross_twin: tuple[int, ...] = ()
    """Those of `cross_layers` that look at two images, through a cross-attention of its own each, and take the mean
    of both (BLIP's NLVR2, arXiv 2201.12086 §5.4)."""
    cross_merged: tuple[int, ...] = ()
    """Those of `cross_twin` that take a linear map of both instead."""
    self_routes: tuple[str, ...] = ("text",)
    """Self-attentions of each layer, with a norm each; a call names the one it takes."""
    mlp_routes: tuple[str, ...] = ("text",)
    """Feed-forwards of each layer; leading query rows take `query` where there is one."""
    dropout: float = 0.0


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function behind a name: exact GELU, its tanh form, or OpenAI's ``x * sigmoid(1.702 x)``."""
    if name == "quick_gelu":
        return lambda x: x * torch.sigmoid(1.702 * x)
    return lambda x: F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


class FeedForward(nn.Module):
    """Two linear maps with an activation between."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.mlp_width)
        self.down = nn.Linear(config.mlp_width, config.width)
        self.act = activation(config.activation)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, L, D) to (B, L, D)."""
        return self.down(self.act(self.up(x)))


class Layer(nn.Module):
    """Self-attention, cross-attention where the layer has one, feed-forward; pre- or post-norm."""

    def __init__(self, config: TransformerConfig, index: int) -> None:
        super().__init__()
        width, drop = config.width, config.dropout
        self.index, self.pre = index, config.norm == "pre"
        self.self_attn = nn.ModuleDict({r: Attention(width, config.heads, dropout=drop) for r in config.self_routes})
        self.self_norm = nn.LayerNorm(width, eps=config.norm_eps)  # of the first route
        others = config.self_routes[1:]  # a norm belongs to its attention: BLIP's routes don't share it either
        self.route_norm = nn.ModuleDict({r: nn.LayerNorm(width, eps=config.norm_eps) for r in others})
        self.cross_attn: Attention | None = None
        if index in config.cross_layers:
            source, own = config.cross_width, index not in config.cross_shared
            self.cross_attn = Attention(width, config.heads, source_width=source, dropout=drop, projects=own)
            self.cross_norm = nn.LayerNorm(width, eps=config.norm_eps)
            if index in config.cross_twin:
                self.cross_other = Attention(width, config.heads, source_width=source, dropout=drop)
                self.cross_other.kv.runs_alone = True  # type: ignore[assignment, union-attr]
                self.cross_merge = nn.Linear(2 * width, width) if index in config.cross_merged else None
            if own:  # it runs in `image_states`, before its layer: sharding must know
                self.cross_attn.kv.runs_alone = True  # type: ignore[assignment, union-attr]
        self.mlp = nn.ModuleDict({r: FeedForward(config) for r in config.mlp_routes})
        self.mlp_norm = nn.ModuleDict({r: nn.LayerNorm(width, eps=config.norm_eps) for r in config.mlp_routes})
        self.drop = nn.Dropout(drop)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        image: Looked | None = None,
        image_mask: Tensor | None = None,
        cache: KVCache | None = None,
        route: str = "text",
        queries: int = 0,
        real: Real | None = None,
    ) -> Tensor:
        """One layer over (B, L, D), or (M, D) of `real` tokens; the arguments are those of `Transformer.forward`."""
        norm = self.self_norm if route not in self.route_norm else cast(nn.LayerNorm, self.route_norm[route])
        x = self._add(x, norm, lambda y: self._look_at_self(y, mask, cache, route, real))
        if self.cross_attn is not None and image is not None:
            seen, rest = (x[:, :queries], x[:, queries:]) if queries else (x, x[:, :0])
            seen = self._add(seen, self.cross_norm, lambda y: self._look_at_image(y, image, image_mask, real))
            x = torch.cat([seen, rest], dim=1) if queries else seen
        if not queries or "query" not in self.mlp:
            return self._feed(x, "text")
        fed = self._feed(x[:, :queries], "query")
        return torch.cat([fed, self._feed(x[:, queries:], "text")], dim=1) if x.shape[1] > queries else fed

    def _add(self, x: Tensor, norm: nn.Module, part: Callable[[Tensor], Tensor]) -> Tensor:
        if self.pre:
            return x + self.drop(part(norm(x)))
        return norm(x + self.drop(part(x)))

    def _feed(self, x: Tensor, route: str) -> Tensor:
        return self._add(x, self.mlp_norm[route], self.mlp[route])

    def _look_at_self(
        self, x: Tensor, mask: Tensor | None, cache: KVCache | None, route: str, real: Real | None
    ) -> Tensor:
        attention = cast(Attention, self.self_attn[route])
        states = attention.keys_values(x, real)
        return attention(x, states if cache is None else cache.append(self.index, states), mask, real=real)

    def _look_at_image(self, x: Tensor, image: Looked, mask: Tensor | None, real: Real | None) -> Tensor:
        cross = cast(Attention, self.cross_attn)
        if isinstance(image, KeyValues):
            return cross(x, image, mask, real=real)
        both = [one(x, kv, mask, real=real) for one, kv in zip((cross, self.cross_other), image, strict=True)]
        return (both[0] + both[1]) / 2 if self.cross_merge is None else self.cross_merge(torch.cat(both, dim=-1))


class Transformer(nn.Module):
    """Token embedding and a stack of layers; see `TransformerConfig` for what it can be set to be."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        _check(config)
        self.config = config
        if config.vocab_size:
            self.tokens = nn.Embedding(config.vocab_size, config.width)
            self.positions = nn.Embedding(config.context_length, config.width)
        self.types = nn.Embedding(config.token_types, config.width) if config.token_types else None
        self.embed_norm = nn.LayerNorm(config.width, eps=config.norm_eps) if config.norm == "post" else None
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width, eps=config.norm_eps) if config.norm == "pre" else None
        self.drop = nn.Dropout(config.dropout)
        self.checkpointing = False
        self.apply(_initialise)

    def embed(self, input_ids: Tensor, *, past: int = 0) -> Tensor:
        """Embed (B, L) token ids, the first of which stands at position `past`, as (B, L, D).

        Raises ValueError when the text is longer than `context_length`.
        """
        end = past + input_ids.shape[1]
        if end > self.config.context_length:
            limit = self.config.context_length
            raise ValueError(f"text of {end} tokens, but context_length is {limit}; truncate it when tokenizing")
        place = torch.arange(past, end, device=input_ids.device)
        x = self.tokens(input_ids) + self.positions(place)  # (B, L, D)
        if self.types is not None:
            x = x + self.types.weight[0]
        return self.drop(x if self.embed_norm is None else self.embed_norm(x))

    def image_states(self, states: Tensor) -> list[KeyValues | None]:
        """Project image states (B, N, cross width) to keys and values, for each layer that looks at them."""
        crosses = (cast(Layer, layer).cross_attn for layer in self.layers)
        return [None if cross is None or cross.kv is None else _settled(cross.keys_values(states)) for cross in crosses]

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        mask: Tensor | None = None,
        causal: bool | None = None,
        image: Sequence[Looked | None] | None = None,
        image_mask: Tensor | None = None,
        cache: KVCache | None = None,
        route: str = "text",
        queries: int = 0,
        layers: slice = slice(None),
    ) -> Tensor:
        """Run the layers over embedded tokens.

        Args:
            x: (B, L, D) from `embed`, or query rows followed by embedded tokens.
            key_mask: (B, past + L) true for real tokens; None when there is no padding.
            mask: boolean, broadcast to (B, H, L, S), instead of the one built from `key_mask` and `causal`.
            causal: overrides the config's.
            image: from `image_states`; None leaves cross-attention out. Its batch may divide B: then each
                image serves B / its batch texts that stand in a row.
            image_mask: boolean, broadcast to (images, H, L, N).
            cache: keys and values of earlier tokens, extended in place.
            route: the self-attention to take.
            queries: leading rows that are queries: only they look at the image, through their own
                feed-forward where there is one.
            layers: the layers to run, such as ``slice(6)`` for ALBEF's text half.

        Returns:
            (B, L, D) states, after the final norm if the last layer was run and there is one; those of padding mean
            nothing.

        Raises:
            ValueError: the config has no self-attention called `route`.
        """
        if route not in self.config.self_routes:
            known = ", ".join(self.config.self_routes)
            raise ValueError(f"unknown route {route!r}{nearest(route, self.config.self_routes)}; it has {known}")
        past = cache.length if cache is not None else 0
        real = None if key_mask is None or cache is not None or queries else real_tokens(key_mask)
        if mask is None:
            causal = self.config.causal if causal is None else causal
            mask = attention_mask(key_mask, length=x.shape[1], past=past, causal=causal, device=x.device)
        x = x if real is None else real.pack(x)
        chosen = cast("list[Layer]", list(self.layers)[layers])
        # Recomputing a layer would extend the cache a second time.
        recompute = self.checkpointing and self.training and torch.is_grad_enabled() and cache is None
        for layer in chosen:
            seen = image[layer.index] if image is not None else None
            run = partial(
                layer, mask=mask, image=seen, image_mask=image_mask, cache=cache, route=route, queries=queries,
                real=real,
            )  # fmt: skip
            x = checkpoint(run, x, use_reentrant=False) if recompute else run(x)
        if self.final_norm is not None and chosen and chosen[-1] is self.layers[-1]:
            x = self.final_norm(x)
        return x if real is None else real.pad(x)


def _settled(pair: KeyValues) -> KeyValues:
    # Read many times without gradient, as in generation: in one piece, a CPU reads them about twice as fast.
    return pair if torch.is_grad_enabled() else KeyValues(pair.keys.contiguous(), pair.values.contiguous())


def _check(config: TransformerConfig) -> None:
    if config.heads < 1 or config.width % config.heads:
        raise ConfigError(f"width {config.width} is not a multiple of heads {config.heads}; change one of them")
    if config.activation not in _ACTIVATIONS:
        hint = nearest(config.activation, _ACTIVATIONS)
        raise ConfigError(f"unknown activation {config.activation!r}{hint}; choose from {', '.join(_ACTIVATIONS)}")
    if config.norm not in ("pre", "post"):
        raise ConfigError(f"unknown norm {config.norm!r}; choose pre or post")
    outside = [i for i in config.cross_layers if not 0 <= i < config.layers]
    if outside:
        raise ConfigError(f"cross_layers {outside} don't exist; layers are numbered 0 to {config.layers - 1}")
    alone = [i for i in config.cross_shared if {i - 1, i} - set(config.cross_layers) or i - 1 in config.cross_shared]
    if alone:
        raise ConfigError(f"cross_shared {alone}: each must be one of cross_layers, behind one that isn't shared")
    if set(config.cross_merged) - set(config.cross_twin) or set(config.cross_twin) - set(config.cross_layers):
        raise ConfigError("cross_merged must be among cross_twin, and these among cross_layers")
    if not config.self_routes:
        raise ConfigError("self_routes is empty; name at least one self-attention, such as text")
    if "text" not in config.mlp_routes and (config.vocab_size or config.mlp_routes != ("query",)):
        raise ConfigError(f"mlp_routes {config.mlp_routes} lacks text, the feed-forward that tokens take")


def _initialise(module: nn.Module) -> None:
    # BERT's and GPT's start; CLIP's own scaled one differs little at these depths.
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
