"""Questions: asked as in training, answered alike in any batch; several turns, and the answer as it is written."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from tests.models.small_llm import FIRST, llm_folder, stage
from tests.tasks.small import colour_model, noise, random_model
from vlm.data.prompts import Prompts
from vlm.errors import ConfigError, MissingVerbError
from vlm.generate import GenerationConfig
from vlm.tasks.ask import Asker, Chat
from vlm.tasks.caption import Captioner
from vlm.weights.llm import load_llm_tokenizer
from vlm.weights.loaded import VisionLanguageModel
from vlm.weights.say import say

QUESTIONS = ["what colour is it ?", "what ?", "is the box seen here ?"]
NUCLEUS = GenerationConfig("nucleus", max_new_tokens=6)


@cache
def model(kind: str = "llama") -> VisionLanguageModel:
    with TemporaryDirectory() as folder:
        tokenizer = load_llm_tokenizer(str(llm_folder(Path(folder), kind.removesuffix(FIRST))))
    transform = replace(random_model().transform, size=32)
    return VisionLanguageModel(
        stage(kind, seed=9 if kind == "t5" else 0), tokenizer, transform, name="small", family="blip2-llm"
    )


@pytest.mark.parametrize("kind", ["llama", "llama" + FIRST, "t5"])
@pytest.mark.parametrize("config", [GenerationConfig(beams=3, max_new_tokens=6), NUCLEUS], ids=lambda c: c.strategy)
def test_no_answer_depends_on_those_beside_it(kind: str, config: GenerationConfig) -> None:
    pictures = noise(3)
    asker = Asker(model(kind), config)
    together = asker.ask(pictures, QUESTIONS)
    assert together == [asker.ask(picture, one) for picture, one in zip(pictures, QUESTIONS, strict=True)]
    assert together == Asker(model(kind), config, batch_size=2).ask(pictures, QUESTIONS)
    assert len(set(together)) > 1


@pytest.mark.parametrize("kind", ["llama", "llama" + FIRST, "opt", "t5"])
def test_batched_logits_equal_single_ones(kind: str) -> None:
    """Questions of different lengths are padded on the left; what is searched from doesn't change by it."""
    one, prompts = model(kind), Prompts()
    pixels = one.pixels(noise(3))
    tokens = one.tokens([prompts.ask(question) for question in QUESTIONS])
    network = one.network
    seen: list[torch.Tensor] = []

    def logits(rows: slice) -> torch.Tensor:
        visual = network.visual_prompt(pixels[rows])  # type: ignore[operator]
        state = network.begin(visual, *prompt(tokens.select(rows)))  # type: ignore[operator]
        steps = [state.take_first(), *(network.step(token[rows], state) for token in seen)]  # type: ignore[operator]
        return torch.stack(steps, dim=1)  # (B, steps, V)

    def prompt(chosen: object) -> tuple[torch.Tensor, torch.Tensor]:
        return chosen.input_ids[:, :-1], chosen.attention_mask[:, 1:]  # type: ignore[attr-defined]

    with torch.inference_mode():
        for _ in range(3):
            seen.append(logits(slice(0, 3))[:, -1].argmax(dim=1, keepdim=True))
        whole = logits(slice(0, 3))
        for row in range(3):
            torch.testing.assert_close(logits(slice(row, row + 1)), whole[row : row + 1], rtol=1e-5, atol=1e-5)


def test_a_picture_for_all_questions_is_as_one_for_each() -> None:
    asker = Asker(model(), GenerationConfig(beams=2, max_new_tokens=5))
    picture = noise(1)[0]
    assert asker.ask(picture, QUESTIONS) == asker.ask([picture] * 3, QUESTIONS)
    with pytest.raises(ConfigError, match="2 pictures and 3 questions"):
        asker.ask(noise(2), QUESTIONS)


@pytest.mark.parametrize("kind", ["llama", "llama" + FIRST])
def test_turns_see_those_before_and_stream_what_they_say(kind: str) -> None:
    pieces: list[str] = []
    chat = Chat(model(kind), noise(1)[0], GenerationConfig("greedy", max_new_tokens=8))
    first = chat.say(QUESTIONS[0], on_text=pieces.append)
    assert "".join(pieces) == first and len(pieces) > 1
    second = chat.say(QUESTIONS[1])
    alone = Chat(model(kind), noise(1)[0], GenerationConfig("greedy", max_new_tokens=8))
    assert alone.say(QUESTIONS[0]) == first
    prompts = Prompts()
    asked = model(kind).tokens([prompts.ask(QUESTIONS[1], [(QUESTIONS[0], first)])])
    visual = model(kind).network.visual_prompt(model(kind).pixels(noise(1)[0]))  # type: ignore[operator]
    found = say(model(kind).network, visual, asked, chat.config, tokenizer=model(kind).tokenizer)
    assert model(kind).tokenizer.decode(found.ids[0, 0].tolist()).split("Question")[0].strip() == second
    assert chat.turns == [(QUESTIONS[0], first), (QUESTIONS[1], second)]


def test_chat_too_long_for_the_language_model_is_refused() -> None:
    chat = Chat(model(), noise(1)[0], GenerationConfig("greedy", max_new_tokens=8))
    with pytest.raises(ConfigError, match="more than smollm2 can read, 64; lower max_new_tokens"):
        chat.say("what " * 60)
    assert not chat.turns


def test_a_text_that_would_be_cut_is_refused() -> None:
    """T5 has no limit of its own; a chat's last question, which stands behind all turns, would be lost first."""
    one = model("t5")
    short = replace(one.tokenizer, max_length=12)
    asker = Asker(VisionLanguageModel(one.network, short, one.transform, name="s", family="blip2-llm"), NUCLEUS)
    assert isinstance(asker.ask(noise(1)[0], "what ?"), str)
    with pytest.raises(ConfigError, match="at most 10 can be read; shorten it"):
        asker.ask(noise(1)[0], "what " * 20)


def test_captions_by_prompt() -> None:
    plain = Captioner(model(), GenerationConfig(beams=2, max_new_tokens=5))
    asked = Captioner(model(), GenerationConfig(beams=2, max_new_tokens=5), prompt="a red")
    pictures = noise(3)
    assert plain.caption(pictures) == [plain.caption(picture) for picture in pictures]
    assert all(text.startswith("a red") for text in asked.caption(pictures))


def test_models_that_dont_answer_say_so() -> None:
    with pytest.raises(MissingVerbError, match="answers no questions"):
        Asker(colour_model())
    with pytest.raises(MissingVerbError, match="small writes answers and chooses none from a list; a vqa model can"):
        Asker(model()).rank(noise(1)[0], QUESTIONS, ["a", "b"])
    with pytest.raises(MissingVerbError, match="only stage 2"):
        Chat(colour_model(), noise(1)[0])
    with pytest.raises(MissingVerbError, match="no encode_text; CLIP, ALBEF, BLIP and stage 1 of BLIP-2 can"):
        model().encode_text(model().tokens(QUESTIONS))
    with pytest.raises(ConfigError, match="as it goes"):
        Chat(model(), noise(1)[0], GenerationConfig())
