"""Answers to questions about pictures, written freely; for a list of candidates see `vlm.models.vqa.Vqa.rank`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlm.errors import MissingVerbError
from vlm.generate import GenerationConfig, generate
from vlm.models.cache import DecoderState
from vlm.weights.loaded import VisionLanguageModel

BEAMS = GenerationConfig(beams=3, max_new_tokens=9, min_new_tokens=1)
"""As BLIP's official code writes answers (§5.3)."""


@torch.inference_mode()
def write_answers(
    model: VisionLanguageModel, pixels: Tensor, tokens: Mapping[str, Tensor], config: GenerationConfig = BEAMS
) -> list[str]:
    """The best answer to each question.

    Args:
        model: with a network that answers, `vlm.models.vqa.Vqa`.
        pixels: (B, 3, H, W) normalised.
        tokens: the questions' `input_ids` and `attention_mask`, each (B, L).
        config: greedy or beam search.

    Raises:
        MissingVerbError: the model answers no questions.
    """
    network: Any = model.network
    if not hasattr(network, "answer_step"):
        raise MissingVerbError(f"{model.name} is {model.kind} and answers no questions; a vqa model can")
    question, mask = network.question_states(pixels, tokens)
    start = model.tokenizer.start_id if network.config.dec_id is None else network.config.dec_id
    first = torch.full((len(pixels), 1), start, device=pixels.device)
    state = DecoderState(question, image_mask=mask[:, None, None], capacity=1 + config.max_new_tokens)

    def step(ids: Tensor, held: Any) -> Tensor:
        return network.answer_step(ids, question=held.image, mask=held.image_mask[:, 0, 0], cache=held.cache)

    prompt = {"input_ids": first, "attention_mask": torch.ones_like(first)}
    found = generate(step, state, prompt, config, end_id=model.tokenizer.end_id, pad_id=model.tokenizer.pad_id)
    best = zip(found.ids[:, 0].tolist(), found.lengths[:, 0].tolist(), strict=True)
    return [model.tokenizer.decode(ids[:length]) for ids, length in best]
