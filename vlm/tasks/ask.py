"""Questions about pictures: single ones, and several turns about one picture with the answer as it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.data.prompts import Prompts
from vlm.errors import ConfigError, MissingVerbError
from vlm.generate import Generated, GenerationConfig
from vlm.models.lora import merge_lora
from vlm.models.packed import pack_linears
from vlm.tasks.caption import caption_draws, content_keys
from vlm.tasks.vqa import READ, Answer, cant_answer, rank_answers, write_answers
from vlm.tasks.zero_shot import Picture, is_picture
from vlm.weights.loaded import VisionLanguageModel
from vlm.weights.say import say

ANSWER = GenerationConfig(strategy="beam", beams=5, max_new_tokens=20, min_new_tokens=1)
TURN = GenerationConfig(strategy="greedy", max_new_tokens=60, min_new_tokens=1)


def check_questions(questions: Sequence[str]) -> None:
    """Raises ConfigError where a question is empty, which says its place."""
    empty = [number for number, question in enumerate(questions, start=1) if not question.strip()]
    if empty:
        raise ConfigError(f"question {empty[0]} of {len(questions)} is empty")


class Asker:
    """Answers questions about pictures.

    >>> asker = Asker(vlm.load("runs/blip2-llm"))
    >>> asker.ask("pet.png", "What animal is this?")
    'a cat'
    """

    def __init__(
        self,
        model: VisionLanguageModel | str | Path,
        config: GenerationConfig | None = None,
        *,
        seed: int = 0,
        batch_size: int = 16,
    ) -> None:
        """model: stage 2 of BLIP-2, or BLIP's or ALBEF's question answering; from `vlm.load`, or what that takes.
        config: how answers are searched for; None for the likeliest of five beams. seed: of nucleus sampling.
        batch_size: questions that run at once; no answer depends on it.

        Raises MissingVerbError where the model answers nothing, ConfigError for settings that can't be used.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        self.model = ready(model)
        self.config = config or ANSWER
        self.seed, self.batch_size = seed, batch_size
        network: Any = self.model.network
        if not hasattr(network, "begin") and not hasattr(network, "answer_step"):
            raise cant_answer(self.model)
        self.speaks = hasattr(network, "begin")

    def ask(self, images: Picture | Iterable[Picture], questions: str | Sequence[str]) -> Any:
        """The answer to a question, a text; or a list of them, one for each question.

        images: a picture for all questions, or one for each. Raises DataError naming a picture that can't be read,
        ConfigError for an empty question, or when there are as many pictures as questions neither.
        """
        answers: list[str] = []
        for pictures, asked in self._batches(images, questions):
            answers += self._answers(pictures, asked)
        return answers[0] if isinstance(questions, str) else answers

    def rank(
        self, images: Picture | Iterable[Picture], questions: str | Sequence[str], answers: Sequence[str], *,
        k: int = READ,
    ) -> Any:  # fmt: skip
        """The likeliest of some answers to a question, a list of `Answer`, best first; or such a list for each.

        images, questions: as for `ask`. answers: the candidates. k: candidates that are read whole for each question,
        those with the likeliest first tokens. Raises as `ask`; MissingVerbError for stage 2 of BLIP-2, which has no
        answer decoder.
        """
        if self.speaks:
            raise MissingVerbError(f"{self.model.name} writes answers and chooses none from a list; a vqa model can")
        found: list[list[Answer]] = []
        for pictures, asked in self._batches(images, questions):
            found += rank_answers(self.model, self.model.pixels(pictures), self.model.tokens(asked), answers, k=k)
        return found[0] if isinstance(questions, str) else found

    def _batches(
        self, images: Picture | Iterable[Picture], questions: str | Sequence[str]
    ) -> Iterator[tuple[list[Any], list[str]]]:
        """Pictures, one or as many as questions, with questions that run at once."""
        asked = [questions] if isinstance(questions, str) else list(questions)
        check_questions(asked)
        given: Any = images
        pictures = [given] if is_picture(given) else list(given)
        if len(pictures) not in (1, len(asked)):
            raise ConfigError(f"{len(pictures)} pictures and {len(asked)} questions: give one, or as many as questions")
        for start in range(0, len(asked), self.batch_size):
            cut = slice(start, start + self.batch_size)
            yield pictures if len(pictures) == 1 else pictures[cut], asked[cut]

    @torch.inference_mode()
    def _answers(self, pictures: list[Any], questions: list[str]) -> list[str]:
        model = self.model
        pixels = model.pixels(pictures)  # a picture for all is read once
        draws = None
        if self.config.strategy == "nucleus":
            keys = [f"{key}/{one}" for key, one in zip(_keys(pixels, len(questions)), questions, strict=True)]
            draws = _draws(keys, self.seed, self.config)
        if not self.speaks:
            return write_answers(model, pixels, model.tokens(questions), self.config, draws=draws)
        network: Any = model.network
        prompts = prompts_of(model)
        asked = [prompts.ask(one) for one in questions]
        visual = model.visual_prompt(network.look(pixels), asked)
        tokens = model.tokens(asked)
        found = say(network, visual, tokens, self.config, tokenizer=model.tokenizer, draws=draws)
        return [_answer(text, prompts) for text in texts(model, found)]


class Chat:
    """Several turns about one picture; each sees those before.

    >>> chat = Chat(vlm.load("runs/blip2-llm"), "pet.png")
    >>> chat.say("What animal is this?")
    'a cat'
    >>> chat.say("Where is it?", on_text=lambda piece: print(piece, end="", flush=True))
    """

    def __init__(
        self, model: VisionLanguageModel | str | Path, image: Picture, config: GenerationConfig | None = None,
        *, seed: int = 0,
    ) -> None:  # fmt: skip
        """model: stage 2 of BLIP-2. config: greedy or nucleus search, which can be streamed; greedy if None.

        Raises DataError when the picture can't be read, MissingVerbError for a model of another kind, ConfigError for
        beam search.
        """
        self.model = ready(model)
        self.config = config or TURN
        self.seed = seed
        network: Any = self.model.network
        if not hasattr(network, "begin"):
            raise MissingVerbError(f"{self.model.name} is {self.model.kind}; only stage 2 of BLIP-2 chats")
        if self.config.strategy == "beam" or self.config.sequences != 1:
            raise ConfigError("a chat writes one answer as it goes: strategy greedy or nucleus, sequences 1")
        with torch.inference_mode():
            pixels = self.model.pixels(image)
            self._seen = network.look(pixels)  # (1, N, width)
        self._key = content_keys(pixels)[0]
        self.turns: list[tuple[str, str]] = []
        """Questions with their answers."""

    @torch.inference_mode()
    def say(self, question: str, *, on_text: Callable[[str], None] | None = None) -> str:
        """The answer to a question after the turns before. on_text: called with each new piece of the answer.

        Raises ConfigError for an empty question, and when the turns are longer than the language model can read, which
        leaves them as they were.
        """
        check_questions([question])
        model, prompts = self.model, prompts_of(self.model)
        asked = [prompts.ask(question, self.turns)]
        tokens, visual = model.tokens(asked), model.visual_prompt(self._seen, asked)
        draws = None
        if self.config.strategy == "nucleus":
            draws = _draws([f"{self._key}/{len(self.turns)}/{question}"], self.seed, self.config)
        written = _Written(model, prompts, on_text)
        found = say(
            model.network, visual, tokens, self.config, tokenizer=model.tokenizer, draws=draws,
            on_tokens=written.add,
        )  # fmt: skip
        answer = _answer(texts(model, found)[0], prompts)
        written.finish(answer)
        self.turns.append((question, answer))
        return answer


class _Written:
    """Hands on what is new of an answer while its tokens come in."""

    def __init__(self, model: VisionLanguageModel, prompts: Prompts, on_text: Callable[[str], None] | None) -> None:
        self.model, self.prompts, self.on_text = model, prompts, on_text
        self.ids: list[int] = []
        self.shown = ""

    def add(self, tokens: Tensor) -> None:
        """A further token (1,)."""
        if self.on_text is None:
            return
        self.ids.append(int(tokens[0]))
        text = self.model.tokenizer.decode(self.ids)
        head = _head(self.prompts)
        # Half a letter, or what may become the next question's head, isn't shown yet.
        held = next((n for n in range(len(head), 0, -1) if text.endswith(head[:n])), 0) if head else 0
        if not text.endswith("\ufffd"):
            self.finish(_answer(text[: len(text) - held], self.prompts))

    def finish(self, text: str) -> None:
        """Show what of the text hasn't been shown."""
        if self.on_text is not None and text.startswith(self.shown) and len(text) > len(self.shown):
            self.on_text(text[len(self.shown) :])
            self.shown = text


def ready(model: VisionLanguageModel | str | Path) -> VisionLanguageModel:
    """A model in eval mode; one that is loaded here, and nobody else trains or saves, also as fast as it gets."""
    if isinstance(model, VisionLanguageModel):
        model.network.eval()
        return model
    from vlm.weights.load import load

    loaded = load(model)
    quicken(loaded)
    return loaded


def quicken(model: VisionLanguageModel) -> None:
    """Merge LoRA and lay linear layers out for the CPU, of a model that is only run from now on."""
    merge_lora(model.network)
    pack_linears(model.network)


def prompts_of(model: VisionLanguageModel) -> Prompts:
    """How the model's texts begin."""
    config: Any = model.network.config
    return Prompts(config.prompt, config.question)


def texts(model: VisionLanguageModel, found: Generated) -> list[str]:
    """The best text of each row."""
    rows = zip(found.ids[:, 0].tolist(), found.lengths[:, 0].tolist(), strict=True)
    size = model.tokenizer.vocab_size  # an LLM's embedding may have rows without a word
    return [model.tokenizer.decode([token for token in ids[:length] if token < size]) for ids, length in rows]


def _head(prompts: Prompts) -> str:
    """What stands before a question, such as "Question:"."""
    return prompts.question.split("{}")[0].strip()


def _answer(text: str, prompts: Prompts) -> str:
    """An answer, up to where the model begins to ask itself."""
    head = _head(prompts)
    return (text.split(head)[0] if head else text).strip()


def _keys(pixels: Tensor, count: int) -> list[str]:
    keys = content_keys(pixels)
    return keys * count if len(keys) == 1 else keys


def _draws(keys: Sequence[str], seed: int, config: GenerationConfig) -> Tensor:
    return caption_draws(keys, seed=seed, sequences=config.sequences, count=config.max_new_tokens)
