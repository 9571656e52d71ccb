"""The space that images and texts meet in, the same for CLIP, ALBEF and BLIP.

Pooling, projection and temperature lead into it; the contrast with a teacher and the draw of hard negatives
take place in it; image and text states are kept beside their features, to be fused later.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.errors import ConfigError, nearest
from vlm.models.stage import Choice, Draws, Taught
from vlm.objectives.distillation import itc_taught
from vlm.objectives.itc import cosines, itc, positives
from vlm.objectives.itm import draw_negatives

IMAGE_POOLS = ("cls", "mean")
TEXT_POOLS = ("cls", "eot", "mean")


class Rows(Protocol):
    """What a stage's encoding reads of a batch."""

    @property
    def pixels(self) -> Tensor:
        """(B, 3, H, W) normalised pixels."""

    @property
    def tokens(self) -> Mapping[str, Tensor]:
        """`input_ids` and `attention_mask`, each (B, L)."""


class Contrasted(Protocol):
    """Settings of a stage that draws what it fuses by a contrast: ALBEF's, BLIP's and BLIP-2's."""

    @property
    def negatives(self) -> str:
        """``hard`` or ``random``."""

    @property
    def hard_share(self) -> float:
        """Share of the rows with a hard negative, where they are hard."""

    @property
    def logit_scale_min(self) -> float:
        """Lower bound of the inverse temperature."""

    @property
    def logit_scale_init(self) -> float:
        """The inverse temperature at the start."""

    @property
    def logit_scale_max(self) -> float:
        """Upper bound of the inverse temperature."""


class Pooled(Protocol):
    """Settings of a stage whose features are pooled states: ALBEF's and BLIP's."""

    @property
    def image_pool(self) -> str:
        """One of `IMAGE_POOLS`."""

    @property
    def text_pool(self) -> str:
        """One of `TEXT_POOLS`."""


@dataclass(frozen=True)
class ImageStates:
    """Images encoded once, to be compared and fused any number of times."""

    features: Tensor
    """(B, D) unit norm, for contrast; (B, Q, D) of BLIP-2's queries."""
    states: Tensor
    """(B, N, D), what a text looks at."""


@dataclass(frozen=True)
class TextStates:
    """Texts encoded once, up to where images come in."""

    features: Tensor
    """(B, D) unit norm, for contrast."""
    states: Tensor
    """(B, L, D) after the layers that see the text alone; where images come in from the first layer on (BLIP), its
    ids (B, L)."""
    mask: Tensor
    """(B, L) true for real tokens."""


def pool_image(states: Tensor, pool: str) -> Tensor:
    """Reduce (B, N, D) states to (B, D): the [CLS] state, or the mean of the patches."""
    check_choice("image_pool", pool, IMAGE_POOLS)
    return states[:, 0] if pool == "cls" else states[:, 1:].mean(dim=1)


def pool_text(states: Tensor, mask: Tensor, pool: str) -> Tensor:
    """Reduce (B, L, D) states to (B, D): the first, the last real one, or the mean of the real ones."""
    check_choice("text_pool", pool, TEXT_POOLS)
    if pool == "cls":
        return states[:, 0]
    if pool == "eot":
        last = mask.sum(dim=1) - 1  # (B,), texts are padded on the right
        return states[torch.arange(len(states), device=states.device), last]
    weight = mask.to(states.dtype)[:, :, None]  # (B, L, 1)
    return (states * weight).sum(dim=1) / weight.sum(dim=1)


def projection(width: int, embed_dim: int, *, bias: bool) -> nn.Linear:
    """The linear map of a tower's pooled states to the common space. Raises ConfigError for a space without width."""
    if embed_dim < 1:
        raise ConfigError(f"embed_dim must be at least 1, got {embed_dim}")
    linear = nn.Linear(width, embed_dim, bias=bias)
    nn.init.normal_(linear.weight, std=width**-0.5)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


def project(pooled: Tensor, linear: nn.Linear) -> Tensor:
    """Map pooled states (B, width) to unit-norm features (B, D)."""
    return F.normalize(linear(pooled), dim=-1)


def log_scale(init: float) -> nn.Parameter:
    """The learned temperature as log of its inverse, (1,): one element, since FSDP2 shards no scalars."""
    if init <= 0:
        raise ConfigError(f"logit_scale_init {init} must be positive; CLIP starts at 14.3")
    return nn.Parameter(torch.tensor([math.log(init)]))


@torch.no_grad()
def clamp_scale_(parameter: Tensor, low: float, high: float) -> None:
    """Keep the inverse temperature within its bounds, given its log."""
    parameter.clamp_(math.log(low), math.log(high))


def contrast(
    features: Mapping[str, Tensor],
    everyone: Mapping[str, Tensor],
    *,
    row_ids: Tensor,
    ids: Tensor,
    taught: Taught | None,
    weight: float,
    smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """What a stage's `contrast` gives: `scale`, the inverse temperature, and `itc` unless its weight is 0."""
    parts = {"scale": features["log_scale"].detach().exp().squeeze(0)}
    if weight:
        parts["itc"] = align(features, everyone, row_ids=row_ids, ids=ids, taught=taught, smoothing=smoothing)
    return parts


def align(
    features: Mapping[str, Tensor],
    everyone: Mapping[str, Tensor],
    *,
    row_ids: Tensor,
    ids: Tensor,
    taught: Taught | None,
    smoothing: float = 0.0,
) -> Tensor:
    """ITC of some rows: against the teacher's features and the queue, or against everyone's where none teaches.

    Arguments as for a stage's `contrast`; smoothing: as for `itc`, without a teacher. Returns a scalar, the mean over
    the rows.
    """
    scale = features["log_scale"].exp()
    if taught is None:
        sides = (features["image"], features["text"], everyone["image"], everyone["text"])
        return itc(*sides, scale=scale, row_ids=row_ids, ids=ids, smoothing=smoothing)
    return itc_taught(
        features["image"],
        features["text"],
        taught_image=taught.rows["image"],
        taught_text=taught.rows["text"],
        images=taught.columns["image"],
        texts=taught.columns["text"],
        scale=scale,
        row_ids=row_ids,
        ids=taught.ids,
        alpha=taught.alpha,
    )


@torch.no_grad()
def draw_partners(
    features: Mapping[str, Tensor],
    everyone: Mapping[str, Tensor],
    *,
    row_ids: Tensor,
    ids: Tensor,
    draws: Draws,
    config: Contrasted,
) -> tuple[dict[str, Tensor], int]:
    """A negative image for each text and a negative text for each image (ALBEF §3.2).

    Arguments as for a stage's `choose`. config: its share of rows have a negative drawn in proportion to the softmax
    of the contrast; for the others each negative is as likely. Returns ``image`` and ``text`` (b,), rows of the joined
    batch, -1 where it holds no negative; and how many pairs ITM then has, the rows' own ones among them.
    """
    hard = config.hard_share if config.negatives == "hard" else 0.0
    positive = positives(row_ids, ids)  # (b, B)
    partners = {}
    for kind, looking in (("image", "text"), ("text", "image")):
        logits = features["log_scale"].exp() * cosines(features[looking], everyone[kind])  # (b, B)
        weights = logits.float().softmax(dim=1) if hard else torch.ones_like(logits)
        if 0 < hard < 1:
            easy = draws(f"{kind} easy", 1).to(logits.device) >= hard  # (b, 1)
            weights = torch.where(easy, 1.0, weights)
        partners[kind] = draw_negatives(weights, positive, draws(kind, 1)[:, 0].to(logits.device))
    return partners, len(row_ids) + sum(int((rows >= 0).sum()) for rows in partners.values())


def choose(
    features: Mapping[str, Tensor],
    everyone: Mapping[str, Tensor],
    *,
    row_ids: Tensor,
    ids: Tensor,
    draws: Draws,
    config: Contrasted,
    itm: bool,
    words: Mapping[str, int],
) -> Choice:
    """What a stage's `choose` gives: partners for ITM if there is `itm`, and how many terms each loss has.

    words: of each loss over words, how many it guesses. Other arguments as for `draw_partners`.
    """
    partners: dict[str, Tensor] = {}
    counts = {}
    if itm:
        partners, counts["itm"] = draw_partners(
            features, everyone, row_ids=row_ids, ids=ids, draws=draws, config=config
        )
    counts |= words
    return Choice(partners, counts | {f"{name}_accuracy": count for name, count in counts.items()})


def check_contrasted(config: Contrasted) -> None:
    """Raise ConfigError unless negatives and temperature make sense."""
    check_choice("negatives", config.negatives, ("hard", "random"))
    if not 0 < config.hard_share <= 1:
        raise ConfigError(f"hard_share {config.hard_share} must lie above 0, and at 1 at most; negatives=random for 0")
    if not 0 < config.logit_scale_min <= config.logit_scale_init <= config.logit_scale_max:
        raise ConfigError("logit_scale_init must lie between logit_scale_min, above 0, and logit_scale_max")


def check_weights(weights: Mapping[str, float]) -> None:
    """Raise ConfigError unless the losses' weights are at least 0, one of them above."""
    if min(weights.values()) < 0 or not any(weights.values()):
        found = ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
        raise ConfigError(f"{found}: weights must be at least 0, one of them above")


def check_pools(image_pool: str, text_pool: str) -> None:
    """Raise ConfigError unless both are known ways to pool."""
    check_choice("image_pool", image_pool, IMAGE_POOLS)
    check_choice("text_pool", text_pool, TEXT_POOLS)


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Raise ConfigError unless a setting is one of the known values."""
    if value not in known:
        raise ConfigError(f"unknown {name} {value!r}{nearest(value, known)}; choose from {', '.join(known)}")
