"""Greedy, beam and nucleus search over ``step(tokens, state) -> logits``; knows no model.

What a setting means, down to ties, is what `transformers` means by it. A row is never padded: prompts of
different lengths are fed token by token from the shortest one's end, so what stands beside a row can't change it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from vlm.errors import ConfigError, nearest

STRATEGIES = ("greedy", "beam", "nucleus")
_NEVER = -1.0e9
"""Score of what can't be chosen; finite, so that it can still be added to."""


class State(Protocol):
    """What the step keeps between tokens, such as `vlm.models.cache.DecoderState`."""

    def reorder(self, rows: Tensor, images: Tensor | None = None) -> None:
        """Keep these rows, which may repeat, and these images (None: all); an image's rows stand together."""


Step = Callable[[Tensor, Any], Tensor]
"""(new tokens (R, L), state) to the logits (R, V) of the token after the last; extends the state."""


@dataclass(frozen=True)
class GenerationConfig:
    """How texts are searched for."""

    strategy: Literal["greedy", "beam", "nucleus"] = "beam"
    """The likeliest token each time; the likeliest texts by beam search; or drawn tokens (arXiv 1904.09751)."""
    beams: int = 3
    """Texts that beam search follows at once."""
    sequences: int = 1
    """Texts for each image: the best beams, or so many draws; greedy has one."""
    max_new_tokens: int = 20
    """Longest text, the prompt not counted, the end token counted."""
    min_new_tokens: int = 0
    """Tokens before which the end token isn't taken, the prompt not counted."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that were there, prompt included, less likely (arXiv 1909.05858 §4.1)."""
    no_repeat_ngram: int = 0
    """No run of so many tokens comes twice, prompt included; 0 for no such rule."""
    length_penalty: float = 1.0
    """A finished beam's log-probability is divided by its length to this power: above 0 favours longer texts."""
    early_stopping: Literal[True, False, "never"] = False
    """When an image is done: with as many finished texts as beams (true), when a better one is unlikely (false),
    or impossible ("never")."""
    top_p: float = 0.9
    """Nucleus: the fewest likeliest tokens that together reach this probability are drawn from."""
    top_k: int = 0
    """Nucleus: and no more tokens than these; 0 for no such bound."""
    temperature: float = 1.0
    """Nucleus: logits are divided by it."""

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            hint = nearest(str(self.strategy), STRATEGIES)
            raise ConfigError(f"unknown strategy {self.strategy!r}{hint}; choose from {', '.join(STRATEGIES)}")
        least = {"beams": 1, "sequences": 1, "max_new_tokens": 1, "min_new_tokens": 0, "no_repeat_ngram": 0, "top_k": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < bound:
                raise ConfigError(f"{name} must be a whole number of at least {bound}, got {value!r}")
        for name in ("repetition_penalty", "temperature", "top_p"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)!r}")
        if self.top_p > 1:
            raise ConfigError(f"top_p is a probability, at most 1, got {self.top_p!r}")
        if self.early_stopping not in (True, False, "never"):
            raise ConfigError(f"early_stopping must be true, false or never, got {self.early_stopping!r}")
        if self.min_new_tokens >= self.max_new_tokens:
            raise ConfigError(f"min_new_tokens {self.min_new_tokens} must be below max_new_tokens")
        most = {"greedy": 1, "beam": self.beams}.get(self.strategy)
        if most is not None and self.sequences > most:
            raise ConfigError(f"sequences {self.sequences}: {self.strategy} search gives {most} at most; use nucleus")


class Generated(NamedTuple):
    """Texts of each image, best first."""

    ids: Tensor
    """(B, sequences, L) new tokens: the prompt left out, the end token included, then padding."""
    lengths: Tensor
    """(B, sequences) tokens of each, the end token counted."""
    scores: Tensor | None = None
    """(B, sequences) log-probability over length to the power of the penalty; beam search only."""


def generate(
    step: Step,
    state: State,
    prompt: Mapping[str, Tensor],
    config: GenerationConfig,
    *,
    end_id: int,
    pad_id: int,
    draws: Tensor | None = None,
) -> Generated:
    """Search for the texts of some images.

    Args:
        step: see `Step`. Called first with a row for each image, later with several of them; an image whose
            texts are all finished is left out from then on.
        state: what `step` keeps.
        prompt: `input_ids` and `attention_mask` (B, P): at least one token a row, then padding.
        config: the settings.
        end_id: token that ends a text. pad_id: what stands behind it in the result.
        draws: (B, sequences, at least max_new_tokens) uniform numbers in [0, 1), for nucleus sampling: number i
            decides the i-th new token of its row and nothing else.

    Raises:
        ConfigError: nucleus sampling without enough draws, or a vocabulary too small for the beams.
        ValueError: a prompt without tokens, or padded before them.
    """
    ids, mask = prompt["input_ids"], prompt["attention_mask"].bool()
    lengths = mask.sum(dim=1)
    if not len(ids) or not bool(mask[:, 0].all()) or bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError("each prompt must begin with a token and be padded, if at all, behind its last one")
    rows = _Rows(ids, lengths, end_id, pad_id)
    if config.strategy == "beam" and config.beams > 1:
        return _beams(step, state, rows, config)
    if config.strategy == "nucleus":
        shape = (len(ids), config.sequences, config.max_new_tokens)
        if draws is None or draws.shape[:2] != shape[:2] or draws.shape[2] < shape[2]:
            given = None if draws is None else tuple(draws.shape)
            raise ConfigError(f"nucleus sampling needs draws of shape {shape}, got {given}")
        draws = draws.flatten(0, 1).to(ids.device)
    return _one_by_one(step, state, rows, config, draws if config.strategy == "nucleus" else None)


class _Rows(NamedTuple):
    """Prompts, and the tokens that mean something."""

    ids: Tensor  # (B, P)
    lengths: Tensor  # (B,)
    end: int
    pad: int

    def token(self, images: Tensor, place: int) -> Tensor:
        """(n,) the prompts' tokens at a place; anything for a prompt that is shorter."""
        return self.ids[images, min(place, self.ids.shape[1] - 1)]


def constrain(scores: Tensor, seen: Tensor, new: Tensor, config: GenerationConfig, end_id: int) -> Tensor:
    """Apply repetition penalty, n-gram rule and least length to scores (R, V).

    seen: (R, n) tokens so far, prompt included. new: (R,) number of the new token that is now chosen, from 1.
    """
    if config.repetition_penalty != 1.0:
        # A positive logit shrinks by division, a negative one (any log-probability) by multiplication.
        old, penalty = scores.gather(1, seen), config.repetition_penalty
        scores = scores.scatter(1, seen, torch.where(old < 0, old * penalty, old / penalty))
    size = config.no_repeat_ngram
    if size and seen.shape[1] >= size:
        runs = seen.unfold(1, size, 1)  # (R, n - size + 1, size)
        begun = (runs[..., :-1] == seen[:, None, seen.shape[1] - size + 1 :]).all(dim=-1)
        banned = torch.zeros_like(scores).scatter_add_(1, runs[..., -1], begun.to(scores.dtype)) > 0
        scores = scores.masked_fill(banned, -torch.inf)
    if config.min_new_tokens:
        short = new <= config.min_new_tokens  # (R,)
        scores = scores.clone()
        scores[:, end_id] = scores[:, end_id].masked_fill(short, -torch.inf)
    return scores


def draw(logits: Tensor, uniform: Tensor, config: GenerationConfig) -> Tensor:
    """Draw a token (R,) of each row's nucleus from `logits` (R, V) by `uniform` numbers (R,) in [0, 1)."""
    count = min(config.top_k or logits.shape[1], logits.shape[1])
    scaled = logits if config.temperature == 1.0 else logits / config.temperature
    values, tokens = scaled.sort(dim=1, descending=True, stable=True)
    shares = values[:, :count].softmax(dim=1)
    before = shares.cumsum(dim=1) - shares  # (R, count): what the likelier ones reach
    shares = shares.masked_fill(before >= config.top_p, 0.0)
    shares[:, 0] = shares[:, 0].clamp_min(torch.finfo(shares.dtype).tiny)
    ends = shares.cumsum(dim=1)
    # Drawn numbers below the total never fall on a token without a share.
    place = torch.searchsorted(ends, uniform[:, None].to(ends) * ends[:, -1:], right=True)
    last = (shares > 0).sum(dim=1, keepdim=True) - 1
    return tokens.gather(1, torch.minimum(place, last))[:, 0]


def _one_by_one(step: Step, state: State, rows: _Rows, config: GenerationConfig, draws: Tensor | None) -> Generated:
    """A token at a time, the likeliest, or by `draws` (B * K, max_new_tokens)."""
    total, width, device = len(rows.ids), config.sequences, rows.ids.device
    out = rows.ids.new_full((total * width, config.max_new_tokens), rows.pad)
    counts = torch.zeros(total * width, dtype=torch.long, device=device)
    length = int(rows.lengths.min())
    logits = step(rows.ids[:, :length], state)  # (B, V)
    places = torch.arange(total * width, device=device)  # of each running row in the result
    if width > 1:
        state.reorder(places // width)
        logits = logits[places // width]
    seen = rows.ids[places // width, :length]
    done = torch.zeros_like(places, dtype=torch.bool)
    each = width  # rows that each image still has
    while True:
        images = places // width
        new = length + 1 - rows.lengths[images]  # number of the token now chosen; inside the prompt below 1
        scores = constrain(logits.float(), seen, new, config, rows.end)
        if draws is None:
            token = scores.argmax(dim=1)
        else:
            token = draw(scores, draws[places, (new - 1).clamp(0, config.max_new_tokens - 1)], config)
        token = torch.where(new > 0, token, rows.token(images, length))
        writes = ~done & (new > 0)
        out[places[writes], new[writes] - 1] = token[writes]
        counts[places[writes]] = new[writes]
        done |= writes & ((token == rows.end) | (new >= config.max_new_tokens))
        length += 1
        if bool(done.all()):
            longest = int(counts.max())
            return Generated(out[:, :longest].view(total, width, -1), counts.view(total, width))
        seen = torch.cat([seen, token[:, None]], dim=1)
        kept, chosen = _kept(~done.view(-1, each))
        if chosen.numel() < len(done):
            images_left = None if len(kept) * each == len(done) else kept
            state.reorder(chosen.flatten(), images_left)
            places, seen, token, done = (tensor[chosen.flatten()] for tensor in (places, seen, token, done))
            each = chosen.shape[1]
        logits = step(token[:, None], state)


def _kept(live: Tensor) -> tuple[Tensor, Tensor]:
    """Images and, of each, rows (images', each') that go on, of those that are `live` (images, each).

    Images must stay equally wide, to share keys and values: a narrower one is filled with finished rows.
    """
    images = live.any(dim=1).nonzero()[:, 0]
    need = int(live.sum(dim=1).max())
    first = live[images].byte().sort(dim=1, descending=True, stable=True).indices[:, :need]
    return images, images[:, None] * live.shape[1] + first


class _Bank(NamedTuple):
    """Finished texts of each running image, best first; a free slot has the score `_NEVER`."""

    ids: Tensor  # (A, W, max_new_tokens)
    counts: Tensor  # (A, W)
    scores: Tensor  # (A, W)
    taken: Tensor  # (A, W)

    def take(self, images: Tensor | slice, slots: slice = slice(None)) -> _Bank:
        """Some images' part of it."""
        return _Bank(*(tensor[images, slots] for tensor in self))


def _beams(step: Step, state: State, rows: _Rows, config: GenerationConfig) -> Generated:
    """The likeliest texts, `config.beams` followed at once."""
    total, width, device = len(rows.ids), config.beams, rows.ids.device
    length = int(rows.lengths.min())
    logits = step(rows.ids[:, :length], state)  # (B, V): the prompt runs once for all beams of an image
    if logits.shape[1] < 2 * width:
        raise ConfigError(f"beams {width}: a vocabulary of {logits.shape[1]} needs {2 * width} at least; use fewer")
    images = torch.arange(total, device=device)
    state.reorder(images.repeat_interleave(width))
    logits = logits.repeat_interleave(width, dim=0)
    seen = rows.ids[:, None, :length].expand(-1, width, -1)  # (A, W, n)
    written = rows.ids.new_full((total, width, config.max_new_tokens), rows.pad)
    # All beams are alike at first: only the first may be continued.
    scores = torch.full((total, width), _NEVER, device=device)
    scores[:, 0] = 0.0
    bank = _Bank(written, torch.zeros_like(written[..., 0]), torch.full_like(scores, _NEVER), scores > 0)
    result = bank.take(images)
    while True:
        new = length + 1 - rows.lengths[images]  # (A,)
        likely = torch.log_softmax(logits.float(), dim=1)
        likely = constrain(likely, seen.flatten(0, 1), new.repeat_interleave(width), config, rows.end)
        top, beams, tokens = _candidates(
            likely.unflatten(0, (-1, width)), scores, new, rows.token(images, length)
        )  # (A, 2 * W) each
        at = torch.arange(written.shape[2], device=device) == (new - 1)[:, None]  # (A, max_new_tokens)
        texts = torch.where(at[:, None], tokens[..., None], _pick(written, beams))  # (A, 2 * W, max_new_tokens)
        ended = (new > 0)[:, None] & ((tokens == rows.end) | (new >= config.max_new_tokens)[:, None])
        bank = _banked(bank, texts, top, ended, new, config)
        scores, chosen = (top + ended * _NEVER).topk(width)
        done = _finished(bank, scores[:, 0], new, config)
        if bool(done.any()):
            for whole, part in zip(result, bank, strict=True):
                whole[images[done]] = part[done]
        if bool(done.all()):
            ids, counts, best, _ = result.take(slice(None), slice(config.sequences))
            return Generated(ids[..., : int(counts.max())], counts, best)
        live = (~done).nonzero()[:, 0]
        beam, token = beams.gather(1, chosen)[live], tokens.gather(1, chosen)[live]  # (A', W)
        state.reorder((live[:, None] * width + beam).flatten(), None if len(live) == len(images) else live)
        seen = torch.cat([_pick(seen[live], beam), token[..., None]], dim=2)
        written, scores, images, bank = _pick(texts, chosen)[live], scores[live], images[live], bank.take(live)
        length += 1
        logits = step(token.flatten()[:, None], state)


def _candidates(likely: Tensor, scores: Tensor, new: Tensor, forced: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, beams and tokens of each image's best continuations, each (A, 2 * W), likeliest first.

    Twice as many as beams, since one of each beam may end here. Inside a prompt each beam takes the prompt's token.
    likely: (A, W, V). scores: (A, W) of the beams. new, forced: (A,).
    """
    width, vocabulary = likely.shape[1:]
    top, place = (likely + scores[..., None]).flatten(1).topk(2 * width)
    inside = (new <= 0)[:, None]
    same = torch.arange(2 * width, device=scores.device) % width
    kept = torch.cat([scores, torch.full_like(scores, 2 * _NEVER)], dim=1)
    beams = torch.where(inside, same, place // vocabulary)
    return torch.where(inside, kept, top), beams, torch.where(inside, forced[:, None], place % vocabulary)


def _pick(texts: Tensor, places: Tensor) -> Tensor:
    """Texts (A, K, n) at places (A, k)."""
    return texts.gather(1, places[..., None].expand(-1, -1, texts.shape[2]))


def _banked(bank: _Bank, texts: Tensor, scores: Tensor, ended: Tensor, new: Tensor, config: GenerationConfig) -> _Bank:
    """The bank with the candidates that ended, where they are better than what it holds."""
    width = config.beams
    # Those behind the first W only serve to keep W beams running.
    ended = ended & (torch.arange(2 * width, device=ended.device) < width)
    final = scores / _power(new, config)[:, None] + ~ended * _NEVER
    best, chosen = torch.cat([bank.scores, final], dim=1).topk(width)
    counts = torch.cat([bank.counts, new[:, None].expand(-1, 2 * width)], dim=1).gather(1, chosen)
    taken = torch.cat([bank.taken, ended], dim=1).gather(1, chosen)
    return _Bank(_pick(torch.cat([bank.ids, texts], dim=1), chosen), counts, best, taken)


def _finished(bank: _Bank, best: Tensor, new: Tensor, config: GenerationConfig) -> Tensor:
    """(A,) whether an image's texts are final; best: (A,) score of its best running beam."""
    reach = torch.full_like(new, config.max_new_tokens)
    if config.early_stopping != "never" or config.length_penalty <= 0:
        reach = new
    possible = best / _power(reach, config)
    worst = torch.where(bank.taken, bank.scores.amin(dim=1, keepdim=True), _NEVER)
    done = ~(possible[:, None] > worst).any(dim=1)
    if config.early_stopping is True:
        done |= bank.taken.all(dim=1)
    return (done | (new >= config.max_new_tokens)) & (new > 0)


def _power(lengths: Tensor, config: GenerationConfig) -> Tensor:
    return (lengths.clamp_min(1).double() ** config.length_penalty).float()
