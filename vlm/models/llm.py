"""A frozen language model behind one small interface: any causal or seq2seq model of ``transformers``.

A text is its start token, what is given of it (a prompt, a question), what is said, and an end token. A causal model
reads [visual prompt; text], or [start token; visual prompt; rest of the text] with `start_first`; a seq2seq one reads
[visual prompt; given; end] in its encoder and says the rest after the start token in its decoder (prefix LM, BLIP-2,
arXiv 2301.12597 §3.3).
Letters in shapes: B rows, R running rows, Q visual tokens, L text length, S both, D width, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class LlmState:
    """What rows keep from token to token: a cache of ``transformers``, and which places of it are padding."""

    def __init__(
        self, cache: Any, first: Tensor, *, mask: Tensor | None = None, memory: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """first: (R, V) logits of the first token. mask: (R, S) true for real tokens, None where all are.
        memory: of a seq2seq model, encoder states (R, S, D) and their mask (R, S)."""
        self.cache, self.mask, self.memory = cache, mask, memory
        self.first: Tensor | None = first
        self.count = len(first)

    def take_first(self) -> Tensor | None:
        """The first token's logits when they are asked for first, then None."""
        first, self.first = self.first, None
        return first

    def reorder(self, rows: Tensor, images: Tensor | None = None) -> None:
        """Keep these rows (R',), which may repeat; each holds its own image's part, so `images` says nothing new."""
        if len(rows) == self.count and torch.equal(rows, torch.arange(self.count, device=rows.device)):
            return
        self.count = len(rows)
        self.cache.reorder_cache(rows)
        if self.mask is not None:
            self.mask = self.mask[rows]
        if self.memory is not None:
            self.memory = (self.memory[0][rows], self.memory[1][rows])


class LanguageModel(nn.Module):
    """A model of ``transformers`` that never learns: without gradient and in eval mode whatever is asked of it."""

    def __init__(self, inner: nn.Module, *, end_id: int, keeps_type: bool = False) -> None:
        """inner: a ``...ForCausalLM`` or ``...ForConditionalGeneration``. end_id: ends a text, and what is given to a
        seq2seq model's encoder. keeps_type: whether its weights keep their type when the network around them changes
        its own."""
        super().__init__()
        self.keeps_type = keeps_type
        self.start_first = False
        """Whether texts of a causal model begin before the visual prompt; see `vlm.models.blip2_llm.LlmConfig`."""
        self.inner = inner.requires_grad_(False).eval()
        self.end_id = end_id
        config: Any = inner.config
        self.config = config
        self.seq2seq = bool(config.is_encoder_decoder)
        self._accepted = frozenset(inspect.signature(inner.forward).parameters)
        # Its name changed within transformers 5.
        self._cache = "cache" if "cache" in self._accepted else "past_key_values"

    @property
    def width(self) -> int:
        """Features of an embedded token."""
        return int(self._table().weight.shape[1])

    @property
    def vocab_size(self) -> int:
        """Rows of the token embedding."""
        return int(self._table().weight.shape[0])

    @property
    def context_length(self) -> int | None:
        """Tokens that a visual prompt and a text can have together; None where nothing bounds them."""
        found = getattr(self.config, "max_position_embeddings", None)
        return int(found) if found and not self.seq2seq else None

    @property
    def checkpointing(self) -> bool:
        """Whether layers are recomputed in the backward pass, which the visual prompt's gradient goes through."""
        return any("forward" in vars(layer) for layer in self._layers())

    @checkpointing.setter
    def checkpointing(self, enabled: bool) -> None:
        for layer in self._layers():
            # Not by their own switch, which does nothing in eval mode.
            vars(layer).pop("forward", None)
            if enabled:
                vars(layer)["forward"] = partial(_recomputed, layer)

    def train(self, mode: bool = True) -> LanguageModel:
        """Stay in eval mode."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LanguageModel:
        # What `Module.to` and its like go through.
        if not self.keeps_type:
            return super()._apply(fn, recurse)
        return super()._apply(lambda tensor: _typed(fn(tensor), tensor.dtype), recurse)

    def embed(self, ids: Tensor) -> Tensor:
        """Embed ids (B, L) as (B, L, D)."""
        return self._table()(ids)

    def logits(self, visual: Tensor, ids: Tensor, mask: Tensor, given: Tensor | None = None) -> Tensor:
        """Logits (B, L, V) of the token after each token.

        Args:
            visual: (B, Q, D) visual prompt.
            ids: (B, L) texts, padded behind their end.
            mask: (B, L) true for real tokens.
            given: (B,) leading tokens of each text that are read and not said, the start token counted; None for it
                alone. A seq2seq model has no logits after those but the last: they are 0.
        """
        mask = mask.bool()
        if self.seq2seq:
            return self._seq2seq_logits(visual, ids, mask, given)
        x, seen = self._joined(visual, ids, mask)
        found = self._run(inputs_embeds=x, **self._places(seen), use_cache=False, logits_to_keep=ids.shape[1])
        return found.logits[:, -ids.shape[1] :]

    def begin(self, visual: Tensor, ids: Tensor, mask: Tensor) -> LlmState:
        """Read a visual prompt (B, Q, D) and how each text begins, (B, L) with its mask, at once.

        Shorter rows of a causal model are padded before their visual prompt, so that all go on at one place; neither
        attention nor positions see the padding.
        """
        from transformers import DynamicCache

        if self.seq2seq:
            return self._begin_seq2seq(visual, ids, mask.bool())
        x, seen = self._joined(visual, ids, mask.bool())
        padded = not bool(seen.all())
        if padded:
            x, seen = _pushed_right(x, seen)
        cache = DynamicCache(config=self.config)
        found = self._run(
            inputs_embeds=x, **self._places(seen if padded else None), use_cache=True, logits_to_keep=1,
            **{self._cache: cache},
        )  # fmt: skip
        return LlmState(cache, found.logits[:, -1], mask=seen if padded else None)

    def step(self, ids: Tensor, state: LlmState) -> Tensor:
        """Logits (R, V) of the token after the new ones (R, 1); extends the state."""
        inputs: dict[str, Any] = {self._cache: state.cache, "use_cache": True}
        if state.memory is not None:
            inputs |= {"encoder_outputs": (state.memory[0],), "attention_mask": state.memory[1].long()}
            return self._run(decoder_input_ids=ids, **inputs).logits[:, -1]
        if state.mask is not None:
            state.mask = torch.cat([state.mask, torch.ones_like(ids, dtype=torch.bool)], dim=1)  # (R, S + 1)
            inputs |= {"attention_mask": state.mask.long(), "position_ids": state.mask.sum(dim=1, keepdim=True) - 1}
        return self._run(input_ids=ids, **inputs, logits_to_keep=1).logits[:, -1]

    def _layers(self) -> list[nn.Module]:
        """The repeated layers that ``transformers`` says can be recomputed."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        return [module for module in self.inner.modules() if isinstance(module, GradientCheckpointingLayer)]

    def _table(self) -> Any:
        return self.inner.get_input_embeddings()  # type: ignore[operator]

    def _run(self, **inputs: Any) -> Any:
        """The model on those inputs that it knows; others, such as positions for T5, follow from the mask."""
        return self.inner(**{name: value for name, value in inputs.items() if name in self._accepted}, return_dict=True)

    def _joined(self, visual: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, Q + L, D) states and their mask."""
        words = self.embed(ids)
        ones = mask.new_ones(visual.shape[:2])
        before = int(self.start_first)
        x = torch.cat([words[:, :before], visual.to(words.dtype), words[:, before:]], dim=1)
        return x, torch.cat([mask[:, :before], ones, mask[:, before:]], dim=1)

    def _places(self, mask: Tensor | None) -> dict[str, Tensor]:
        """Mask and positions as keywords; without padding the model's own are right, and its attention is faster."""
        if mask is None or bool(mask.all()):
            return {}
        return {"attention_mask": mask.long(), "position_ids": (mask.long().cumsum(dim=1) - 1).clamp(min=0)}

    def _seq2seq_logits(self, visual: Tensor, ids: Tensor, mask: Tensor, given: Tensor | None) -> Tensor:
        read = torch.ones_like(ids[:, 0]) if given is None else given  # (B,)
        place = torch.arange(ids.shape[1], device=ids.device)[None]  # (1, L)
        x, seen = self._read(visual, ids, place < read[:, None])
        # The decoder's token number j > 0 is the text's number j + read - 1; its number 0 is the start token.
        source = (place + read[:, None] - 1).clamp(max=ids.shape[1] - 1)  # (B, L)
        said = torch.cat([ids[:, :1], ids.gather(1, source)[:, 1:]], dim=1)
        real = mask.gather(1, source) & (place + read[:, None] - 1 < ids.shape[1])
        found = self._run(
            inputs_embeds=x, attention_mask=seen.long(), decoder_input_ids=said, decoder_attention_mask=real.long(),
            use_cache=False,
        ).logits  # fmt: skip
        back = (place - read[:, None] + 1)[..., None]  # (B, L, 1): where each text token's logits stand
        spread = found.gather(1, back.clamp(min=0).expand_as(found))
        return spread * (back >= 0)

    def _read(self, visual: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What an encoder reads: visual prompt, what is given without its start token, and the end token."""
        last = mask.sum(dim=1)  # (B,)
        room = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=self.end_id)  # (B, L)
        place = torch.arange(room.shape[1], device=ids.device)[None]
        room = torch.where(place == last[:, None] - 1, self.end_id, room)
        real = place < last[:, None]
        length = int(last.max())
        return self._joined(visual, room[:, :length], real[:, :length])

    def _begin_seq2seq(self, visual: Tensor, ids: Tensor, mask: Tensor) -> LlmState:
        from transformers import DynamicCache, EncoderDecoderCache

        x, seen = self._read(visual, ids, mask)
        cache = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        memory = self.inner.get_encoder()(inputs_embeds=x, attention_mask=seen.long()).last_hidden_state  # type: ignore[operator]
        found = self._run(
            encoder_outputs=(memory,), attention_mask=seen.long(), decoder_input_ids=ids[:, :1], use_cache=True,
            **{self._cache: cache},
        )  # fmt: skip
        return LlmState(cache, found.logits[:, -1], memory=(memory, seen))


def _recomputed(layer: nn.Module, *inputs: Any, **named: Any) -> Any:
    forward = partial(type(layer).forward, layer)
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    return checkpoint(forward, *inputs, use_reentrant=False, **named)


def _typed(tensor: Tensor, kept: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is kept else tensor.to(kept)


def prompt_of(tokens: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """How texts begin, ids and mask (B, L): what a tokenizer gives without its end token."""
    return tokens["input_ids"][:, :-1], tokens["attention_mask"][:, 1:].bool()


def _pushed_right(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (B, S, D) padded behind, with their padding before them instead."""
    length = mask.shape[1]
    shift = length - mask.sum(dim=1, keepdim=True)  # (B, 1)
    place = torch.arange(length, device=x.device)[None] - shift  # (B, S)
    return x.gather(1, place.clamp(min=0)[..., None].expand_as(x)), place >= 0
