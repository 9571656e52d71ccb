"""Random numbers that belong to a row, wherever it stands: on any rank, in any micro-batch, beside any other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm.data.samples import stable_id
from vlm.errors import ConfigError
from vlm.objectives.mlm import mask_tokens


def uniform(keys: Sequence[str], *, seed: int, moment: str, name: str, count: int) -> Tensor:
    """Uniform numbers in [0, 1) for each key, (b, count) float32; a longer row begins with the shorter one's.

    moment: when, such as the step or the epoch. name: what is decided.
    """
    rows = np.empty((len(keys), count), dtype=np.float32)
    for row, key in zip(rows, keys, strict=True):
        generator = np.random.Generator(np.random.Philox(stable_id(f"{seed}/{moment}/{name}/{key}")))
        generator.random(dtype=np.float32, out=row)
    return torch.from_numpy(rows)


def check_maskable(tokenizer: Any, *, whole_words: bool) -> None:
    """Raises ConfigError when the tokenizer has no [MASK] or, for whole words, can't tell where words begin."""
    if tokenizer.mask_id is None:
        raise ConfigError("masked language modelling needs a tokenizer with [MASK]; set tokenizer=wordpiece")
    if whole_words and tokenizer.kind != "wordpiece":
        raise ConfigError(f"masking.whole_words: a {tokenizer.kind} vocabulary doesn't mark where words begin")


def masked(
    batches: Iterable[Any], tokenizer: Any, *, share: float, whole_words: bool, seed: int, epoch: int
) -> Iterable[Any]:
    """The batches with tokens hidden for MLM; which ones depends on seed, epoch and sample alone.

    share: chance of a token or, with `whole_words`, of a word. Raises ConfigError as `check_maskable`.
    """
    check_maskable(tokenizer, whole_words=whole_words)
    continues = tokenizer.continues() if whole_words else None  # (V,)
    special = torch.tensor([tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id])
    for batch in batches:
        ids = batch.tokens["input_ids"]  # (b, L)
        count = 3 * ids.shape[1]
        draws = uniform(batch.keys, seed=seed, moment=f"epoch {epoch}", name="mask", count=count)
        found = mask_tokens(
            ids,
            batch.tokens["attention_mask"].bool() & ~torch.isin(ids, special),
            draws=draws.view(*ids.shape, 3),
            mask_id=tokenizer.mask_id,
            vocab_size=tokenizer.vocab_size,
            share=share,
            starts=None if continues is None else ~continues[ids],
        )
        yield batch.with_masks(found.input_ids, found.labels)
