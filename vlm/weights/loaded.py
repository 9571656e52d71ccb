"""A model ready for use: network, tokenizer and preprocessing behind one vocabulary of verbs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm.data.batch import Tokens
from vlm.data.images import load_image
from vlm.data.tokenizers import Tokenizer, wordpiece
from vlm.data.transforms import ImageTransform, pad_pictures
from vlm.errors import ConfigError, DataError, MissingVerbError, VlmError, WeightsError, with_article
from vlm.generate import Generated, GenerationConfig, generate
from vlm.models.cache import DecoderState
from vlm.models.heads import no_head
from vlm.models.stage import can
from vlm.weights.files import save_model
from vlm.weights.say import say
from vlm.weights.shipped import base_of

STAGES = {
    "encode_image": "CLIP, ALBEF, BLIP and stage 1 of BLIP-2",
    "encode_text": "CLIP, ALBEF, BLIP and stage 1 of BLIP-2",
    "similarity": "CLIP, ALBEF, BLIP and stage 1 of BLIP-2",
    "match": "ViLT, ALBEF, BLIP and stage 1 of BLIP-2",
    "mlm_logits": "ViLT and ALBEF",
    "lm_logits": "BLIP and BLIP-2",
    "generate": "BLIP and BLIP-2",
}


class VisionLanguageModel:
    """What `vlm.load` gives; the verbs take and give tensors on the model's device."""

    def __init__(
        self, network: nn.Module, tokenizer: Tokenizer, transform: ImageTransform, *, name: str, family: str
    ) -> None:
        self.network, self.tokenizer, self.transform = network, tokenizer, transform
        self.name, self.family = name, family

    def pixels(self, images: Any) -> Tensor:
        """Preprocess pictures: one or several of path, PIL image, array (H, W, 3) or bytes.

        Returns (B, 3, H, W) on the model's device and in its type. Raises DataError naming a bad picture, or
        where pictures come out in different sizes, which need a mask.
        """
        joined, mask = self.padded(images)
        if mask is not None:
            raise DataError(f"{self.name} sees these pictures in different sizes: use padded(), which gives a mask")
        return joined

    def padded(self, images: Any) -> tuple[Tensor, Tensor | None]:
        """Like `pixels`, for pictures that may come out in different sizes (ViLT).

        Returns (B, 3, H, W), smaller pictures padded at the right and at the bottom, and the `pixel_mask` for
        the verbs: (B, H, W), true on pixels that aren't padding; None when there is none.
        """
        listed = list(images) if isinstance(images, list | tuple) else [images]
        joined, mask = pad_pictures([self.transform(load_image(image)) for image in listed])
        return joined.to(self.device, self.dtype), None if mask is None else mask.to(self.device)

    def tokens(self, texts: str | Iterable[str]) -> Tokens:
        """Ids and mask (B, L) of one or several texts, on the model's device."""
        listed = [texts] if isinstance(texts, str) else list(texts)
        return self.tokenizer(listed).to(self.device)

    @torch.inference_mode()
    def encode_image(self, pixels: Tensor) -> Tensor:
        """Map (B, 3, H, W) to unit-norm features (B, D)."""
        return self._verb("encode_image")(pixels)

    @torch.inference_mode()
    def encode_text(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """Map `input_ids` and `attention_mask` (B, L) to unit-norm features (B, D)."""
        return self._verb("encode_text")(tokens)

    @torch.inference_mode()
    def similarity(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Cosine over temperature, (images, texts)."""
        return self._verb("similarity")(image_features, text_features)

    @torch.inference_mode()
    def generate(
        self,
        pixels: Tensor,
        prompt: Mapping[str, Tensor] | None = None,
        config: GenerationConfig = GenerationConfig(),  # noqa: B008 (frozen)
        *,
        draws: Tensor | None = None,
    ) -> Generated:
        """Write texts about (B, 3, H, W) pixels.

        prompt: tokens (B, P) of how each text begins, as the tokenizer gives them; None for what the model was
        trained with. config, draws: see `vlm.generate.generate`. Raises ConfigError where prompt and text
        together are longer than the model's texts can be.
        """
        network: Any = self.network
        if hasattr(network, "begin"):  # it speaks through a language model
            given = self.tokens([network.config.prompt] * len(pixels)) if prompt is None else prompt
            texts = [self.tokenizer.decode(row) for row in given["input_ids"].tolist()]
            visual = self.visual_prompt(network.look(pixels), texts)
            return say(network, visual, given, config, tokenizer=self.tokenizer, draws=draws)
        if not hasattr(network, "decode"):
            self._verb("generate")
        sizes = network.config
        if prompt is None:
            ids = torch.tensor([[sizes.dec_id, *sizes.prompt_ids]], device=self.device).expand(len(pixels), -1)
            prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        else:  # its start token becomes [DEC]; the end token goes
            ids, mask = prompt["input_ids"][:, :-1], prompt["attention_mask"][:, 1:]
            ids = torch.cat([torch.full_like(ids[:, :1], sizes.dec_id), ids[:, 1:]], dim=1)
            prompt = {"input_ids": ids, "attention_mask": mask}
        length, limit = ids.shape[1] + config.max_new_tokens, sizes.text.context_length
        if length > limit:
            raise ConfigError(
                f"{self.name}: a prompt of {ids.shape[1]} tokens and {config.max_new_tokens} new ones are more than "
                f"its texts can have, {limit}; lower max_new_tokens or shorten the prompt"
            )
        # Projected once; the states themselves aren't needed any more.
        image = network.decoder_keys_values(network.image_states(pixels).states)
        state = DecoderState(image, capacity=length)
        del image
        return generate(
            lambda tokens, held: network.decode(tokens, image=held.image, cache=held.cache),
            state, prompt, config, end_id=self.tokenizer.end_id, pad_id=self.tokenizer.pad_id, draws=draws,
        )  # fmt: skip

    def visual_prompt(self, states: Tensor, texts: Sequence[str]) -> Tensor:
        """What a stage-2 BLIP-2's language model sees of an image before each of these texts: (B, Q, D).

        states: (P, N, width) from the network's `look`; one image may serve all texts. An instructed Q-Former
        (InstructBLIP) reads the text, in a vocabulary of its own: bert-base-uncased's.
        """
        network: Any = self.network
        config = network.config.qformer
        if config.instructed:
            asked = wordpiece(max_length=config.text.context_length)(texts).to(self.device)
            return network.read(states, asked)
        found = network.read(states)
        return found if len(found) == len(texts) else found.expand(len(texts), -1, -1)

    def __getattr__(self, name: str) -> Any:
        """Refuse the verbs of other stages, saying which stages have them."""
        if name in STAGES or name == "logit_scale":
            return self._verb(name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def logit_scale(self) -> Tensor:
        """Inverse temperature, (1,)."""
        return self._verb("logit_scale")

    @property
    def kind(self) -> str:
        """What messages call it, such as ``an albef model``."""
        return f"{with_article(self.family)} model"

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.network.parameters()).dtype

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> VisionLanguageModel:
        """Move the weights; returns the model itself."""
        self.network.to(device=device, dtype=dtype)
        return self

    def save(
        self, folder: Path | str, *, dtype: torch.dtype | None = None, card: str = "", base: str | None = None
    ) -> None:
        """Write a model folder that `vlm.load` reads; see `save_model`. base: name of a shipped model."""
        if not hasattr(self.network, "config"):
            raise VlmError(f"{self.name}: a foreign model has no configuration of ours, so it can't be saved")
        save_model(
            self.network, self.tokenizer, self.transform, folder,
            name=self.name, family=self.family, dtype=dtype, card=card,
            base=None if base is None else base_of(base, where="base"),
        )  # fmt: skip

    def can(self, verb: str) -> bool:
        """Whether the model has a verb and, where that needs one, the head for it."""
        return can(self.network, verb)

    def _verb(self, verb: str) -> Any:
        network: Any = self.network
        heads: dict[str, str] = getattr(network, "verb_heads", {})
        if verb in heads and not self.can(verb):
            raise no_head(self.name, heads[verb], network.config.heads)
        found = getattr(self.network, verb, None)
        if found is None:
            raise MissingVerbError(f"{self.name} is {self.kind} and has no {verb}; {STAGES.get(verb, 'none')} can")
        return found


def exportable(
    model: VisionLanguageModel,
    kind: Any,
    target: str,
    unfit: Callable[[Any], Mapping[str, bool]],
    *,
    advice: str = "",
) -> Any:
    """The network, if what it is to be written as can hold it.

    kind: the class of networks that `target` is for. unfit: network to reasons why it can't be held, and whether
    they are so. advice: what else may help. Raises WeightsError with all reasons.
    """
    if not isinstance(model.network, kind):
        own = hasattr(model.network, "config")
        reason = f"it is {model.kind}" if own else "it is no network of ours"
        raise WeightsError(f"{model.name} can't be written as {target}: {reason}")
    wrong = [reason for reason, found in unfit(model.network).items() if found]
    if wrong:
        raise WeightsError(
            f"{model.name} can't be written as {target}: {'; '.join(wrong)}. Keep it in vlm's own format "
            f"(model.save){advice}."
        )
    return model.network
