"""What is drawn for a row depends on seed, moment and row alone."""

import dataclasses

import pytest
import torch

from tests.train.small import batch
from vlm.data.tokenizers import clip_bpe, wordpiece
from vlm.errors import ConfigError
from vlm.train.draws import masked, uniform

KEYS = [f"sample-{n}" for n in range(200)]


def draw(keys: list[str] = KEYS, **changes) -> torch.Tensor:
    return uniform(keys, **{"seed": 0, "moment": "step 3", "name": "image", "count": 4} | changes)


def test_a_row_draws_the_same_beside_any_others() -> None:
    whole = draw()
    assert whole.shape == (200, 4) and whole.min() >= 0 and whole.max() < 1
    torch.testing.assert_close(draw(KEYS[50:60]), whole[50:60], rtol=0, atol=0)
    torch.testing.assert_close(draw(KEYS[::-1]), whole.flip(0), rtol=0, atol=0)
    torch.testing.assert_close(draw(count=9)[:, :4], whole, rtol=0, atol=0)


@pytest.mark.parametrize("change", [{"seed": 1}, {"moment": "step 4"}, {"name": "text"}])
def test_each_decision_draws_anew(change: dict) -> None:
    assert (draw(**change) - draw()).abs().max() > 0.5


def test_draws_are_even() -> None:
    numbers = draw([f"{n}" for n in range(4000)], count=1).squeeze(1)
    counts = torch.histc(numbers, 10, 0, 1)
    assert (counts - 400).abs().max() < 90


def texts(*captions: str):
    tokens = wordpiece()(list(captions))
    return dataclasses.replace(batch(list(range(len(captions)))), tokens=tokens)


def hide(rows, seed: int = 0, epoch: int = 0, share: float = 0.5, whole_words: bool = True):
    options = {"share": share, "whole_words": whole_words, "seed": seed, "epoch": epoch}
    return next(iter(masked([rows], wordpiece(), **options)))


def test_masks_don_t_depend_on_the_batch() -> None:
    captions = ["a very small bicycle", "unbelievably extraordinary hippopotamuses everywhere", "a frog"]
    rows = texts(*captions)
    whole, part = hide(rows), hide(rows.split(3)[0])
    length = part.labels.shape[1]
    assert torch.equal(whole.labels[:1, :length], part.labels)
    assert torch.equal(whole.masked_ids[:1, :length], part.masked_ids)
    assert not torch.equal(hide(rows, epoch=1).labels, whole.labels)
    assert not torch.equal(hide(rows, seed=1).labels, whole.labels)


def test_words_are_hidden_whole_and_never_the_ends() -> None:
    rows = texts(*["unbelievably extraordinary hippopotamuses everywhere"] * 8)
    continues = wordpiece().continues()[rows.tokens["input_ids"]]
    assert continues.any()
    split = False
    for epoch in range(12):
        found = hide(rows, epoch=epoch)
        chosen = found.labels != -100
        assert not chosen[:, 0].any() and not chosen[:, -1].any()
        assert torch.equal(chosen[:, 1:][continues[:, 1:]], chosen[:, :-1][continues[:, 1:]])
        loose = hide(rows, epoch=epoch, whole_words=False).labels != -100
        split |= not torch.equal(loose[:, 1:][continues[:, 1:]], loose[:, :-1][continues[:, 1:]])
    assert split, "the control: tokens alone would have been split"


def test_a_tokenizer_without_mask_is_refused() -> None:
    with pytest.raises(ConfigError, match="tokenizer=wordpiece"):
        next(iter(masked([], clip_bpe(), share=0.1, whole_words=False, seed=0, epoch=0)), None)
