"""Answers written freely: the likeliest token each time, whatever else stands in the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.tasks.fused import IMAGE, PLAIN, TEXT, fused_model
from tests.tasks.small import WORDS, noise
from vlm.errors import MissingVerbError
from vlm.generate import GenerationConfig
from vlm.models.vqa import Vqa, VqaConfig, answer_decoder, med_answer_decoder
from vlm.tasks.vqa import write_answers
from vlm.weights.loaded import VisionLanguageModel

MED = replace(TEXT, vocab_size=WORDS.vocab_size + 2, cross_layers=(0, 1, 2, 3))
CONFIGS = {
    "albef": VqaConfig(IMAGE, TEXT, answer_decoder(TEXT)),
    "blip": VqaConfig(IMAGE, MED, med_answer_decoder(MED), enc_id=WORDS.vocab_size + 1, dec_id=WORDS.vocab_size),
}
QUESTIONS = ["what colour is it", "how many of the things are there in the picture", "why"]


def answering(kind: str) -> VisionLanguageModel:
    torch.manual_seed(0)
    network = Vqa(CONFIGS[kind]).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return VisionLanguageModel(network, WORDS, PLAIN, name=kind, family="vqa")


@pytest.mark.parametrize("kind", CONFIGS)
def test_greedy_answers_take_the_likeliest_token_each_time(kind: str) -> None:
    model = answering(kind)
    pixels, tokens = model.pixels(noise(3)), model.tokens(QUESTIONS)
    found = write_answers(model, pixels, tokens, GenerationConfig("greedy", max_new_tokens=5))
    assert len(set(found)) > 1
    for row, question in enumerate(QUESTIONS):
        asked = model.network.question_states(pixels[row : row + 1], model.tokens(question))
        ids = [[WORDS.start_id]]  # becomes [DEC] where there is one
        for _ in range(5):
            answer = {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(1, len(ids[0]), dtype=torch.bool)}
            with torch.no_grad():
                ids[0].append(int(model.network.answer_logits(*asked, answer)[0, -1].argmax()))
            if ids[0][-1] == WORDS.end_id:
                break
        assert found[row] == WORDS.decode(ids[0][1:])


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_answer_doesn_t_change_with_its_neighbours(kind: str) -> None:
    model = answering(kind)
    pixels = model.pixels(noise(3))
    together = write_answers(model, pixels, model.tokens(QUESTIONS))
    alone = [write_answers(model, pixels[i : i + 1], model.tokens(q))[0] for i, q in enumerate(QUESTIONS)]
    assert together == alone


def test_models_that_answer_nothing_are_named() -> None:
    model = fused_model()
    with pytest.raises(MissingVerbError, match="fused is an albef model and answers no questions"):
        write_answers(model, model.pixels(noise(1)), model.tokens("why"))
