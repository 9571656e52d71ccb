"""What a text begins with and a model reads but doesn't say: a caption's prompt, a question, half of a caption."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlm.data.batch import Tokens
from vlm.data.tokenizers import Tokenizer
from vlm.errors import ConfigError


@dataclass(frozen=True)
class Prompts:
    """How texts begin for a model that says them."""

    caption: str = ""
    """Before a caption, such as "a photo of"."""
    question: str = "Question: {} Answer:"
    """Before the answer of a sample with a question, which takes the place of {} (BLIP-2, arXiv 2301.12597 §4.1)."""
    split: bool = False
    """Whether a caption is cut at a random word, and only what stands behind is said (prefix LM, §3.3)."""

    def __post_init__(self) -> None:
        if self.question.count("{}") != 1:
            raise ConfigError(f"question {self.question!r}: expected one {{}}, the place of the question")

    def ask(self, question: str, before: Sequence[tuple[str, str]] = ()) -> str:
        """The text that a question is asked with, after earlier questions with their answers."""
        turns = [f"{self.question.replace('{}', asked.strip())} {answer.strip()}" for asked, answer in before]
        return " ".join([*turns, self.question.replace("{}", question.strip())])


def asked(
    meta: Mapping[str, Any], caption: str, prompts: Prompts | None, rng: random.Random | None
) -> tuple[str, str, float]:
    """What stands before a sample's text, the text, and which share of the text is given with it.

    meta: a sample's JSON; where it has ``pairs``, one question with its answer is drawn. caption: the text else.
    prompts: None for no prompt. rng: None for the first pair, and nothing cut.
    """
    if prompts is None:
        return "", caption, 0.0
    pairs = meta.get("pairs")
    if isinstance(pairs, list) and pairs:
        question, answer = pairs[0] if rng is None else rng.choice(pairs)
        return prompts.ask(str(question)), str(answer), 0.0
    cut = rng.random() if prompts.split and rng is not None else 0.0
    return prompts.caption.strip(), caption, cut


def tokenised(
    tokenizer: Tokenizer, texts: Sequence[tuple[str, str, float]], *, max_length: int
) -> tuple[Tokens, Tensor | None]:
    """Ids of texts behind their prompts, and how many tokens of each are given.

    Args:
        tokenizer: of the model.
        texts: prompt, text, and the share of the text's tokens that is given too; see `asked`.
        max_length: tokens of a text with its start and end, the prompt not counted.

    Returns:
        Tokens (B, L), and (B,) leading tokens that are given, the start token counted; None where it is alone.
    """
    if not any(prompt or cut for prompt, _, cut in texts):
        return tokenizer([text for _, text, _ in texts], max_length=max_length), None
    before = tokenizer([prompt for prompt, _, _ in texts])
    room = max_length + int(before.attention_mask.sum(dim=1).max()) - 2
    # At once, since many tokenizers cut a word differently after a space.
    tokens = tokenizer([f"{prompt} {text}".strip() for prompt, text, _ in texts], max_length=room)
    # Each behind its own prompt, not behind the longest: what is left of a text doesn't depend on those beside it.
    tokens = _cut(tokens, before.attention_mask.sum(dim=1) + (max_length - 2), tokenizer)
    given = []
    for row, (_, _, cut) in enumerate(texts):
        own = before.input_ids[row][before.attention_mask[row]].tolist()[:-1]
        ids = tokens.input_ids[row][tokens.attention_mask[row]].tolist()
        count = next((i for i, (a, b) in enumerate(zip(own, ids, strict=False)) if a != b), min(len(own), len(ids) - 1))
        given.append(count + int(cut * (len(ids) - count - 1)))  # the end token is always said
    return tokens, torch.tensor(given, dtype=torch.int64)


def _cut(tokens: Tokens, lengths: Tensor, tokenizer: Tokenizer) -> Tokens:
    """Texts of at most (B,) `lengths` tokens, of which the last is the end token."""
    place = torch.arange(tokens.input_ids.shape[1])[None]  # (1, L)
    mask = tokens.attention_mask & (place < lengths[:, None])
    end = (tokens.attention_mask.sum(dim=1) > lengths)[:, None] & (place == lengths[:, None] - 1)
    ids = tokens.input_ids.masked_fill(~mask, tokenizer.pad_id).masked_fill(end, tokenizer.end_id)
    return Tokens(ids, mask).trim()
