"""Stage 2, ViLT (arXiv 2102.03334): one pre-norm transformer over words and patches, no other image encoder.

Trained by matching (ITM, half of the pictures replaced), guessing of masked words (MLM) and word-patch
alignment (WPA).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.errors import ConfigError, nearest
from vlm.models.heads import ClassifierHead, MlmHead, no_head
from vlm.models.stage import Choice, Draws, Encoded, Pairs, Taught, joint_loss
from vlm.models.transformer import Transformer, TransformerConfig
from vlm.models.vit import ViT, ViTConfig
from vlm.objectives.itc import positives
from vlm.objectives.itm import draw_negatives, itm
from vlm.objectives.mlm import IGNORED, mlm
from vlm.objectives.wpa import cosine_cost, ipot, wpa

HEADS = ("itm", "mlm", "rank", "vqa", "nlvr2")


@dataclass(frozen=True)
class ViltConfig:
    """The transformer, the words that enter it, and the heads on top."""

    image: ViTConfig = field(default_factory=lambda: ViTConfig(image_size=384, patch_size=32))
    """The transformer and its patches; `norm_eps` and `activation` hold for words and heads too."""
    vocab_size: int = 30522
    """Rows of the word embedding."""
    context_length: int = 40
    """Longest text, in tokens."""
    token_types: int = 2
    """Rows of the words' token-type embedding, of which a single text uses row 0."""
    word_size: float = 1.0
    """What words' entries begin as, on average (their norm's weight): much smaller than those of trained patches, they
    are lost among what the first layers add to them."""
    heads: tuple[str, ...] = ("itm", "mlm")
    """`itm` and `mlm` of pre-training; `rank` for retrieval, `vqa`, `nlvr2` of fine-tuned models."""
    answers: tuple[str, ...] = ()
    """What the `vqa` head chooses among."""
    itm_weight: float = 1.0
    """Weight of image-text matching; 0 leaves it out."""
    mlm_weight: float = 1.0
    """Weight of masked language modelling; 0 leaves it out."""
    wpa_weight: float = 0.1
    """Of the word-patch alignment, which belongs to the matching (§3.2); 0 leaves it out."""


class Rows(Protocol):
    """What ViLT reads of a batch."""

    pixels: Tensor
    """(B, 3, H, W) normalised pixels."""
    tokens: Mapping[str, Tensor]
    """`input_ids` and `attention_mask`, each (B, L)."""
    pixel_mask: Tensor | None
    """(B, H, W), true on pixels that aren't padding; None without padding."""
    masked_ids: Tensor | None
    """(B, L) with some tokens hidden; None for no MLM."""
    labels: Tensor | None
    """(B, L) what was hidden, `IGNORED` elsewhere."""

    def __len__(self) -> int: ...


class Fused(NamedTuple):
    """A text and a picture that have seen each other, after the final norm."""

    words: Tensor
    """(B, L, D)."""
    patches: Tensor
    """(B, N, D), [CLS] first."""
    patch_mask: Tensor
    """(B, N) boolean, true on patches that aren't padding."""


class Vilt(nn.Module):
    """Words and patches in one transformer."""

    def __init__(self, config: ViltConfig) -> None:
        super().__init__()
        _check(config)
        self.config, image = config, config.image
        width, heads = image.width, config.heads
        self.words = Transformer(_word_config(config))
        nn.init.constant_(self.words.embed_norm.weight, config.word_size)  # type: ignore[union-attr]
        self.image = ViT(image)
        self.modality = nn.Parameter(0.02 * torch.randn(2, width))  # of words, of patches
        self.pooler = nn.Linear(width, width)
        self.itm = nn.Linear(width, 2) if "itm" in heads else None
        self.mlm = (
            MlmHead(width, config.vocab_size, norm_eps=image.norm_eps, act=image.activation) if "mlm" in heads else None
        )
        self.rank = nn.Linear(width, 1) if "rank" in heads else None
        self.vqa = ClassifierHead(width, 2 * width, len(config.answers)) if "vqa" in heads else None
        self.nlvr2 = ClassifierHead(2 * width, 2 * width, 2) if "nlvr2" in heads else None
        if "nlvr2" in heads:  # the second picture starts as the same kind as the first
            self.second_image = nn.Parameter(self.modality[1:].detach().clone())
        weights = {"itm": config.itm_weight, "wpa": config.wpa_weight} if "itm" in heads else {}
        self.loss_weights = weights | ({"mlm": config.mlm_weight} if "mlm" in heads else {})

    def fuse(
        self, pixels: Tensor, tokens: Mapping[str, Tensor], pixel_mask: Tensor | None = None, *, second: bool = False
    ) -> Fused:
        """Run the transformer over [words; patches].

        Args:
            pixels: (B, 3, H, W), smaller pictures padded at the right and at the bottom.
            tokens: `input_ids` and `attention_mask`, each (B, L).
            pixel_mask: (B, H, W), true on pixels that aren't padding; None without padding.
            second: whether the picture is the second of a pair (NLVR2).
        """
        kinds = (self.modality[0], self.second_image[0] if second else self.modality[1])
        words = self.words.embed(tokens["input_ids"]) + kinds[0]  # (B, L, D)
        patches, patch_mask = self.image.embed(pixels, pixel_mask)  # (B, N, D), (B, N)
        mask = torch.cat([tokens["attention_mask"].bool(), patch_mask], dim=1)  # (B, L + N)
        states = self.image.run(torch.cat([words, patches + kinds[1]], dim=1), mask)  # (B, L + N, D)
        length = words.shape[1]
        return Fused(states[:, :length], states[:, length:], patch_mask)

    def pool(self, fused: Fused) -> Tensor:
        """(B, D) of a pair: its first word's state through the pooler."""
        return torch.tanh(self.pooler(fused.words[:, 0]))

    # Pre-training, as `vlm.models.stage` describes it.

    def forward(self, batch: Rows, pairs: Pairs | None = None) -> Any:
        """Without pairs, what a row is made of: raw pixels, since nothing can be encoded on its own.

        With pairs, the sums of losses over the rows: ``itm``, ``wpa`` and, where tokens are hidden, ``mlm``;
        beside them ``itm_accuracy`` and ``mlm_accuracy``, sums of right answers.
        """
        if pairs is None:
            masks = {} if batch.pixel_mask is None else {"pixel_mask": batch.pixel_mask}
            return Encoded({}, {}, {"pixels": batch.pixels, **masks})
        parts = {} if self.itm is None else self._match_parts(batch, pairs)
        return parts if batch.masked_ids is None or self.mlm is None else parts | self._mlm_parts(batch)

    def contrast(
        self,
        features: Mapping[str, Tensor],
        everyone: Mapping[str, Tensor],
        *,
        row_ids: Tensor,
        ids: Tensor,
        taught: Taught | None = None,
    ) -> dict[str, Tensor]:
        """Nothing: ViLT has no features to compare."""
        return {}

    def choose(
        self,
        batch: Rows,
        features: Mapping[str, Tensor],
        everyone: Mapping[str, Tensor],
        *,
        row_ids: Tensor,
        ids: Tensor,
        draws: Draws,
    ) -> Choice:
        """Give half of the rows another picture, drawn evenly from the batch (§3.2).

        Args:
            batch: the b rows.
            features, everyone: empty.
            row_ids, ids: (b, K) and (B, K); a picture that shares an id with a row never replaces its own.
            draws: decisions `replace` and `image`.

        Returns:
            `image`: the row whose picture is taken, -1 for the own one: the other half, and rows whose batch
            holds no other picture.
        """
        same = positives(row_ids, ids)  # (b, B)
        other = draw_negatives(torch.ones_like(same, dtype=torch.float32), same, draws("image", 1)[:, 0].to(ids.device))
        replaced = draws("replace", 1)[:, 0].to(ids.device) < 0.5
        matched = ("itm", "itm_accuracy", "wpa") if self.config.wpa_weight else ("itm", "itm_accuracy")
        counts = {} if self.itm is None else dict.fromkeys(matched, len(batch))
        if batch.labels is not None:
            counts |= dict.fromkeys(("mlm", "mlm_accuracy"), int((batch.labels != IGNORED).sum()))
        return Choice({"image": torch.where(replaced, other, -1)}, counts)

    def _match_parts(self, batch: Rows, pairs: Pairs) -> dict[str, Tensor]:
        partners = pairs.partners["image"]
        matched = partners < 0  # (b,)
        taken = torch.where(matched, torch.arange(len(matched), device=matched.device), partners)
        mask = pairs.inputs.get("pixel_mask")
        fused = self.fuse(pairs.inputs["pixels"][taken], batch.tokens, None if mask is None else mask[taken])
        logits = self._head("itm")(self.pool(fused))  # (b, 2)
        parts = {"itm": itm(logits, matched), "itm_accuracy": (logits.argmax(dim=1) == matched).sum().float()}
        if self.config.wpa_weight:
            # The official code also drives the words of a wrong picture's text away from its patches.
            sides = _contents(fused, batch.tokens)
            parts["wpa"] = wpa(fused.words, fused.patches, *sides, weights=matched.float() * 2 - 1)
        return parts

    def _mlm_parts(self, batch: Rows) -> dict[str, Tensor]:
        hidden = {"input_ids": batch.masked_ids, "attention_mask": batch.tokens["attention_mask"]}
        chosen = batch.labels != IGNORED  # (b, L)
        states = self.fuse(batch.pixels, hidden, batch.pixel_mask).words[chosen]  # type: ignore[arg-type, index]
        logits, labels = self._word_logits(states), batch.labels[chosen]  # type: ignore[index]  # (M, V), (M,)
        return {"mlm": mlm(logits, labels), "mlm_accuracy": (logits.argmax(dim=1) == labels).sum().float()}

    def loss(self, batch: Rows) -> dict[str, Tensor]:
        """Losses of one batch alone, without other ranks or micro-batches; ``loss`` is the total."""
        return joint_loss(self, batch)

    # Verbs. Pixels (B, 3, H, W), tokens (B, L), pixel_mask (B, H, W) or None, as in `fuse`.

    def match(self, pixels: Tensor, tokens: Mapping[str, Tensor], pixel_mask: Tensor | None = None) -> Tensor:
        """ITM logits (B, 2), index 1 = matched.

        A model fine-tuned for retrieval has a rank score instead, which began as the logit of index 1
        (§4.3): it stands there beside a 0, so that differences of logits rank pairs. Raises MissingVerbError
        without either head.
        """
        pooled = self.pool(self.fuse(pixels, tokens, pixel_mask))
        if self.itm is None and self.rank is not None:
            return F.pad(self.rank(pooled), (1, 0))
        return self._head("itm")(pooled)

    def mlm_logits(self, pixels: Tensor, tokens: Mapping[str, Tensor], pixel_mask: Tensor | None = None) -> Tensor:
        """(B, L, V) logits of every word. Raises MissingVerbError without an mlm head."""
        self._head("mlm")
        return self._word_logits(self.fuse(pixels, tokens, pixel_mask).words)

    def rank_scores(self, pixels: Tensor, tokens: Mapping[str, Tensor], pixel_mask: Tensor | None = None) -> Tensor:
        """(B,) rank scores, for `ranking` over candidates. Raises MissingVerbError without a rank head."""
        return self._head("rank")(self.pool(self.fuse(pixels, tokens, pixel_mask)))[:, 0]

    def vqa_logits(self, pixels: Tensor, tokens: Mapping[str, Tensor], pixel_mask: Tensor | None = None) -> Tensor:
        """(B, A) logits of `config.answers`. Raises MissingVerbError without a vqa head."""
        return self._head("vqa")(self.pool(self.fuse(pixels, tokens, pixel_mask)))

    def nlvr2_logits(self, pixels: Tensor, tokens: Mapping[str, Tensor], pixel_mask: Tensor | None = None) -> Tensor:
        """(B, 2) logits of false and true, of a statement about two pictures.

        Args:
            pixels: (B, 2, 3, H, W).
            tokens: as elsewhere.
            pixel_mask: (B, 2, H, W) or None.

        Raises MissingVerbError without an nlvr2 head.
        """
        head = self._head("nlvr2")
        masks = (None, None) if pixel_mask is None else pixel_mask.unbind(dim=1)
        views = zip(pixels.unbind(dim=1), masks, (False, True), strict=True)
        pooled = [self.pool(self.fuse(view, tokens, mask, second=second)) for view, mask, second in views]
        return head(torch.cat(pooled, dim=1))

    def word_patch_plan(self, pixels: Tensor, tokens: Mapping[str, Tensor], pixel_mask: Tensor | None = None) -> Tensor:
        """(B, L, N) transport plan: how much of each word goes to each patch; 0 at [CLS], [SEP] and padding."""
        fused = self.fuse(pixels, tokens, pixel_mask)
        return ipot(cosine_cost(fused.words, fused.patches), *_contents(fused, tokens))

    def _word_logits(self, states: Tensor) -> Tensor:
        return self._head("mlm")(states, self.words.tokens.weight)

    def _head(self, name: str) -> Any:
        head = getattr(self, name)
        if head is None:
            raise no_head("ViLT", name, self.config.heads)
        return head


def _contents(fused: Fused, tokens: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(B, L) and (B, N), true on words and patches, not on [CLS], [SEP] and padding."""
    mask = tokens["attention_mask"].bool()
    inner = F.pad(mask[:, 1:], (0, 1)) & (torch.arange(mask.shape[1], device=mask.device) > 0)
    return inner, F.pad(fused.patch_mask[:, 1:], (1, 0))


def _word_config(config: ViltConfig) -> TransformerConfig:
    """The text transformer's embedding without a layer: words, positions, token types, norm."""
    return TransformerConfig(
        vocab_size=config.vocab_size, context_length=config.context_length, width=config.image.width, layers=0,
        heads=config.image.heads, norm="post", norm_eps=config.image.norm_eps, token_types=config.token_types,
    )  # fmt: skip


def _check(config: ViltConfig) -> None:
    for head in config.heads:
        if head not in HEADS:
            raise ConfigError(f"unknown head {head!r}{nearest(head, HEADS)}; choose from {', '.join(HEADS)}")
    if ("vqa" in config.heads) != bool(config.answers):
        raise ConfigError(f"heads {config.heads} and {len(config.answers)} answers: a vqa head needs both or neither")
    if config.word_size <= 0:
        raise ConfigError(f"word_size {config.word_size} must be above 0")
    weights = (config.itm_weight, config.mlm_weight, config.wpa_weight)
    if min(weights) < 0:
        raise ConfigError(f"itm_weight, mlm_weight and wpa_weight {weights} must be at least 0")
    if config.image.patch_dropout:
        raise ConfigError("image.patch_dropout must be 0: ViLT's words look at all patches")
