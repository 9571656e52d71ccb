"""Answers to questions about pictures: written freely, or the likeliest of a list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlm.errors import ConfigError, MissingVerbError
from vlm.generate import GenerationConfig, generate
from vlm.models.cache import DecoderState
from vlm.models.pairing import take_images
from vlm.weights.loaded import VisionLanguageModel

BEAMS = GenerationConfig(beams=3, max_new_tokens=9, min_new_tokens=1)
"""As BLIP's official code writes answers (§5.3)."""
READ = 128
"""Candidates that are read whole for each question, as in ALBEF's and BLIP's official code."""


@dataclass(frozen=True)
class Answer:
    """One of a list of answers."""

    text: str
    probability: float
    """Among those that were read whole."""


@torch.inference_mode()
def write_answers(
    model: VisionLanguageModel,
    pixels: Tensor,
    tokens: Mapping[str, Tensor],
    config: GenerationConfig = BEAMS,
    *,
    draws: Tensor | None = None,
) -> list[str]:
    """The best answer to each question.

    Args:
        model: with a network that answers, `vlm.models.vqa.Vqa`.
        pixels: (P, 3, H, W) normalised; P may divide B, each for several questions in a row.
        tokens: the questions' `input_ids` and `attention_mask`, each (B, L).
        config: how answers are searched for.
        draws: for nucleus sampling, see `vlm.generate.generate`.

    Raises:
        MissingVerbError: the model answers no questions.
    """
    network = _answering(model)
    question, mask = network.question_states(pixels, tokens)
    start = model.tokenizer.start_id if network.config.dec_id is None else network.config.dec_id
    first = torch.full((len(mask), 1), start, device=mask.device)
    state = DecoderState(question, image_mask=mask[:, None, None], capacity=1 + config.max_new_tokens)

    def step(ids: Tensor, held: Any) -> Tensor:
        return network.answer_step(ids, question=held.image, mask=held.image_mask[:, 0, 0], cache=held.cache)

    prompt = {"input_ids": first, "attention_mask": torch.ones_like(first)}
    end, pad = model.tokenizer.end_id, model.tokenizer.pad_id
    found = generate(step, state, prompt, config, end_id=end, pad_id=pad, draws=draws)
    best = zip(found.ids[:, 0].tolist(), found.lengths[:, 0].tolist(), strict=True)
    return [model.tokenizer.decode(ids[:length]) for ids, length in best]


@torch.inference_mode()
def rank_answers(
    model: VisionLanguageModel,
    pixels: Tensor,
    tokens: Mapping[str, Tensor],
    answers: Sequence[str],
    *,
    k: int = READ,
) -> list[list[Answer]]:
    """The k likeliest of some answers to each question, best first (ALBEF §5, BLIP §5.3).

    model, pixels, tokens: as for `write_answers`. answers: the candidates. k: candidates that are read whole for each
    question, those with the likeliest first tokens. Raises MissingVerbError as there, ConfigError without candidates.
    """
    network = _answering(model)
    if k < 1 or not answers or not all(answer.strip() for answer in answers):
        raise ConfigError(f"expected k of at least 1 and answers that aren't blank, got {k} and {len(answers)} answers")
    question, mask = network.question_states(pixels, tokens)
    candidates = model.tokens(answers)
    out = []
    for row in range(len(mask)):  # one by one: k answers of V logits a token are much already
        rows = slice(row, row + 1)
        found = network.rank_states(take_images(question, rows), mask[rows], candidates, k=k)
        best = zip(found.answers[0].tolist(), found.probabilities[0].tolist(), strict=True)
        out.append([Answer(answers[place], probability) for place, probability in best])
    return out


def cant_answer(model: VisionLanguageModel) -> MissingVerbError:
    """The error of a model without a head that answers."""
    heads = getattr(getattr(model.network, "config", None), "heads", ())
    has = f" (it has: {', '.join(heads)})" if heads else ""
    return MissingVerbError(
        f"{model.name} is {model.kind} without a vqa head{has} and answers no questions; a vqa model and "
        "stage 2 of BLIP-2 can"
    )


def _answering(model: VisionLanguageModel) -> Any:
    if not hasattr(model.network, "answer_step"):
        raise cant_answer(model)
    return model.network
