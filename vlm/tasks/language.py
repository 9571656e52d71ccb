"""Language modelling: how well a model foresees the words of each picture's own text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vlm.data.loader import evaluation_batches
from vlm.errors import DataError
from vlm.objectives.lm import lm, next_tokens, with_prompt
from vlm.objectives.mlm import IGNORED
from vlm.train.run import make_prompts
from vlm.weights.loaded import VisionLanguageModel


@dataclass(frozen=True)
class LanguageReport:
    """Figures over all tokens of all texts, end tokens included and a prompt left out."""

    loss: float
    """Mean of minus the log of the next token's probability, in nats; labels aren't smoothed."""
    accuracy: float
    """Share of the tokens that were the likeliest."""
    tokens: int

    def figures(self) -> dict[str, float]:
        """Plain numbers for a training log."""
        return {"lm_loss": self.loss, "lm_accuracy": self.accuracy}


@torch.inference_mode()
def evaluate_language(model: VisionLanguageModel, source: Any, *, batch_size: int = 64) -> LanguageReport:
    """Read each picture's main caption token by token, with the model's own prompt before it.

    Raises MissingVerbError for a model without `lm_logits`, DataError when no picture can be read.
    """
    settings = getattr(model.network, "config", None)
    prompt: tuple[int, ...] = getattr(settings, "prompt_ids", ())
    total, right, tokens = 0.0, 0, 0
    for batch in evaluation_batches(
        source, tokenizer=model.tokenizer, transform=model.transform, batch_size=batch_size,
        prompts=make_prompts(settings),
    ):  # fmt: skip
        here = batch.to(model.device)
        ids, mask = with_prompt(here.tokens.input_ids, here.tokens.attention_mask, prompt)
        labels = next_tokens(ids, mask, given=1 + len(prompt) if here.given is None else here.given)  # (b, L - 1)
        said, given = labels != IGNORED, {} if here.given is None else {"given": here.given}
        logits = model.lm_logits(here.pixels.to(model.dtype), {"input_ids": ids, "attention_mask": mask}, **given)
        chosen, truth = logits[:, :-1][said], labels[said]  # (M, V), (M,)
        total += float(lm(chosen, truth, smoothing=0.0).double().sum())
        right += int((chosen.argmax(dim=-1) == truth).sum())
        tokens += len(truth)
    if not tokens:
        raise DataError(f"{source.name}: no picture could be read")
    return LanguageReport(total / tokens, right / tokens, tokens)
