"""Stage 4, BLIP (arXiv 2201.12086): a mixture of encoder-decoder (MED), one text transformer in three roles.

As text encoder it sees the text alone ([CLS], ITC); as image-grounded encoder also the image ([ENC], ITM); as
image-grounded decoder the image and what was said so far ([DEC], LM).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from torch import Tensor, nn

from vlm.errors import ConfigError
from vlm.models import common_space as space
from vlm.models.common_space import ImageStates, TextStates, project
from vlm.models.heads import MlmHead, no_head
from vlm.models.pairing import Keys, begun, match_sums, meet, take_images
from vlm.models.stage import Choice, Draws, Encoded, Pairs, Taught, joint_loss
from vlm.models.transformer import KVCache, Transformer, TransformerConfig
from vlm.models.vit import ViT, ViTConfig
from vlm.objectives.lm import lm_sums, next_tokens, with_prompt
from vlm.objectives.mlm import IGNORED

Head = Literal["itc", "itm", "lm"]
HEADS: tuple[Head, ...] = ("itc", "itm", "lm")
SHARING = ("none", "all_but_self_attention", "all")


def _text() -> TransformerConfig:
    return TransformerConfig(
        vocab_size=30524, width=768, layers=12, heads=12, mlp_width=3072, cross_layers=tuple(range(12)), cross_width=768
    )


@dataclass(frozen=True)
class BlipConfig:
    """Image encoder, MED, its heads and what they are trained on; defaults as in the paper."""

    image: ViTConfig = field(default_factory=lambda: ViTConfig(image_size=224))
    text: TransformerConfig = field(default_factory=_text)
    """Of the encoder and, whatever is shared, of the decoder; its routes follow from `sharing`."""
    heads: tuple[Head, ...] = HEADS
    """What the network can do; ``itm`` draws its negatives by ``itc``, so needs it. Without ``lm`` there is no
    decoder, with ``lm`` alone nothing else."""
    sharing: Literal["none", "all_but_self_attention", "all"] = "all_but_self_attention"
    """What encoder and decoder have in common (§3.1, table 3)."""
    enc_id: int = 30523
    """Id of [ENC], the first token of a text that is matched with an image."""
    dec_id: int = 30522
    """Id of [DEC], the first token of a text that is said of an image."""
    prompt_ids: tuple[int, ...] = ()
    """Ids behind [DEC] that every text said begins with; in training they are put there, not learnt. "a picture
    of" is [1037, 3861, 1997]."""
    embed_dim: int = 256
    """Features of the common space."""
    projection_bias: bool = True
    """Whether the projections to the common space have a bias; CLIP's have none."""
    image_pool: Literal["cls", "mean"] = "cls"
    """The image's feature: its [CLS] state, or the mean of its patches."""
    text_pool: Literal["cls", "eot", "mean"] = "cls"
    """The text's feature: its first state, its last real one, or the mean of those."""
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
    lm_weight: float = 1.0
    """Weight of language modelling; 0 leaves it out."""
    negatives: Literal["hard", "random"] = "hard"
    """ITM's negatives: in proportion to their similarity, or each as likely."""
    hard_share: float = 1.0
    """Share of the rows with a hard negative where `negatives` are hard; see `AlbefConfig`."""
    label_smoothing: float = 0.1
    """Share of LM's target that is spread over the whole vocabulary (§3.2)."""


class Blip(nn.Module):
    """An image encoder and the roles of one text transformer that the heads need."""

    verb_heads = dict.fromkeys(("encode_image", "encode_text", "similarity", "logit_scale", "text_states"), "itc")
    verb_heads |= {"match": "itm", "match_states": "itm", "lm_logits": "lm", "decode": "lm"}

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.loss_weights = {head: float(getattr(config, f"{head}_weight")) for head in config.heads}
        text, width, encodes = config.text, config.text.width, "itc" in config.heads
        speaks, apart = "lm" in config.heads, config.sharing == "none" or not encodes
        routes = ("text", "decoder") if speaks and config.sharing == "all_but_self_attention" else ("text",)
        self.image = ViT(config.image)
        self.text = Transformer(replace(text, self_routes=routes)) if encodes else None
        self.decoder = Transformer(text) if speaks and apart else None
        self.decoder_route = "text" if apart else routes[-1]
        if encodes:
            bias = config.projection_bias
            self.image_projection = space.projection(config.image.width, config.embed_dim, bias=bias)
            self.text_projection = space.projection(width, config.embed_dim, bias=bias)
            self.log_scale = space.log_scale(config.logit_scale_init)
        self.itm_head = nn.Linear(width, 2) if "itm" in config.heads else None
        self.lm_head: MlmHead | None = None
        if speaks:
            self.lm_head = MlmHead(width, text.vocab_size, norm_eps=text.norm_eps, act=text.activation)

    @property
    def teachable(self) -> bool:
        """Whether a teacher has something to say: its features, which ITC is taken with (§3.2)."""
        return bool(self.loss_weights.get("itc"))

    @property
    def logit_scale(self) -> Tensor:
        """(1,) inverse temperature that cosines are multiplied by."""
        return self.log_scale.exp()

    # Text encoder (§3.1): each side alone

    def image_states(self, pixels: Tensor) -> ImageStates:
        """Encode (B, 3, H, W) normalised pixels, once for every text that will meet them or be said of them.

        Without an itc head their features are empty, (B, 0).
        """
        states = self.image(pixels)  # (B, N, D)
        if "itc" not in self.config.heads:
            return ImageStates(states.new_zeros(len(states), 0), states)
        return ImageStates(project(space.pool_image(states, self.config.image_pool), self.image_projection), states)

    def text_states(self, tokens: Mapping[str, Tensor]) -> TextStates:
        """Features of texts, and what the image-grounded encoder starts from: their ids."""
        text, mask = self._encoder("itc"), tokens["attention_mask"].bool()
        states = text(text.embed(tokens["input_ids"]), key_mask=mask)  # (B, L, D)
        pooled = space.pool_text(states, mask, self.config.text_pool)
        return TextStates(project(pooled, self.text_projection), tokens["input_ids"], mask)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Map (B, 3, H, W) normalised pixels to (B, D) unit-norm features."""
        self._need("itc")
        return self.image_states(pixels).features

    def encode_text(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """Map `input_ids` and `attention_mask`, each (B, L), to (B, D) unit-norm features."""
        return self.text_states(tokens).features

    def similarity(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Cosine over temperature, (images, texts)."""
        self._need("itc")
        return self.logit_scale * image_features @ text_features.T

    # Image-grounded encoder (§3.1): does a text belong to an image?

    def image_keys_values(self, states: Tensor) -> Keys:
        """Project image states (P, N, D) to the encoder's keys and values, for each layer."""
        return self._encoder("itm").image_states(states)

    def match_states(self, input_ids: Tensor, mask: Tensor, image: Keys) -> Tensor:
        """ITM logits (B, 2), index 1 = matched, of texts and of images that were encoded before.

        Args:
            input_ids: (B, L), whose first token becomes [ENC].
            mask: (B, L) true for real tokens.
            image: from `image_keys_values`; its images may divide B, each for several texts in a row.
        """
        states = self._encoder("itm").embed(begun(input_ids, self.config.enc_id))
        return self._matched(self._grounded(states, mask, image)[:, 0])

    def match(self, pixels: Tensor, tokens: Mapping[str, Tensor]) -> Tensor:
        """ITM logits (B, 2), index 1 = matched, of (B, 3, H, W) pixels and (B, L) tokens row by row."""
        image = self.image_keys_values(self.image(pixels))
        return self.match_states(tokens["input_ids"], tokens["attention_mask"].bool(), image)

    # Image-grounded decoder (§3.1): what can be said of an image?

    def decoder_keys_values(self, states: Tensor) -> Keys:
        """Project image states (P, N, D) to the decoder's keys and values; the encoder's where these are shared."""
        return self._speaker().image_states(states)

    def lm_logits(self, pixels: Tensor, tokens: Mapping[str, Tensor]) -> Tensor:
        """Logits (B, L, V) of the token after each token; the first token becomes [DEC], a prompt isn't put in."""
        image, mask = self.decoder_keys_values(self.image(pixels)), tokens["attention_mask"].bool()
        return self._say(self._spoken(begun(tokens["input_ids"], self.config.dec_id), mask, image))

    def decode(self, input_ids: Tensor, *, image: Keys, cache: KVCache | None = None) -> Tensor:
        """Logits (B, V) of the token after the given ones.

        Args:
            input_ids: (B, L) as they are: [DEC] and a prompt at first, then, with a cache, the new tokens alone.
            image: from `decoder_keys_values`; its images may divide B, each for several texts in a row.
            cache: keys and values of the tokens before, extended in place.
        """
        return self._say(self._spoken(input_ids, None, image, cache)[:, -1])

    # Training (§3.2)

    def forward(self, batch: space.Rows, pairs: Pairs | None = None) -> Encoded | dict[str, Tensor]:
        """Encode rows on their own, or take the pairs made of them to their losses.

        All that gets a gradient runs in here, so that DDP and FSDP2 see it. Without pairs, of b rows: features
        `image` and `text` (b, D) and `log_scale` (1,), none without an itc head; states `image` (b, N, D); inputs
        `text_ids` and `text_mask` (b, L). With pairs: sums of `itm` and `lm`, and of what they got right.
        """
        if pairs is not None:
            return self._pair_losses(batch, pairs)
        image = self.image_states(batch.pixels)
        inputs = {"text_ids": batch.tokens["input_ids"], "text_mask": batch.tokens["attention_mask"].bool()}
        features = {}
        if self.text is not None:
            text = self.text_states(batch.tokens)
            features = {"image": image.features, "text": text.features, "log_scale": self.log_scale * 1.0}
        return Encoded(features, {"image": image.states}, inputs)

    def contrast(
        self,
        features: Mapping[str, Tensor],
        everyone: Mapping[str, Tensor],
        *,
        row_ids: Tensor,
        ids: Tensor,
        taught: Taught | None = None,
    ) -> dict[str, Tensor]:
        """ITC of the rows with everyone, or with the teacher's features of everyone and of the queue.

        As ALBEF's (`vlm.models.albef.Albef.contrast`); nothing without an itc head.
        """
        if self.text is None:
            return {}
        weight = self.config.itc_weight
        return space.contrast(features, everyone, row_ids=row_ids, ids=ids, taught=taught, weight=weight)

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
        words = {"lm": int((self._prompted(batch.tokens)[2] != IGNORED).sum())} if self.loss_weights.get("lm") else {}
        return space.choose(
            features, everyone, row_ids=row_ids, ids=ids, draws=draws,
            config=self.config, itm=bool(self.loss_weights.get("itm")), words=words,
        )  # fmt: skip

    def loss(self, batch: Any) -> dict[str, Tensor]:
        """Losses of one batch alone, without other ranks or micro-batches; ``loss`` is the total."""
        return joint_loss(self, batch)

    def clamp_(self) -> None:
        """Keep the temperature within its bounds; called after each optimiser step."""
        if self.text is not None:
            space.clamp_scale_(self.log_scale, self.config.logit_scale_min, self.config.logit_scale_max)

    def _pair_losses(self, batch: space.Rows, pairs: Pairs) -> dict[str, Tensor]:
        states, rows = pairs.states["image"], slice(len(batch.pixels))
        image: Keys | None = None
        sums: dict[str, Tensor] = {}
        if self.loss_weights.get("itm"):
            image = self.image_keys_values(states)  # of all images of the pool, once
            words = self._encoder("itm").embed(begun(pairs.inputs["text_ids"], self.config.enc_id))  # (P, L, D)
            firsts, _ = meet(self._grounded, (words, pairs.inputs["text_mask"].bool()), image, pairs.partners)
            sums |= match_sums(self._matched(firsts), pairs.partners)
        if self.loss_weights.get("lm"):
            if image is None or self.decoder is not None:
                own = self.decoder_keys_values(states[rows])
            else:  # what it looks at is shared with the encoder
                own = take_images(image, rows)
            ids, mask, labels = self._prompted(batch.tokens)
            spoken, said = self._spoken(ids[:, :-1], mask[:, :-1], own), labels != IGNORED
            logits, truth = self._say(spoken[said]), labels[said]  # (M, V), (M,)
            sums |= lm_sums(logits, truth, smoothing=self.config.label_smoothing)
        return sums

    def _prompted(self, tokens: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """What the decoder reads, ids and mask (b, L), and what it is to say after each of it but the last."""
        prompt, ids = self.config.prompt_ids, begun(tokens["input_ids"], self.config.dec_id)
        ids, mask = with_prompt(ids, tokens["attention_mask"], prompt)
        return ids, mask, next_tokens(ids, mask, given=1 + len(prompt))

    def _grounded(self, states: Tensor, mask: Tensor, image: Keys) -> Tensor:
        return self._encoder("itm")(states, key_mask=mask, image=image)  # (B, L, D)

    def _matched(self, firsts: Tensor) -> Tensor:
        return cast(nn.Linear, self.itm_head)(firsts)

    def _spoken(self, ids: Tensor, mask: Tensor | None, image: Keys, cache: KVCache | None = None) -> Tensor:
        decoder = self._speaker()
        states = decoder.embed(ids, past=cache.length if cache is not None else 0)
        return decoder(states, key_mask=mask, causal=True, image=image, cache=cache, route=self.decoder_route)

    def _say(self, states: Tensor) -> Tensor:
        return cast(MlmHead, self.lm_head)(states, self._speaker().tokens.weight)

    def _encoder(self, head: str) -> Transformer:
        self._need(head)
        return cast(Transformer, self.text)

    def _speaker(self) -> Transformer:
        self._need("lm")
        return cast(Transformer, self.text if self.decoder is None else self.decoder)

    def _need(self, head: str) -> None:
        if head not in self.config.heads:
            raise no_head("BLIP", head, self.config.heads)


def _check(config: BlipConfig) -> None:
    space.check_pools(config.image_pool, config.text_pool)
    space.check_contrasted(config)
    space.check_choice("sharing", config.sharing, SHARING)
    for head in config.heads:
        space.check_choice("head", head, HEADS)
    if not config.heads or ("itm" in config.heads and "itc" not in config.heads):
        raise ConfigError(f"heads {list(config.heads)}: at least one, and itc beside itm, to find its negatives")
    space.check_weights({f"{head}_weight": getattr(config, f"{head}_weight") for head in config.heads})
    text = config.text
    if not text.cross_layers or (text.cross_width or text.width) != config.image.width:
        raise ConfigError(
            f"text.cross_layers {list(text.cross_layers)} of cross_width {text.cross_width or text.width}: name the "
            f"layers that look at the image, such as {list(range(text.layers))}, and its width {config.image.width}"
        )
    if text.causal or text.self_routes != ("text",):
        raise ConfigError("text.causal must be false and text.self_routes [text]: the decoder's follow from sharing")
    ids = {"enc_id": config.enc_id, "dec_id": config.dec_id} | {f"prompt id {i}": i for i in config.prompt_ids}
    outside = [f"{name} {value}" for name, value in ids.items() if not 0 <= value < text.vocab_size]
    if outside:
        raise ConfigError(f"{', '.join(outside)}: not below text.vocab_size {text.vocab_size}, which counts them in")
