"""Stage 3, ALBEF (arXiv 2107.07651): image and text are aligned (ITC) before they are fused (ITM, MLM).

The text tower's lower layers see the text alone; its upper ones also look at the image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from vlm.errors import ConfigError
from vlm.models import common_space as space
from vlm.models.common_space import ImageStates, TextStates, project
from vlm.models.heads import MlmHead
from vlm.models.pairing import Keys, Rows, guess_sums, masked, match_sums, meet, take_images
from vlm.models.stage import Choice, Draws, Encoded, Pairs, Taught, joint_loss
from vlm.models.transformer import KeyValues, Transformer, TransformerConfig
from vlm.models.vit import ViT, ViTConfig
from vlm.objectives.mlm import IGNORED


def _text() -> TransformerConfig:
    return TransformerConfig(
        width=768, layers=12, heads=12, mlp_width=3072, token_types=2, cross_layers=tuple(range(6, 12)), cross_width=768
    )


@dataclass(frozen=True)
class AlbefConfig:
    """Both towers, the space they are aligned in, and what they are trained on; defaults as in the paper."""

    image: ViTConfig = field(default_factory=lambda: ViTConfig(image_size=256))
    text: TransformerConfig = field(default_factory=_text)
    """`cross_layers` are the fusion layers: the last ones, without a gap."""
    embed_dim: int = 256
    """Features of the common space."""
    projection_bias: bool = True
    """Whether the projections to the common space have a bias; CLIP's have none."""
    image_pool: Literal["cls", "mean"] = "cls"
    """The image's feature: its [CLS] state, or the mean of its patches."""
    text_pool: Literal["cls", "eot", "mean"] = "cls"
    """The text's feature: its first state, its last real one, or the mean of those, before fusion."""
    logit_scale_init: float = 1 / 0.07
    """Inverse temperature at the start."""
    logit_scale_min: float = 2.0
    """Lower bound of the inverse temperature: a temperature of at most 0.5."""
    logit_scale_max: float = 1000.0
    """Upper bound of the inverse temperature: a temperature of at least 0.001."""
    itc_weight: float = 1.0
    """Weight of the contrast; 0 leaves it out."""
    itm_weight: float = 1.0
    """Weight of image-text matching; 0 leaves it out."""
    mlm_weight: float = 1.0
    """Weight of masked language modelling; 0 leaves it out."""
    negatives: Literal["hard", "random"] = "hard"
    """ITM's negatives: in proportion to their similarity (§3.2), or each as likely."""
    hard_share: float = 1.0
    """Share of the rows with a hard negative where `negatives` are hard. In the paper similarity is flat at first, and
    negatives grow hard while it is learnt; after a start from a trained CLIP they would be hard before ITM has seen
    an easy one, and it stays at chance for long."""


class Albef(nn.Module):
    """An image encoder, a text encoder whose last layers fuse both, and the heads of three objectives."""

    def __init__(self, config: AlbefConfig) -> None:
        super().__init__()
        _check(config)
        self.config, self.fusion_start = config, min(config.text.cross_layers)
        self.loss_weights = {"itc": config.itc_weight, "itm": config.itm_weight, "mlm": config.mlm_weight}
        self.image = ViT(config.image)
        self.text = Transformer(config.text)
        self.image_projection = space.projection(config.image.width, config.embed_dim, bias=config.projection_bias)
        self.text_projection = space.projection(config.text.width, config.embed_dim, bias=config.projection_bias)
        self.log_scale = space.log_scale(config.logit_scale_init)
        text = config.text
        self.itm_head = nn.Linear(text.width, 2)
        self.mlm_head = MlmHead(text.width, text.vocab_size, norm_eps=text.norm_eps, act=text.activation)

    @property
    def teachable(self) -> bool:
        """Whether a teacher has something to say: of ITC, and of hidden tokens (§3.3)."""
        return bool(self.config.itc_weight or self.config.mlm_weight)

    @property
    def logit_scale(self) -> Tensor:
        """(1,) inverse temperature that cosines are multiplied by."""
        return self.log_scale.exp()

    @property
    def checkpointing(self) -> bool:
        """Whether each layer is recomputed in the backward pass, which trades time for memory."""
        return self.text.checkpointing

    @checkpointing.setter
    def checkpointing(self, enabled: bool) -> None:
        self.image.checkpointing = self.text.checkpointing = enabled

    # Each side alone (§3.1)

    def image_states(self, pixels: Tensor) -> ImageStates:
        """Encode (B, 3, H, W) normalised pixels, once for every text that will meet them."""
        states = self.image(pixels)  # (B, N, D)
        return ImageStates(project(space.pool_image(states, self.config.image_pool), self.image_projection), states)

    def text_states(self, tokens: Mapping[str, Tensor]) -> TextStates:
        """Encode `input_ids` and `attention_mask`, each (B, L), up to the layer where images come in."""
        mask = tokens["attention_mask"].bool()
        states = self._text_alone(tokens["input_ids"], mask)
        return TextStates(
            project(space.pool_text(states, mask, self.config.text_pool), self.text_projection), states, mask
        )

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Map (B, 3, H, W) normalised pixels to (B, D) unit-norm features."""
        return self.image_states(pixels).features

    def encode_text(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """Map `input_ids` and `attention_mask`, each (B, L), to (B, D) unit-norm features."""
        return self.text_states(tokens).features

    def similarity(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Cosine over temperature, (images, texts)."""
        return self.logit_scale * image_features @ text_features.T

    # Both together (§3.1)

    def image_keys_values(self, states: Tensor) -> list[KeyValues | None]:
        """Project image states (P, N, D) to the fusion layers' keys and values, for each layer of the tower."""
        return self.text.image_states(states)

    def fuse(self, states: Tensor, mask: Tensor, image: Keys) -> Tensor:
        """Let texts look at images.

        Args:
            states: (B, L, D) from `text_states`.
            mask: (B, L) true for real tokens.
            image: from `image_keys_values`; its images may divide B, each for several texts in a row.

        Returns:
            (B, L, D) fused states.
        """
        return self.text(states, key_mask=mask, image=image, layers=slice(self.fusion_start, None))

    def match_states(self, states: Tensor, mask: Tensor, image: Keys) -> Tensor:
        """ITM logits (B, 2), index 1 = matched, from what was encoded before; arguments as for `fuse`."""
        return self.itm_head(self.fuse(states, mask, image)[:, 0])

    def match(self, pixels: Tensor, tokens: Mapping[str, Tensor]) -> Tensor:
        """ITM logits (B, 2), index 1 = matched, of (B, 3, H, W) pixels and (B, L) tokens row by row."""
        return self.itm_head(self._fused(pixels, tokens)[:, 0])

    def mlm_logits(self, pixels: Tensor, tokens: Mapping[str, Tensor]) -> Tensor:
        """Logits (B, L, V) of the token that stands at each place, hidden ones to be guessed."""
        return self._guess(self._fused(pixels, tokens))

    # Training (§3.2 and §3.3)

    def forward(self, batch: Rows, pairs: Pairs | None = None) -> Encoded | dict[str, Tensor]:
        """Encode rows on their own, or take the pairs made of them to their losses.

        All that gets a gradient runs in here, so that DDP and FSDP2 see it.

        Args:
            batch: b rows.
            pairs: rows with the states of their partners, or None.

        Returns:
            Without pairs: features `image` and `text` (b, D) and `log_scale` (1,); states `image` (b, N, D) and
            `text` (b, L, D); input `text_mask` (b, L). With pairs: sums of `itm` and `mlm`, and of what
            they got right.
        """
        if pairs is not None:
            return self._pair_losses(batch, pairs)
        image, text = self.image_states(batch.pixels), self.text_states(batch.tokens)
        features = {"image": image.features, "text": text.features, "log_scale": self.log_scale * 1.0}
        return Encoded(features, {"image": image.states, "text": text.states}, {"text_mask": text.mask})

    def contrast(
        self,
        features: Mapping[str, Tensor],
        everyone: Mapping[str, Tensor],
        *,
        row_ids: Tensor,
        ids: Tensor,
        taught: Taught | None = None,
    ) -> dict[str, Tensor]:
        """ITC of the rows with everyone, or with the teacher's features of everyone and of the queue (eq. 6).

        Args:
            features: what `forward` gave for the rows, `image` and `text` (b, D).
            everyone: `image` and `text` (B, D) of all ranks and micro-batches, the rows among them.
            row_ids, ids: (b, K) and (B, K); equal ids are positives of each other.
            taught: the teacher's features, or None without one.

        Returns:
            `itc` where it has a weight, and `scale`, the inverse temperature.
        """
        weight = self.config.itc_weight
        return space.contrast(features, everyone, row_ids=row_ids, ids=ids, taught=taught, weight=weight)

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
        """Draw an image that doesn't fit each text, and a text that doesn't fit each image (§3.2).

        Arguments as for `contrast`; draws: uniform numbers, the same for a row whatever stands beside it.
        """
        words = {"mlm": int((masked(batch)[1] != IGNORED).sum())} if self.config.mlm_weight else {}
        return space.choose(
            features, everyone, row_ids=row_ids, ids=ids, draws=draws,
            config=self.config, itm=bool(self.config.itm_weight), words=words,
        )  # fmt: skip

    @torch.no_grad()
    def teach(self, batch: Rows, states: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Soft targets of the fused losses, asked of the teacher's network (eq. 7).

        batch: b rows; states, inputs: what `forward` of this network gave for them. Returns `mlm` (M, V), logits
        of the hidden tokens in the order of the rows; nothing where none is hidden.
        """
        if not self.config.mlm_weight or not bool((masked(batch)[1] != IGNORED).any()):
            return {}
        hidden, labels = masked(batch)
        mask = inputs["text_mask"][:, : hidden.shape[1]]
        fused = self.fuse(self._text_alone(hidden, mask), mask, self.image_keys_values(states["image"]))
        return {"mlm": self._guess(fused[labels != IGNORED])}

    def loss(self, batch: Rows) -> dict[str, Tensor]:
        """Losses of one batch alone, without other ranks or micro-batches; ``loss`` is the total."""
        return joint_loss(self, batch)

    def clamp_(self) -> None:
        """Keep the temperature within its bounds; called after each optimiser step."""
        space.clamp_scale_(self.log_scale, self.config.logit_scale_min, self.config.logit_scale_max)

    def _pair_losses(self, batch: Rows, pairs: Pairs) -> dict[str, Tensor]:
        image = self.image_keys_values(pairs.states["image"])  # of all images of the pool, once
        hidden: list[tuple[Tensor, Tensor]] = []  # the text that has hidden tokens meets each row's own image
        if self.config.mlm_weight:
            ids, labels = masked(batch)
            real = batch.tokens["attention_mask"].bool()
            hidden = [(self._text_alone(ids, real), real)]
        sums: dict[str, Tensor] = {}
        if self.config.itm_weight:
            texts = (pairs.states["text"], pairs.inputs["text_mask"].bool())
            firsts, fused = meet(self.fuse, texts, image, pairs.partners, hidden)
            sums |= match_sums(self.itm_head(firsts), pairs.partners)
        elif hidden:
            fused = self.fuse(*hidden[0], take_images(image, slice(len(labels))))[:, None]  # (b, 1, L, D)
        if hidden:
            logits = self._guess(fused[:, 0, : labels.shape[1]][labels != IGNORED])  # (M, V)
            truth = labels[labels != IGNORED]
            sums |= guess_sums(logits, truth, soft=pairs.taught.get("mlm"), alpha=pairs.alpha)
        return sums

    def _text_alone(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        return self.text(self.text.embed(input_ids), key_mask=mask, layers=slice(self.fusion_start))

    def _fused(self, pixels: Tensor, tokens: Mapping[str, Tensor]) -> Tensor:
        mask = tokens["attention_mask"].bool()
        return self.fuse(self._text_alone(tokens["input_ids"], mask), mask, self.image_keys_values(self.image(pixels)))

    def _guess(self, states: Tensor) -> Tensor:
        return self.mlm_head(states, self.text.tokens.weight)


def _check(config: AlbefConfig) -> None:
    space.check_pools(config.image_pool, config.text_pool)
    space.check_contrasted(config)
    fusion, layers = config.text.cross_layers, config.text.layers
    if not fusion or tuple(fusion) != tuple(range(min(fusion), layers)):
        raise ConfigError(f"text.cross_layers {list(fusion)} must be the last of {layers} layers, such as [6, 7, 8]")
    if config.text.causal:
        raise ConfigError("text.causal must be false: the fused [CLS] state has to see the whole text")
    if (config.text.cross_width or config.text.width) != config.image.width:
        raise ConfigError(f"text.cross_width {config.text.cross_width} must be image.width {config.image.width}")
    weights = ("itc_weight", "itm_weight", "mlm_weight")
    space.check_weights({name: getattr(config, name) for name in weights})
