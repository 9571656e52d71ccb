"""The Q-Former (BLIP-2, arXiv 2301.12597 §3.1): learned queries that read an image, beside texts that don't.

It is a setting of the one transformer. Queries and words share the self-attention of each layer and have a
feed-forward each; in every other layer the queries, and they alone, look at the image. What queries and words see of
each other is a mask: `unimodal` for ITC, `bidirectional` for ITM, `multimodal_causal` for ITG (figure 2).

ITC runs each side alone and ITG the queries first, then the words upon the queries' kept keys and values: the same
numbers as with the mask, at less cost, and the queries' pass serves both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.errors import ConfigError
from vlm.models.cache import KeyValues, KVCache
from vlm.models.heads import MlmHead, no_head
from vlm.models.pairing import Keys
from vlm.models.transformer import Transformer, TransformerConfig


def _text() -> TransformerConfig:
    return TransformerConfig(
        vocab_size=30523,
        width=768,
        layers=12,
        heads=12,
        mlp_width=3072,
        cross_layers=tuple(range(0, 12, 2)),
        cross_width=768,
    )


@dataclass(frozen=True)
class QFormerConfig:
    """Sizes and roles of a Q-Former; defaults as in the paper, but for the image encoder's width."""

    text: TransformerConfig = field(default_factory=_text)
    """The transformer of queries and words. `cross_layers` are those where queries look at the image (officially
    every other one from 0), `cross_width` is the width of the image states (EVA-CLIP-g: 1408); `mlp_routes` follow
    from `vocab_size`. `vocab_size` 0 leaves out everything that words need: stage 2's Q-Former."""
    queries: int = 32
    """Learned queries, and so rows that an image becomes."""
    speaks: bool = True
    """Whether there is a head that says the next token (ITG)."""
    instructed: bool = False
    """Whether the queries read the image for a text: instruction tokens stand beside them, both see each other, and
    the queries' states go on (InstructBLIP, arXiv 2305.06500 §2.3)."""
    dec_id: int = 30522
    """Id of [DEC], the first token of a text that is said of an image. Texts that are compared or matched with it keep
    the tokenizer's own, [CLS]."""


def unimodal(mask: Tensor, queries: int) -> Tensor:
    """Queries see queries, words see words (ITC).

    mask: (B, L) true for real tokens. Returns (B, 1, Q + L, Q + L) boolean, true where a row may look; as the others.
    """
    rows, length = mask.shape
    real = mask.bool()
    seen = real.new_zeros(rows, queries + length, queries + length)
    seen[:, :queries, :queries] = True
    seen[:, queries:, queries:] = real[:, None, :]
    return seen[:, None]


def bidirectional(mask: Tensor, queries: int) -> Tensor:
    """Queries and words see each other (ITM, and an instructed Q-Former); arguments as for `unimodal`.

    Of shape (B, 1, 1, Q + L): every row sees the same.
    """
    return F.pad(mask.bool(), (queries, 0), value=True)[:, None, None]


def multimodal_causal(mask: Tensor, queries: int) -> Tensor:
    """Queries see queries; a word sees the queries, itself and the words before it (ITG); as `unimodal`."""
    length = mask.shape[1]
    seen = bidirectional(mask, queries)[:, 0].repeat(1, queries + length, 1)  # (B, Q + L, Q + L)
    seen[:, :queries, queries:] = False
    seen[:, queries:, queries:] &= torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    return seen[:, None]


class QFormer(nn.Module):
    """Learned queries, the transformer that they share with words, and the head that speaks.

    What it looks at is given as image states (P, N, cross width) or as `image_keys_values` of them, which many calls
    can share. P may divide the number of rows B: then each image serves B / P rows that stand together.
    """

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        _check(config)
        self.config = config
        text = config.text
        routes = ("text", "query") if text.vocab_size else ("query",)
        self.query_tokens = nn.Parameter(torch.empty(config.queries, text.width).normal_(std=0.02))  # (Q, D)
        self.text = Transformer(replace(text, mlp_routes=routes))
        self.lm_head: MlmHead | None = None
        if config.speaks:
            self.lm_head = MlmHead(text.width, text.vocab_size, norm_eps=text.norm_eps, act=text.activation)

    @property
    def checkpointing(self) -> bool:
        """Whether layers are recomputed in the backward pass; not those that keep their keys and values."""
        return self.text.checkpointing

    @checkpointing.setter
    def checkpointing(self, enabled: bool) -> None:
        self.text.checkpointing = enabled

    # What goes in

    def image_keys_values(self, states: Tensor) -> Keys:
        """Project image states (P, N, cross width) to the keys and values of each layer; None for those without."""
        return self.text.image_states(states)

    def embed_queries(self, rows: int) -> Tensor:
        """The queries as they enter the first layer, (rows, Q, D): normed as words are, without a position."""
        norm = cast(nn.LayerNorm, self.text.embed_norm)
        return self.text.drop(norm(self.query_tokens)[None].expand(rows, -1, -1))

    # Each side alone (ITC), and the queries for an instruction

    def queries(
        self,
        image: Tensor | Keys,
        *,
        input_ids: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The queries' states (B, Q, D) after the last layer: what goes on to a language model.

        Args:
            image: see the class.
            input_ids: (B, L) instruction tokens, for an instructed Q-Former and for no other.
            mask: (B, L) true for real ones; None where none is padding.
            cache: an empty one that shall keep the queries' keys and values, for `words`.

        Raises:
            ValueError: an instructed Q-Former without an instruction, another one with one.
        """
        if (input_ids is not None) != self.config.instructed:
            wants, got = ("needs", "none was") if self.config.instructed else ("takes no", "one was")
            raise ValueError(f"this Q-Former {wants} input_ids of an instruction, but {got} given")
        if input_ids is not None:
            mask = torch.ones_like(input_ids) if mask is None else mask
            return self.joint(input_ids, mask, image)[:, : self.config.queries]
        keys = self._keys(image)
        x = self.embed_queries(_images(keys))
        return self.text(x, image=keys, cache=cache, queries=self.config.queries)

    def words(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """States (B, L, D) of texts that see no queries, each word all of its text; row 0 is [CLS]'s."""
        return self.text(self.text.embed(input_ids), key_mask=mask)

    # Both sides at once (ITM)

    def joint(
        self, input_ids: Tensor, mask: Tensor, image: Tensor | Keys, *, attention: Tensor | None = None
    ) -> Tensor:
        """States (B, Q + L, D) of queries and words side by side, the queries first.

        Args:
            input_ids: (B, L) as they are.
            mask: (B, L) true for real tokens.
            image: see the class.
            attention: from `unimodal`, `bidirectional` or `multimodal_causal`; None for `bidirectional`.
        """
        queries = self.config.queries
        x = torch.cat([self.embed_queries(len(input_ids)), self.text.embed(input_ids)], dim=1)  # (B, Q + L, D)
        seen = bidirectional(mask, queries) if attention is None else attention
        return self.text(x, mask=seen, image=self._keys(image), queries=queries)

    # Words upon the queries (ITG)

    def spoken(self, input_ids: Tensor, mask: Tensor | None, cache: KVCache) -> Tensor:
        """States (B, L, D) of words that see the queries and what was said before; `say` takes them to logits.

        Args:
            input_ids: (B, L) as they are: [DEC] first, then, with what `cache` got from it, new tokens alone.
            mask: (B, what was said before + L) true for real tokens, padding on the right; None for no padding.
            cache: of `queries` or from `past_of`; extended in place.

        Raises:
            ValueError: the cache holds no queries.
        """
        said = cache.length - self.config.queries
        if said < 0:
            raise ValueError(f"the cache holds {cache.length} rows, not the {self.config.queries} queries; run queries")
        real = None if mask is None else F.pad(mask.bool(), (self.config.queries, 0), value=True)
        return self.text(self.text.embed(input_ids, past=said), key_mask=real, causal=True, cache=cache)

    def say(self, states: Tensor) -> Tensor:
        """Map states (..., D) of `spoken` to logits (..., V) of the token after each."""
        if self.lm_head is None:
            raise no_head("Q-Former", "lm", ())
        return self.lm_head(states, self.text.tokens.weight)

    def decode(self, input_ids: Tensor, *, image: Tensor | Keys, cache: KVCache | None = None) -> Tensor:
        """Logits (B, V) of the token after the given ones.

        Args:
            input_ids: (B, L) as they are: [DEC] and a prompt at first, then, with a cache, the new tokens alone.
            image: see the class; read in the first call alone, in which the queries run.
            cache: keys and values of the queries and of the tokens before, extended in place.
        """
        cache = KVCache() if cache is None else cache
        if not cache.length:
            self.queries(image, cache=cache)
            self._repeat(cache, len(input_ids))
        return self.say(self.spoken(input_ids, None, cache)[:, -1])

    # The queries' keys and values as one tensor, from one part of a training step to the next

    def past(self, cache: KVCache) -> Tensor:
        """What `queries` left in a cache, as (B, layers, 2, H, Q, D / H), with its gradient."""
        return torch.stack([torch.stack(list(cache.layers[i])) for i in range(len(self.text.layers))]).movedim(2, 0)

    def past_of(self, past: Tensor) -> KVCache:
        """A cache for `spoken` from what `past` gave."""
        cache = KVCache()
        for layer, pair in enumerate(past.unbind(1)):
            cache.append(layer, KeyValues(*pair.unbind(1)))
        return cache

    def _keys(self, image: Tensor | Keys) -> Keys:
        return self.image_keys_values(image) if isinstance(image, Tensor) else image

    def _repeat(self, cache: KVCache, rows: int) -> None:
        """Several texts of each image begin with the same queries."""
        held = len(cache.layers[0].keys)
        if rows % held:
            raise ValueError(f"{rows} texts can't share {held} images evenly; repeat texts or images")
        if rows != held:
            device = cache.layers[0].keys.device
            cache.reorder(torch.arange(held, device=device).repeat_interleave(rows // held))


def _images(keys: Sequence[KeyValues | None]) -> int:
    return next(len(pair.keys) for pair in keys if pair is not None)


def _check(config: QFormerConfig) -> None:
    text = config.text
    if config.queries < 1:
        raise ConfigError(f"queries {config.queries}: at least one must read the image")
    if not text.cross_layers:
        raise ConfigError(
            "text.cross_layers is empty: name the layers in which queries look at the image, such as "
            f"{list(range(0, text.layers, 2))}"
        )
    if text.norm != "post" or text.causal or text.self_routes != ("text",):
        raise ConfigError("a Q-Former's text has norm post, causal false, self_routes [text]: masks say what is seen")
    if not text.vocab_size and (config.speaks or config.instructed):
        raise ConfigError("text.vocab_size 0 leaves no words: speaks and instructed must be false then")
    if config.speaks and not 0 <= config.dec_id < text.vocab_size:
        raise ConfigError(f"dec_id {config.dec_id} is not below text.vocab_size {text.vocab_size}, which counts it in")
