"""Visual question answering with an answer decoder: ALBEF's (arXiv 2107.07651 §5) and BLIP's (2201.12086 §5.3).

The network keeps the parts `image` and `text` of the stage that it starts from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from vlm.errors import ConfigError
from vlm.models.heads import MlmHead, Prediction, fused_states
from vlm.models.pairing import Keys, begun, take_images
from vlm.models.transformer import KVCache, Transformer, TransformerConfig
from vlm.models.vit import ViT, ViTConfig
from vlm.objectives.distillation import taught_cross_entropy


@dataclass(frozen=True)
class VqaConfig:
    """ALBEF's or BLIP's towers, which read picture and question, and a decoder that writes the answer."""

    image: ViTConfig = field(default_factory=ViTConfig)
    text: TransformerConfig = field(default_factory=TransformerConfig)
    decoder: TransformerConfig = field(default_factory=TransformerConfig)
    """Causal, looking at the fused question: see `answer_decoder` and `med_answer_decoder`."""
    enc_id: int | None = None
    """First token of a question: BLIP's [ENC]; None keeps the tokenizer's, as ALBEF does."""
    dec_id: int | None = None
    """First token of an answer: BLIP's [DEC]; None keeps the tokenizer's."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over the whole vocabulary (BLIP 0.1)."""


@dataclass(frozen=True)
class Ranked:
    """The likeliest answers of each question, best first."""

    answers: Tensor
    """(B, k) places in the candidates."""
    probabilities: Tensor
    """(B, k) among these k."""


class Vqa(nn.Module):
    """Answers written token by token from the fused states of picture and question."""

    def __init__(self, config: VqaConfig) -> None:
        super().__init__()
        decoder = config.decoder
        if not decoder.causal or not decoder.cross_layers:
            raise ConfigError("decoder must be causal and have cross_layers, as answer_decoder makes it")
        if (decoder.cross_width or decoder.width) != config.text.width:
            raise ConfigError(f"decoder.cross_width must be text.width {config.text.width}: it looks at the question")
        self.config = config
        self.image, self.text = ViT(config.image), Transformer(config.text)
        self.decoder = Transformer(decoder)
        self.answer_head = MlmHead(decoder.width, decoder.vocab_size, norm_eps=decoder.norm_eps, act=decoder.activation)

    def question_states(self, pixels: Tensor, tokens: Mapping[str, Tensor]) -> tuple[Keys, Tensor]:
        """Read pictures and questions once: keys and values for the decoder, and the mask (B, L) of real tokens.

        The pictures may divide the B questions, each for several questions in a row.
        """
        fused, mask = fused_states(self.image, self.text, pixels, tokens, self.config.enc_id)
        return self.decoder.image_states(fused), mask

    def answer_logits(self, question: Keys, mask: Tensor, answers: Mapping[str, Tensor]) -> Tensor:
        """Logits (A, L, V) of the token after each token of the answers.

        question, mask: from `question_states`; B of them may divide A, each for several answers in a row.
        answers: `input_ids` and `attention_mask`, each (A, L), start and end token included.
        """
        real, seen = answers["attention_mask"].bool(), mask[:, None, None, :]
        states = self.decoder.embed(begun(answers["input_ids"], self.config.dec_id))
        states = self.decoder(states, key_mask=real, image=question, image_mask=seen)  # (A, L, D)
        return self.answer_head(states, self.decoder.tokens.weight)

    def answer_step(self, input_ids: Tensor, *, question: Keys, mask: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits (A, V) of the token after the given ones, to write answers freely.

        Args:
            input_ids: (A, L) as they are: the answers' first token, then, with a cache, the new ones alone.
            question, mask: from `question_states`; B of them may divide A, each for several answers in a row.
            cache: keys and values of the tokens before, extended in place.
        """
        states = self.decoder.embed(input_ids, past=cache.length if cache is not None else 0)
        seen = mask[:, None, None, :]
        states = self.decoder(states, image=question, image_mask=seen, cache=cache)  # (A, L, D)
        return self.answer_head(states[:, -1], self.decoder.tokens.weight)

    def forward(
        self,
        pixels: Tensor,
        tokens: Mapping[str, Tensor],
        answers: Mapping[str, Tensor],
        *,
        questions: Tensor | None = None,
        weights: Tensor | None = None,
        soft: Tensor | None = None,
        alpha: float = 0.0,
    ) -> Prediction:
        """Loss of writing answers (§5): per question, the weighted sum over its answers' tokens.

        Args:
            pixels: (B, 3, H, W) normalised.
            tokens: the questions' `input_ids` and `attention_mask`, each (B, L).
            answers: likewise, (A, L'), start and end token included.
            questions: (A,) the question of each answer; None for one answer each.
            weights: (A,) such as the share of people who gave it; None for 1.
            soft: (A, L' - 1, V) a teacher's logits, and `alpha` their share in the targets.
        """
        question, mask = self.question_states(pixels, tokens)
        if questions is not None:
            question, mask = take_images(question, questions), mask[questions]
        logits = self.answer_logits(question, mask, answers)[:, :-1]  # (A, L' - 1, V)
        smoothing = self.config.label_smoothing
        losses = _token_losses(logits, answers, soft, alpha, smoothing).sum(dim=1)  # (A,)
        total = losses.sum() if weights is None else (weights * losses).sum()
        return Prediction(logits, total / len(pixels))

    @torch.no_grad()
    def rank(self, pixels: Tensor, tokens: Mapping[str, Tensor], candidates: Mapping[str, Tensor], *, k: int) -> Ranked:
        """Choose among known answers (§5): the k likeliest by their first token, then by their whole likelihood.

        Each token counts once, and labels aren't smoothed: ALBEF's official code counts the first one twice, BLIP's
        ranks by its smoothed loss.

        Args:
            pixels, tokens: B pictures and questions.
            candidates: `input_ids` and `attention_mask` (C, L) of all answers, start and end token included.
            k: answers that are read in full for each question; more than there are means all.
        """
        return self.rank_states(*self.question_states(pixels, tokens), candidates, k=k)

    @torch.no_grad()
    def rank_states(self, question: Keys, mask: Tensor, candidates: Mapping[str, Tensor], *, k: int) -> Ranked:
        """As `rank`, of questions that were read before: see `question_states`."""
        ids, real = candidates["input_ids"], candidates["attention_mask"].bool()
        start = {"input_ids": ids[:1, :1].expand(len(mask), 1), "attention_mask": real[:1, :1].expand(len(mask), 1)}
        first = self.answer_logits(question, mask, start)[:, 0].float().log_softmax(dim=-1)  # (B, V)
        if k < 1 or ids.shape[1] < 2:
            raise ValueError(f"expected k of at least 1 and answers of at least 2 tokens, got {k} and {ids.shape[1]}")
        k = min(k, len(ids))
        chosen = first[:, ids[:, 1]].topk(k, dim=1).indices  # (B, k)
        rows = chosen.flatten()
        answers = {"input_ids": ids[rows], "attention_mask": real[rows]}
        logits = self.answer_logits(question, mask, answers)[:, :-1]  # (B k, L - 1, V)
        likelihood = -_token_losses(logits, answers).sum(dim=1).unflatten(0, (-1, k))  # (B, k)
        best = likelihood.softmax(dim=1).sort(dim=1, descending=True)
        return Ranked(chosen.gather(1, best.indices), best.values)


def answer_decoder(text: TransformerConfig) -> TransformerConfig:
    """The decoder of `Vqa`: as many layers as fuse, causal, looking at the question's states."""
    layers = len(text.cross_layers)
    return replace(text, layers=layers, causal=True, cross_layers=tuple(range(layers)), cross_width=text.width)


def med_answer_decoder(text: TransformerConfig) -> TransformerConfig:
    """The decoder of a `Vqa` that starts from BLIP's: as deep as MED, causal, looking at the question's states."""
    return replace(text, causal=True, cross_width=text.width)


def _token_losses(
    logits: Tensor,
    answers: Mapping[str, Tensor],
    soft: Tensor | None = None,
    alpha: float = 0.0,
    smoothing: float = 0.0,
) -> Tensor:
    """(A, L - 1) losses of each answer's tokens after the first; 0 on padding."""
    real, ids = answers["attention_mask"][:, 1:].bool(), answers["input_ids"][:, 1:]
    flat = None if soft is None else soft.flatten(0, 1)
    losses = taught_cross_entropy(logits.flatten(0, 1), ids.flatten(), soft=flat, alpha=alpha, smoothing=smoothing)
    return losses.unflatten(0, ids.shape).masked_fill(~real, 0.0)
