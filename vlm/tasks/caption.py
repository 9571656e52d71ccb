"""Captions: what a model with a decoder says of pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.data.batch import Tokens
from vlm.errors import ConfigError, DataError
from vlm.generate import GenerationConfig
from vlm.models.heads import no_head
from vlm.models.packed import pack_linears
from vlm.tasks.zero_shot import Picture, is_picture, picture_batches
from vlm.train.draws import uniform
from vlm.weights.loaded import VisionLanguageModel

UNCUT = 1 << 20
"""Tokens that no prompt has."""


@dataclass(frozen=True)
class Caption:
    """What was said of a picture."""

    text: str
    """With the prompt that was asked for; the one that the model was trained with is left out."""
    score: float | None = None
    """Log-probability over length to the power of the length penalty; None where nothing was searched."""


class Captioner:
    """Says what pictures show.

    >>> captioner = Captioner(vlm.load("runs/captioner"))
    >>> captioner.caption("pet.png")
    'a cat on a sofa'
    """

    def __init__(
        self,
        model: VisionLanguageModel | str | Path,
        config: GenerationConfig | None = None,
        *,
        prompt: str = "",
        seed: int = 0,
        batch_size: int = 16,
    ) -> None:
        """model: from `vlm.load`, or what `vlm.load` takes. config: how texts are searched for, beam search if
        None. prompt: how each text begins; empty for what the model was trained with. seed: of nucleus sampling.
        batch_size: pictures that run at once; no caption depends on it. Raises ConfigError for settings that can't
        be used, MissingVerbError, which names the head, when the model has no decoder.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        self.config = config or GenerationConfig()
        own = not isinstance(model, VisionLanguageModel)
        self.model = _load(model) if not isinstance(model, VisionLanguageModel) else model
        _check_decoder(self.model)
        if own:  # nobody else trains or saves it
            pack_linears(self.model.network)
        self.model.network.eval()
        self.prompt, self.seed, self.batch_size = prompt.strip(), seed, batch_size

    def caption(self, images: Picture | Iterable[Picture]) -> Any:
        """The best caption of one picture, a text, or of several, a list of texts.

        images: one picture (path, PIL image, array (H, W, 3), encoded bytes or open file), or several, also as an
        array (N, H, W, 3). Raises DataError naming a picture that can't be read.
        """
        given: Any = images
        if is_picture(given):
            return next(self.caption_each([given]))[1][0].text
        if not isinstance(given, Iterable):
            raise DataError(f"expected a picture or several, got {type(given).__name__}")
        return [found[0].text for _, found in self.caption_each(given)]

    def caption_each(
        self, images: Iterable[Picture], *, on_error: Callable[[Picture, DataError], None] | None = None
    ) -> Iterator[tuple[Picture, list[Caption]]]:
        """Each picture with its captions, best first, in order: one batch is held at a time.

        on_error: called with a picture that can't be read, which is then left out; None raises the DataError.
        """
        for given, pixels in picture_batches(images, self.model.transform, self.batch_size, on_error=on_error):
            yield from zip(given, self.caption_pixels(pixels), strict=True)

    def caption_pixels(self, pixels: Tensor, keys: Sequence[str] | None = None) -> list[list[Caption]]:
        """Captions of preprocessed pictures (B, 3, H, W), best first.

        keys: names that nucleus sampling draws by, with the seed; None for hashes of the pixels, so that a picture
        gets the same captions wherever it lies and whatever stands beside it.
        """
        config = self.config
        draws = None
        if config.strategy == "nucleus":
            names = content_keys(pixels) if keys is None else keys
            draws = caption_draws(names, seed=self.seed, sequences=config.sequences, count=config.max_new_tokens)
        pixels = pixels.to(self.model.device, self.model.dtype)
        found = self.model.generate(pixels, self._prompts(len(pixels)), config, draws=draws)
        scores = None if found.scores is None else found.scores.tolist()
        return [
            [
                Caption(self._text(ids[:count]), None if scores is None else scores[row][place])
                for place, (ids, count) in enumerate(zip(texts, counts, strict=True))
            ]
            for row, (texts, counts) in enumerate(zip(found.ids.tolist(), found.lengths.tolist(), strict=True))
        ]

    def _prompts(self, count: int) -> Tokens | None:
        if not self.prompt:
            return None
        # Whole, so that a prompt that is too long is refused: cut, it wouldn't be what the text begins with.
        return self.model.tokenizer([self.prompt] * count, max_length=UNCUT).to(self.model.device)

    def _text(self, ids: Sequence[int]) -> str:
        tokenizer = self.model.tokenizer
        # A network may know start tokens that the vocabulary lacks.
        said = tokenizer.decode([number for number in ids if number < tokenizer.vocab_size])
        return f"{self.prompt} {said}".strip()


def content_keys(pixels: Tensor) -> list[str]:
    """A name for each picture (B, 3, H, W), by what it shows."""
    rows = pixels.detach().float().cpu().contiguous().numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=16).hexdigest() for row in rows]


def caption_draws(keys: Sequence[str], *, seed: int, sequences: int, count: int) -> Tensor:
    """(B, sequences, count) uniform numbers that belong to picture and text alone, for nucleus sampling."""
    parts = [
        uniform(keys, seed=seed, moment="caption", name=f"text {number}", count=count) for number in range(sequences)
    ]
    return torch.stack(parts, dim=1)


class Summary:
    """Length and repetition of captions."""

    def __init__(self) -> None:
        self.texts = self.words = self.pairs = self.repeated = 0

    def add(self, text: str) -> None:
        """Count one caption."""
        words = text.lower().split()
        pairs = list(pairwise(words))
        self.texts += 1
        self.words += len(words)
        self.pairs += len(pairs)
        self.repeated += len(pairs) - len(set(pairs))

    @property
    def length(self) -> float:
        """Mean words of a caption."""
        return self.words / self.texts if self.texts else 0.0

    @property
    def repetition(self) -> float:
        """Share of all pairs of neighbouring words that stood in the same caption before, in [0, 1]."""
        return self.repeated / self.pairs if self.pairs else 0.0


def _check_decoder(model: VisionLanguageModel) -> None:
    network: Any = model.network
    if hasattr(network, "begin"):  # a language model speaks for it
        return
    if not hasattr(network, "decode"):
        model._verb("generate")
    if not model.can("decode"):
        raise no_head(model.name, network.verb_heads["decode"], network.config.heads)


def _load(name: str | Path) -> VisionLanguageModel:
    from vlm.weights.load import load

    return load(name)
