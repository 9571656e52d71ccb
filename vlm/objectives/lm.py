"""Language modelling (LM): the next token of a text, given the tokens before it and the image (BLIP, 2201.12086)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.objectives.mlm import IGNORED


def with_prompt(input_ids: Tensor, mask: Tensor, prompt_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Texts (B, L) and their mask with a prompt put behind the start token."""
    prompt = input_ids.new_tensor(prompt_ids).expand(len(input_ids), -1)  # (B, P)
    ids = torch.cat([input_ids[:, :1], prompt, input_ids[:, 1:]], dim=1)
    return ids, F.pad(mask.bool(), (len(prompt_ids), 0), value=True)


def next_tokens(input_ids: Tensor, mask: Tensor, *, given: int | Tensor = 1) -> Tensor:
    """What is to be said after each token: (B, L - 1) ids, `IGNORED` where nothing is.

    Args:
        input_ids: (B, L), start and end token included.
        mask: (B, L) true for real tokens; padding is never to be said.
        given: tokens at the beginning that are no answer: the start token, and a prompt's (BLIP's official code
            doesn't learn its captioning prompt); a number, or one for each row (B,).
    """
    place = torch.arange(input_ids.shape[1], device=input_ids.device)
    read = place < (given[:, None] if isinstance(given, Tensor) else given)  # (B or none, L)
    return input_ids.masked_fill(~mask.bool() | read, IGNORED)[:, 1:]


def lm(logits: Tensor, labels: Tensor, *, smoothing: float = 0.1) -> Tensor:
    """Cross-entropy of each next token, with smoothed labels (BLIP §3.2).

    Args:
        logits: (M, V).
        labels: (M,) ids, or `IGNORED`.
        smoothing: share of the target that is spread evenly over the whole vocabulary.

    Returns:
        (M,) losses, 0 where ignored.
    """
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, label_smoothing=smoothing, reduction="none")


def lm_sums(logits: Tensor, labels: Tensor, *, name: str = "lm", smoothing: float = 0.1) -> dict[str, Tensor]:
    """By `name`, the sum of `lm` over (M, V) logits and (M,) labels; by ``NAME_accuracy``, how many are guessed."""
    return {
        name: lm(logits, labels, smoothing=smoothing).sum(),
        f"{name}_accuracy": (logits.argmax(dim=-1) == labels).sum().float(),
    }
