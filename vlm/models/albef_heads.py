"""ALBEF (arXiv 2107.07651 §5) and BLIP (2201.12086 §5) fine-tuned for classes: NLVR2, visual entailment.

For VQA see `vlm.models.vqa`.

Retrieval has no head of its own: it is fine-tuned by ITC and ITM, `Albef` with ``mlm_weight`` 0. Each network
here keeps ALBEF's parts `image` and `text`, so that it starts from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, cast

from torch import Tensor, nn

from vlm.errors import ConfigError
from vlm.models.common_space import check_choice
from vlm.models.heads import Prediction, fused_states
from vlm.models.pairing import begun
from vlm.models.transformer import Layer, Looked, Transformer, TransformerConfig
from vlm.models.vit import ViT, ViTConfig
from vlm.objectives.distillation import taught_cross_entropy

CLASSES = {"entailment": 3, "nlvr2": 2, "assignment": 3}


@dataclass(frozen=True)
class ClassifierConfig:
    """A pair, or a text with two images, sorted into classes."""

    image: ViTConfig = field(default_factory=ViTConfig)
    text: TransformerConfig = field(default_factory=TransformerConfig)
    """As ALBEF's; for two images as `two_image_text` makes it."""
    task: Literal["entailment", "nlvr2", "assignment"] = "entailment"
    """Entailment, neutral or contradiction; true or false of two images; or NLVR2's pre-training, text assignment
    (TA): the text belongs to the first image, to the second, or to neither."""
    enc_id: int | None = None
    """The text's first token: BLIP's [ENC]; None keeps the tokenizer's, as ALBEF does."""


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
        fused, _ = fused_states(self.image, self.text, pixels, tokens, self.config.enc_id)
        logits = self.get_submodule(f"{self.config.task}_head")(fused[:, 0])
        return _classified(logits, labels, soft, alpha)


class Nlvr2(nn.Module):
    """Whether a statement about two images is true.

    ALBEF has each fusion layer twice in a row: the first looks at the first image, the second at the second one,
    through the same projection of keys and values. BLIP has two cross-attentions in each. Pre-trained by text
    assignment (see `vlm.objectives.assignment`): the head is called by its task, so that a start takes all but the
    head.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        check_choice("task", config.task, ("nlvr2", "assignment"))
        text = config.text
        if not text.cross_layers or (
            len(text.cross_layers) != 2 * len(text.cross_shared) and text.cross_twin != text.cross_layers
        ):
            raise ConfigError(
                "text: of two fusion layers in a row the second must be in cross_shared: two_image_text; or all of "
                "them in cross_twin: med_two_image_text"
            )
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
        words = self.text.embed(begun(tokens["input_ids"], self.config.enc_id))
        fused = self.text(words, key_mask=tokens["attention_mask"].bool(), image=self._images(states))  # (B, L, D)
        logits = self.get_submodule(f"{self.config.task}_head")(fused[:, 0])
        return _classified(logits, labels, soft, alpha)

    def _images(self, states: Tensor) -> list[Looked | None]:
        if self.config.text.cross_twin:
            pairs = zip(self.text.layers, self.text.image_states(states[:, 0]), strict=True)
            return [kv and (kv, cast(Layer, layer).cross_other.keys_values(states[:, 1])) for layer, kv in pairs]
        first, second = (self.text.image_states(states[:, i]) for i in (0, 1))
        return [second[i - 1] if i in self.config.text.cross_shared else first[i] for i in range(len(first))]


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


def med_two_image_text(text: TransformerConfig) -> TransformerConfig:
    """The text tower of BLIP's `Nlvr2`: two cross-attentions a layer, whose mean is taken in the lower half of the
    layers and a linear map of both in the upper one, as in the official code."""
    merged = tuple(layer for layer in text.cross_layers if layer >= text.layers // 2)
    return replace(text, cross_twin=text.cross_layers, cross_merged=merged)


def _classifier(config: ClassifierConfig) -> nn.Sequential:
    width = config.text.width
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES[config.task]))


def _classified(logits: Tensor, labels: Tensor | None, soft: Tensor | None, alpha: float) -> Prediction:
    if labels is None:
        return Prediction(logits)
    return Prediction(logits, taught_cross_entropy(logits, labels, soft=soft, alpha=alpha).mean())
