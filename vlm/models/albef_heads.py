"""ALBEF fine-tuned for other tasks (arXiv 2107.07651 §5): VQA, NLVR2, visual entailment.

Retrieval has no head of its own: it is fine-tuned by ITC and ITM, `Albef` with ``mlm_weight`` 0. Each network
here keeps ALBEF's parts `image` and `text`, so that it starts from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from vlm.errors import ConfigError
from vlm.models.common_space import check_choice
from vlm.models.heads import MlmHead
from vlm.models.pairing import Keys, take_images
from vlm.models.transformer import Transformer, TransformerConfig
from vlm.models.vit import ViT, ViTConfig
from vlm.objectives.distillation import taught_cross_entropy

CLASSES = {"entailment": 3, "nlvr2": 2, "assignment": 3}


@dataclass(frozen=True)
class Prediction:
    """What a head says, and how wrong that is where the truth was given."""

    logits: Tensor
    """(B, classes), or (A, L - 1, V) for the tokens of answers."""
    loss: Tensor | None = None
    """Scalar: the mean over rows; over questions for VQA."""


@dataclass(frozen=True)
class ClassifierConfig:
    """A pair, or a text with two images, sorted into classes."""

    image: ViTConfig = field(default_factory=ViTConfig)
    text: TransformerConfig = field(default_factory=TransformerConfig)
    """As ALBEF's; for two images as `two_image_text` makes it."""
    task: Literal["entailment", "nlvr2", "assignment"] = "entailment"
    """Entailment, neutral or contradiction; true or false of two images; or NLVR2's pre-training, text assignment
    (TA): the text belongs to the first image, to the second, or to neither."""


class Entailment(nn.Module):
    """Classes of the fused [CLS] state: whether a picture implies a text, contradicts it, or neither."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        check_choice("task", config.task, ("entailment",))
        self.config = config
        self.image, self.text = ViT(config.image), Transformer(config.text)
        self.add_module(f"{config.task}_head", _classifier(config))

    def forward(
        self,
        pixels: Tensor,
        tokens: Mapping[str, Tensor],
        labels: Tensor | None = None,
        *,
        soft: Tensor | None = None,
        alpha: float = 0.0,
    ) -> Prediction:
        """Classify pairs.

        Args:
            pixels: (B, 3, H, W) normalised.
            tokens: `input_ids` and `attention_mask`, each (B, L).
            labels: (B,) classes, for the loss.
            soft: (B, classes) a teacher's logits, and `alpha` their share in the targets.
        """
        fused, _ = _fused(self.image, self.text, pixels, tokens)
        logits = self.get_submodule(f"{self.config.task}_head")(fused[:, 0])
        return _classified(logits, labels, soft, alpha)


class Nlvr2(nn.Module):
    """Whether a statement about two images is true.

    Each fusion layer is there twice in a row: the first looks at the first image, the second at the second one,
    through the same projection of keys and values. Pre-trained by text assignment (see `vlm.objectives.assignment`):
    the head is called by its task, so that a start takes all but the head.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        check_choice("task", config.task, ("nlvr2", "assignment"))
        if len(config.text.cross_layers) != 2 * len(config.text.cross_shared):
            raise ConfigError("text: of two fusion layers in a row the second must be in cross_shared: two_image_text")
        self.config = config
        self.image, self.text = ViT(config.image), Transformer(config.text)
        self.add_module(f"{config.task}_head", _classifier(config))

    def forward(
        self,
        pixels: Tensor,
        tokens: Mapping[str, Tensor],
        labels: Tensor | None = None,
        *,
        soft: Tensor | None = None,
        alpha: float = 0.0,
    ) -> Prediction:
        """Classify texts with two images each: pixels (B, 2, 3, H, W); the rest as for `Entailment`."""
        states = self.image(pixels.flatten(0, 1)).unflatten(0, (-1, 2))  # (B, 2, N, D)
        first, second = (self.text.image_states(states[:, i]) for i in (0, 1))
        image = [second[i - 1] if i in self.config.text.cross_shared else first[i] for i in range(len(first))]
        mask = tokens["attention_mask"].bool()
        fused = self.text(self.text.embed(tokens["input_ids"]), key_mask=mask, image=image)  # (B, L, D)
        logits = self.get_submodule(f"{self.config.task}_head")(fused[:, 0])
        return _classified(logits, labels, soft, alpha)


@dataclass(frozen=True)
class VqaConfig:
    """ALBEF's towers, which read picture and question, and a decoder that writes the answer."""

    image: ViTConfig = field(default_factory=ViTConfig)
    text: TransformerConfig = field(default_factory=TransformerConfig)
    decoder: TransformerConfig = field(default_factory=TransformerConfig)
    """Causal, looking at the fused question in every layer: see `answer_decoder`."""


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
        if not decoder.causal or decoder.cross_layers != tuple(range(decoder.layers)):
            raise ConfigError("decoder must be causal with cross_layers everywhere, as answer_decoder makes it")
        self.config = config
        self.image, self.text = ViT(config.image), Transformer(config.text)
        self.decoder = Transformer(decoder)
        self.answer_head = MlmHead(decoder.width, decoder.vocab_size, norm_eps=decoder.norm_eps, act=decoder.activation)

    def question_states(self, pixels: Tensor, tokens: Mapping[str, Tensor]) -> tuple[Keys, Tensor]:
        """Read pictures and questions once: keys and values for the decoder, and the mask (B, L) of real tokens."""
        fused, mask = _fused(self.image, self.text, pixels, tokens)
        return self.decoder.image_states(fused), mask

    def answer_logits(self, question: Keys, mask: Tensor, answers: Mapping[str, Tensor]) -> Tensor:
        """Logits (A, L, V) of the token after each token of the answers.

        question, mask: from `question_states`; B of them may divide A, each for several answers in a row.
        answers: `input_ids` and `attention_mask`, each (A, L), start and end token included.
        """
        real, seen = answers["attention_mask"].bool(), mask[:, None, None, :]
        states = self.decoder.embed(answers["input_ids"])
        states = self.decoder(states, key_mask=real, image=question, image_mask=seen)  # (A, L, D)
        return self.answer_head(states, self.decoder.tokens.weight)

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
        losses = _token_losses(logits, answers, soft, alpha).sum(dim=1)  # (A,)
        total = losses.sum() if weights is None else (weights * losses).sum()
        return Prediction(logits, total / len(pixels))

    @torch.no_grad()
    def rank(self, pixels: Tensor, tokens: Mapping[str, Tensor], candidates: Mapping[str, Tensor], *, k: int) -> Ranked:
        """Choose among known answers (§5): the k likeliest by their first token, then by their whole likelihood.

        Each token counts once; the official code counts the first one twice.

        Args:
            pixels, tokens: B pictures and questions.
            candidates: `input_ids` and `attention_mask` (C, L) of all answers, start and end token included.
            k: answers that are read in full for each question; more than there are means all.
        """
        question, mask = self.question_states(pixels, tokens)
        ids, real = candidates["input_ids"], candidates["attention_mask"].bool()
        start = {"input_ids": ids[:1, :1].expand(len(mask), 1), "attention_mask": real[:1, :1].expand(len(mask), 1)}
        first = self.answer_logits(question, mask, start)[:, 0].float().log_softmax(dim=-1)  # (B, V)
        k = min(k, len(ids))
        chosen = first[:, ids[:, 1]].topk(k, dim=1).indices  # (B, k)
        rows = chosen.flatten()
        answers = {"input_ids": ids[rows], "attention_mask": real[rows]}
        logits = self.answer_logits(question, mask, answers)[:, :-1]  # (B k, L - 1, V)
        likelihood = -_token_losses(logits, answers).sum(dim=1).unflatten(0, (-1, k))  # (B, k)
        best = likelihood.softmax(dim=1).sort(dim=1, descending=True)
        return Ranked(chosen.gather(1, best.indices), best.values)


def classifier(config: ClassifierConfig) -> Entailment | Nlvr2:
    """The network of a task: of one image, or of two."""
    return Entailment(config) if config.task == "entailment" else Nlvr2(config)


def two_image_text(text: TransformerConfig) -> TransformerConfig:
    """The text tower of `Nlvr2`: every fusion layer twice, the second one for the second image."""
    first = text.layers - len(text.cross_layers)
    layers = text.layers + len(text.cross_layers)
    return replace(
        text,
        layers=layers,
        cross_layers=tuple(range(first, layers)),
        cross_shared=tuple(range(first + 1, layers, 2)),
    )


def answer_decoder(text: TransformerConfig) -> TransformerConfig:
    """The decoder of `Vqa`: as many layers as fuse, causal, looking at the question's states."""
    layers = len(text.cross_layers)
    return replace(text, layers=layers, causal=True, cross_layers=tuple(range(layers)), cross_width=text.width)


def _classifier(config: ClassifierConfig) -> nn.Sequential:
    width = config.text.width
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES[config.task]))


def _fused(image: ViT, text: Transformer, pixels: Tensor, tokens: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Fused states (B, L, D) and the mask (B, L) of real tokens."""
    mask = tokens["attention_mask"].bool()
    return text(text.embed(tokens["input_ids"]), key_mask=mask, image=text.image_states(image(pixels))), mask


def _classified(logits: Tensor, labels: Tensor | None, soft: Tensor | None, alpha: float) -> Prediction:
    if labels is None:
        return Prediction(logits)
    return Prediction(logits, taught_cross_entropy(logits, labels, soft=soft, alpha=alpha).mean())


def _token_losses(
    logits: Tensor, answers: Mapping[str, Tensor], soft: Tensor | None = None, alpha: float = 0.0
) -> Tensor:
    """(A, L - 1) losses of each answer's tokens after the first; 0 on padding."""
    real, ids = answers["attention_mask"][:, 1:].bool(), answers["input_ids"][:, 1:]
    flat = None if soft is None else soft.flatten(0, 1)
    losses = taught_cross_entropy(logits.flatten(0, 1), ids.flatten(), soft=flat, alpha=alpha)
    return losses.unflatten(0, ids.shape).masked_fill(~real, 0.0)
