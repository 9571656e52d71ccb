"""Answers written freely: the likeliest token each time, whatever else stands in the batch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.tasks.fused import IMAGE, PLAIN, TEXT, fused_model, med_model
from tests.tasks.small import WORDS, noise
from vlm.errors import ConfigError, MissingVerbError
from vlm.generate import GenerationConfig
from vlm.models.vqa import Vqa, VqaConfig, answer_decoder, med_answer_decoder
from vlm.tasks.ask import Asker
from vlm.tasks.vqa import write_answers
from vlm.weights.loaded import VisionLanguageModel

MED = replace(TEXT, vocab_size=WORDS.vocab_size + 2, cross_layers=(0, 1, 2, 3))
CONFIGS = {
    "albef": VqaConfig(IMAGE, TEXT, answer_decoder(TEXT)),
    "blip": VqaConfig(IMAGE, MED, med_answer_decoder(MED), enc_id=WORDS.vocab_size + 1, dec_id=WORDS.vocab_size),
}
ANSWERS = ["red", "two of them", "it is a box", "no", "a red box"]
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


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_picture_for_all_questions_is_encoded_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = answering(kind), []
    image: Any = model.network.image
    monkeypatch.setattr(
        image, "forward", lambda pixels: (seen.append(len(pixels)), type(image).forward(image, pixels))[1]
    )
    asker = Asker(model, GenerationConfig("greedy", max_new_tokens=5))
    assert asker.ask(noise(1)[0], QUESTIONS) == asker.ask(noise(1) * 3, QUESTIONS)
    assert seen == [1, 3]
    tokens = model.tokens(QUESTIONS)
    with torch.no_grad():
        shared, own = (model.network.question_states(model.pixels(noise(1) * n), tokens)[0] for n in (1, 3))
    for one, other in zip(shared, own, strict=True):
        torch.testing.assert_close(one.keys, other.keys, rtol=1e-5, atol=1e-5)
        assert (one.keys[0] - one.keys[1]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", CONFIGS)
def test_drawn_answers_belong_to_picture_question_and_seed(kind: str) -> None:
    config = GenerationConfig("nucleus", max_new_tokens=5, top_k=20)
    asker = Asker(answering(kind), config)
    together = asker.ask(noise(3), QUESTIONS)
    assert together == [asker.ask(*pair) for pair in zip(noise(3), QUESTIONS, strict=True)]
    assert together != Asker(answering(kind), config, seed=1).ask(noise(3), QUESTIONS)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_list_of_answers_is_ranked_by_likelihood(kind: str) -> None:
    model = answering(kind)
    found = Asker(model, batch_size=2).rank(noise(3), QUESTIONS, ANSWERS)
    for picture, question, ranked in zip(noise(3), QUESTIONS, found, strict=True):
        asked = model.network.question_states(model.pixels(picture), model.tokens(question))
        likely = {}
        for answer in ANSWERS:
            tokens = model.tokens(answer)
            with torch.no_grad():
                logs = model.network.answer_logits(*asked, tokens)[0, :-1].log_softmax(dim=-1)
            likely[answer] = float(logs.gather(1, tokens.input_ids[0, 1:, None]).sum())
        assert [one.text for one in ranked] == sorted(ANSWERS, key=likely.__getitem__, reverse=True)
        assert sum(one.probability for one in ranked) == pytest.approx(1)
        gap = likely[ranked[0].text] - likely[ranked[1].text]
        assert ranked[0].probability / ranked[1].probability == pytest.approx(math.exp(gap), rel=1e-3)
    assert [len(ranked) for ranked in Asker(model).rank(noise(1)[0], QUESTIONS, ANSWERS, k=2)] == [2, 2, 2]
    single = Asker(model).rank(noise(1)[0], QUESTIONS[0], ANSWERS)
    assert [one.text for one in single] == [one.text for one in found[0]]
    with pytest.raises(ConfigError, match="answers that aren't blank, got 128 and 0 answers"):
        Asker(model).rank(noise(1)[0], QUESTIONS[0], [])


def test_models_that_answer_nothing_are_named() -> None:
    model = fused_model()
    with pytest.raises(MissingVerbError, match="fused is an albef model without a vqa head and answers no questions"):
        write_answers(model, model.pixels(noise(1)), model.tokens("why"))
    with pytest.raises(MissingVerbError, match=r"without a vqa head \(it has: itc, itm, lm\)"):
        Asker(med_model())
