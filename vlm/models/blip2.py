"""Stage 5, BLIP-2's first half (arXiv 2301.12597 §3.2): a Q-Former learns to read a frozen image encoder.

ITC compares each query with the text, of which the nearest counts; ITM lets queries and words see each other; ITG says
the text from the queries alone. The image is encoded once for all three, and the queries' pass serves ITC and ITG.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from vlm.errors import ConfigError
from vlm.models import common_space as space
from vlm.models.cache import KVCache
from vlm.models.common_space import ImageStates, TextStates, project
from vlm.models.heads import no_head
from vlm.models.pairing import Keys, begun, match_sums, meet
from vlm.models.qformer import QFormer, QFormerConfig
from vlm.models.stage import Choice, Draws, Encoded, Pairs, Taught, joint_loss
from vlm.models.transformer import TransformerConfig
from vlm.models.vit import ViT, ViTConfig
from vlm.objectives.itc import cosines
from vlm.objectives.lm import lm_sums, next_tokens, with_prompt
from vlm.objectives.mlm import IGNORED

Head = Literal["itc", "itm", "itg"]
HEADS: tuple[Head, ...] = ("itc", "itm", "itg")


@dataclass(frozen=True)
class Blip2Config:
    """The frozen image encoder, the Q-Former, its heads and what they are trained on; defaults as in the paper."""

    image: ViTConfig = field(default_factory=lambda: ViTConfig(image_size=224))
    """Frozen, its last norm with it (LAVIS calls that ln_vision and trains it; the maps to keys and values, which
    follow it, can learn what its gain and offset would)."""
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    """`speaks` follows from `heads`."""
    heads: tuple[Head, ...] = HEADS
    """What the network can do; ``itm`` draws its negatives by ``itc``, so needs it."""
    prompt_ids: tuple[int, ...] = ()
    """Ids behind [DEC] that every text said begins with; in training they are put there, not learnt."""
    embed_dim: int = 256
    """Features of the common space."""
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
    itg_weight: float = 1.0
    """Weight of image-grounded text generation; 0 leaves it out."""
    negatives: Literal["hard", "random"] = "hard"
    """ITM's negatives: in proportion to their similarity, or each as likely."""
    hard_share: float = 1.0
    """Share of the rows with a hard negative where `negatives` are hard; see `AlbefConfig`."""
    itc_smoothing: float = 0.1
    """Share of ITC's target that is spread over everyone (the official code)."""
    label_smoothing: float = 0.1
    """Share of ITG's target that is spread over the whole vocabulary (the official code)."""

    @property
    def text(self) -> TransformerConfig:
        """Sizes of what reads and says texts: the Q-Former's transformer."""
        return self.qformer.text

    @property
    def dec_id(self) -> int:
        """Id of [DEC], the first token of a text that is said of an image."""
        return self.qformer.dec_id


class Blip2(nn.Module):
    """A frozen image encoder, and a Q-Former with the heads of up to three objectives."""

    verb_heads = dict.fromkeys(("encode_image", "encode_text", "similarity", "logit_scale", "text_states"), "itc")
    verb_heads |= {"match": "itm", "match_states": "itm", "lm_logits": "itg", "decode": "itg"}
    teachable = False
    """No loss of this stage has a teacher."""

    def __init__(self, config: Blip2Config) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.loss_weights = {head: float(getattr(config, f"{head}_weight")) for head in config.heads}
        width = config.text.width
        self.image = ViT(config.image).requires_grad_(False).eval()
        self.qformer = QFormer(replace(config.qformer, speaks="itg" in config.heads))
        if "itc" in config.heads:
            self.image_projection = space.projection(width, config.embed_dim, bias=True)
            self.text_projection = space.projection(width, config.embed_dim, bias=True)
            self.log_scale = space.log_scale(config.logit_scale_init)
        self.itm_head = nn.Linear(width, 2) if "itm" in config.heads else None

    def train(self, mode: bool = True) -> Blip2:
        """Training mode for all but the image encoder, which is frozen."""
        super().train(mode)
        self.image.eval()
        return self

    @property
    def logit_scale(self) -> Tensor:
        """(1,) inverse temperature that cosines are multiplied by."""
        return self.log_scale.exp()

    # Each side alone (ITC)

    @torch.no_grad()
    def look(self, pixels: Tensor) -> Tensor:
        """The frozen encoder's states (B, N, D) of (B, 3, H, W) normalised pixels; they never change."""
        return self.image(pixels)

    def image_states(self, pixels: Tensor) -> ImageStates:
        """Encode pixels, once for every text that will meet them or be said of them.

        Features are the queries' (B, Q, D); without an itc head they are empty, (B, 0).
        """
        states = self.look(pixels)
        if "itc" not in self.config.heads:
            return ImageStates(states.new_zeros(len(states), 0), states)
        return ImageStates(project(self.qformer.queries(states), self.image_projection), states)

    def text_states(self, tokens: Mapping[str, Tensor]) -> TextStates:
        """Features of texts, and what meets an image: their ids."""
        self._need("itc")
        ids, mask = tokens["input_ids"], tokens["attention_mask"].bool()
        return TextStates(project(self.qformer.words(ids, mask)[:, 0], self.text_projection), ids, mask)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Map (B, 3, H, W) normalised pixels to the queries' unit-norm features (B, Q, D)."""
        self._need("itc")
        return self.image_states(pixels).features

    def encode_text(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """Map `input_ids` and `attention_mask`, each (B, L), to (B, D) unit-norm features."""
        return self.text_states(tokens).features

    def similarity(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Cosine of the nearest query over temperature, (images, texts), from (images, Q, D) and (texts, D)."""
        self._need("itc")
        return self.logit_scale * cosines(image_features, text_features)

    # Both see each other (ITM)

    def image_keys_values(self, states: Tensor) -> Keys:
        """Project image states (P, N, D) to the keys and values that queries look at, for each layer."""
        return self.qformer.image_keys_values(states)

    def match_states(self, input_ids: Tensor, mask: Tensor, image: Keys) -> Tensor:
        """ITM logits (B, 2), index 1 = matched, the mean over the queries.

        Args:
            input_ids: (B, L) as the tokenizer gives them.
            mask: (B, L) true for real tokens.
            image: from `image_keys_values`; its images may divide B, each for several texts in a row.
        """
        self._need("itm")
        queries = self.qformer.joint(input_ids, mask, image)[:, : self.config.qformer.queries]  # (B, Q, D)
        return cast(nn.Linear, self.itm_head)(queries).mean(dim=1)

    def match(self, pixels: Tensor, tokens: Mapping[str, Tensor]) -> Tensor:
        """ITM logits (B, 2), index 1 = matched, of (B, 3, H, W) pixels and (B, L) tokens row by row."""
        image = self.image_keys_values(self.look(pixels))
        return self.match_states(tokens["input_ids"], tokens["attention_mask"].bool(), image)

    # Words upon queries (ITG)

    def decoder_keys_values(self, states: Tensor) -> Keys:
        """What `decode` looks at: the same as for matching."""
        self._need("itg")
        return self.image_keys_values(states)

    def lm_logits(self, pixels: Tensor, tokens: Mapping[str, Tensor]) -> Tensor:
        """Logits (B, L, V) of the token after each token; the first token becomes [DEC], a prompt isn't put in."""
        self._need("itg")
        cache = KVCache()
        self.qformer.queries(self.look(pixels), cache=cache)
        ids, mask = begun(tokens["input_ids"], self.config.dec_id), tokens["attention_mask"].bool()
        return self.qformer.say(self.qformer.spoken(ids, mask, cache))

    def decode(self, input_ids: Tensor, *, image: Keys, cache: KVCache | None = None) -> Tensor:
        """Logits (B, V) of the token after the given ones; see `QFormer.decode`."""
        self._need("itg")
        return self.qformer.decode(input_ids, image=image, cache=cache)

    # Training (§3.2)

    def forward(self, batch: Any, pairs: Pairs | None = None) -> Encoded | dict[str, Tensor]:
        """Encode rows on their own, or take the pairs made of them to their losses.

        All that gets a gradient runs in here, so that DDP and FSDP2 see it. A batch has tokens, and pixels or `seen`,
        what `look` gave for them before. Without pairs, of b rows: features `image` (b, Q, D), `text` (b, D) and
        `log_scale` (1,), none without an itc head; state `own_past`, what the queries leave for ITG; inputs `image`
        (b, N, D), without gradient since its encoder is frozen, `text_ids` and `text_mask` (b, L). With pairs: sums
        of `itm` and `itg`, and of what they got right.
        """
        if pairs is not None:
            return self._pair_losses(batch, pairs)
        seen = getattr(batch, "seen", None)
        seen = self.look(batch.pixels) if seen is None else seen
        cache = KVCache() if self.loss_weights.get("itg") else None
        queries = self.qformer.queries(seen, cache=cache)
        states = {} if cache is None else {"own_past": self.qformer.past(cache)}
        features = {}
        if "itc" in self.config.heads:
            text = self.text_states(batch.tokens).features
            image = project(queries, self.image_projection)
            features = {"image": image, "text": text, "log_scale": self.log_scale * 1.0}
        ids, mask = batch.tokens["input_ids"], batch.tokens["attention_mask"].bool()
        return Encoded(features, states, {"image": seen, "text_ids": ids, "text_mask": mask})

    def contrast(
        self,
        features: Mapping[str, Tensor],
        everyone: Mapping[str, Tensor],
        *,
        row_ids: Tensor,
        ids: Tensor,
        taught: Taught | None = None,
    ) -> dict[str, Tensor]:
        """ITC of the rows with everyone; nothing without an itc head.

        Arguments and result as for `vlm.models.albef.Albef.contrast`, but image features are (b, Q, D).
        """
        if "itc" not in self.config.heads:
            return {}
        weight, smoothing = self.config.itc_weight, self.config.itc_smoothing
        return space.contrast(
            features, everyone, row_ids=row_ids, ids=ids, taught=taught, weight=weight, smoothing=smoothing
        )

    def choose(
        self,
        batch: space.Rows,
        features: Mapping[str, Tensor],
        everyone: Mapping[str, Tensor],
        *,
        row_ids: Tensor,
        ids: Tensor,
        draws: Draws,
    ) -> Choice:
        """Draw an image that doesn't fit each text, and a text that doesn't fit each image, as ALBEF does.

        Arguments as for `contrast`; draws: uniform numbers, the same for a row whatever stands beside it.
        """
        words = {"itg": int((self._prompted(batch.tokens)[2] != IGNORED).sum())} if self.loss_weights.get("itg") else {}
        return space.choose(
            features, everyone, row_ids=row_ids, ids=ids, draws=draws,
            config=self.config, itm=bool(self.loss_weights.get("itm")), words=words,
        )  # fmt: skip

    def loss(self, batch: Any) -> dict[str, Tensor]:
        """Losses of one batch alone, without other ranks or micro-batches; ``loss`` is the total."""
        return joint_loss(self, batch)

    def clamp_(self) -> None:
        """Keep the temperature within its bounds; called after each optimiser step."""
        if "itc" in self.config.heads:
            space.clamp_scale_(self.log_scale, self.config.logit_scale_min, self.config.logit_scale_max)

    def _pair_losses(self, batch: space.Rows, pairs: Pairs) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        if self.loss_weights.get("itm"):
            image = self.image_keys_values(pairs.inputs["image"])  # of all images of the pool, once
            texts = (pairs.inputs["text_ids"][..., None], pairs.inputs["text_mask"].bool())  # (P, L, 1), (P, L)
            logits, _ = meet(self._judged, texts, image, pairs.partners)  # (3, b, 2)
            sums |= match_sums(logits, pairs.partners)
        if self.loss_weights.get("itg"):
            ids, mask, labels = self._prompted(batch.tokens)
            past = self.qformer.past_of(pairs.states["own_past"])
            spoken, said = self.qformer.spoken(ids[:, :-1], mask[:, :-1], past), labels != IGNORED
            logits, truth = self.qformer.say(spoken[said]), labels[said]  # (M, V), (M,)
            sums |= lm_sums(logits, truth, name="itg", smoothing=self.config.label_smoothing)
        return sums

    def _judged(self, ids: Tensor, mask: Tensor, image: Keys) -> Tensor:
        """Matching in the form that `meet` takes: (B, L, 1) ids to (B, 1, 2)."""
        return self.match_states(ids[..., 0], mask, image)[:, None]

    def _prompted(self, tokens: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """What is read, ids and mask (b, L), and what is to be said after each of it but the last."""
        prompt, ids = self.config.prompt_ids, begun(tokens["input_ids"], self.config.dec_id)
        ids, mask = with_prompt(ids, tokens["attention_mask"], prompt)
        return ids, mask, next_tokens(ids, mask, given=1 + len(prompt))

    def _need(self, head: str) -> None:
        if head not in self.config.heads:
            raise no_head("BLIP-2", head, self.config.heads)


def _check(config: Blip2Config) -> None:
    space.check_contrasted(config)
    for head in config.heads:
        space.check_choice("head", head, HEADS)
    if not config.heads or ("itm" in config.heads and "itc" not in config.heads):
        raise ConfigError(f"heads {list(config.heads)}: at least one, and itc beside itm, to find its negatives")
    space.check_weights({f"{head}_weight": getattr(config, f"{head}_weight") for head in config.heads})
    for name in ("itc_smoothing", "label_smoothing"):
        if not 0 <= getattr(config, name) < 1:
            raise ConfigError(f"{name} is a share and must be at least 0 and below 1, got {getattr(config, name)!r}")
    text = config.text
    if (text.cross_width or text.width) != config.image.width:
        raise ConfigError(
            f"qformer.text.cross_width {text.cross_width or text.width} must be image.width {config.image.width}"
        )
    if config.qformer.instructed or not text.vocab_size:
        raise ConfigError("qformer: stage 1 reads and says texts itself; instructed must be false, vocab_size above 0")
    outside = [i for i in config.prompt_ids if not 0 <= i < text.vocab_size]
    if outside:
        raise ConfigError(f"prompt_ids {outside}: not below qformer.text.vocab_size {text.vocab_size}")
