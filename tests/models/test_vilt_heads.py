"""ViLT's heads: each learns from labels, each is named where it is missing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.small_vilt import ALL_HEADS, IMAGE, SMALL, build, pictures, texts
from vlm.errors import ConfigError, MissingVerbError
from vlm.models.vilt import Vilt
from vlm.models.vilt_heads import head_loss
from vlm.objectives.mlm import IGNORED


def close(a: Tensor, b: Tensor, within: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, rtol=within, atol=within)


def test_every_head_learns_from_labels() -> None:
    network, tokens, pixels = build(ALL_HEADS).train(), texts([4, 5, 6, 4]), pictures(4)
    pair = torch.stack([pixels, pictures(4, seed=7)], dim=1)
    scores = torch.tensor([[1.0, 0.0, 0.3], [0.0, 0.6, 0.0], [0.0, 0.0, 1.0], [1.0, 0.9, 0.0]])
    hidden = torch.full_like(tokens.input_ids, IGNORED)
    hidden[:, 1] = torch.tensor([7, 8, 9, 10])
    labels = {
        "rank": torch.tensor([0, 1]),
        "vqa": scores,
        "nlvr2": torch.tensor([0, 1, 1, 0]),
        "itm": torch.tensor([True, False, True, False]),
        "mlm": hidden,
    }
    losses = {
        name: head_loss(network, name, pair if name == "nlvr2" else pixels, tokens, given)
        for name, given in labels.items()
    }
    by_hand = {
        "rank": F.cross_entropy(network.rank_scores(pixels, tokens).view(2, 2), labels["rank"]),
        "vqa": F.binary_cross_entropy_with_logits(network.vqa_logits(pixels, tokens), scores) * 3,
        "nlvr2": F.cross_entropy(network.nlvr2_logits(pair, tokens), labels["nlvr2"]),
        "itm": F.cross_entropy(network.match(pixels, tokens), labels["itm"].long()),
        "mlm": F.cross_entropy(network.mlm_logits(pixels, tokens)[:, 1], hidden[:, 1]),
    }
    for name, loss in by_hand.items():
        close(losses[name], loss)
    for name, loss in losses.items():
        network.zero_grad()
        loss.backward()
        assert loss.isfinite() and loss > 0
        with_gradient = {n.split(".")[0] for n, p in network.named_parameters() if p.grad is not None}
        assert name in with_gradient and {"image", "words", "modality"} <= with_gradient
        others = {"rank", "vqa", "nlvr2", "itm", "mlm"} - {name}
        assert not others & with_gradient
        assert ("second_image" in with_gradient) == (name == "nlvr2")


@torch.no_grad()
def test_the_second_picture_is_another_kind() -> None:
    network, tokens, pixels = build(ALL_HEADS), texts([4, 5]), pictures(2)
    pair = torch.stack([pixels, pixels], dim=1)
    masks = torch.ones(2, 2, 24, 24, dtype=torch.bool)
    logits = network.nlvr2_logits(pair, tokens)
    close(network.nlvr2_logits(pair, tokens, masks), logits)
    network.second_image.copy_(network.modality[1:])
    assert (network.nlvr2_logits(pair, tokens) - logits).abs().max() > 1e-3
    fresh = Vilt(ALL_HEADS)
    assert torch.equal(fresh.second_image, fresh.modality[1:])


@torch.no_grad()
def test_a_rank_head_ranks_where_there_is_no_matching() -> None:
    network = build(replace(SMALL, heads=("rank",)))
    tokens, pixels = texts([4, 5]), pictures(2)
    logits = network.match(pixels, tokens)
    close(logits, torch.stack([torch.zeros(2), network.rank_scores(pixels, tokens)], dim=1))


@pytest.mark.parametrize("verb", ["match", "mlm_logits", "rank_scores", "vqa_logits", "nlvr2_logits"])
def test_a_missing_head_is_named(verb: str) -> None:
    name = {"match": "itm", "mlm_logits": "mlm"}.get(verb, verb.split("_")[0])
    with pytest.raises(MissingVerbError, match=f"no {name} head \\(it has: none\\)"):
        getattr(build(replace(SMALL, heads=())), verb)(pictures(1), texts([4]))


def test_labels_that_cannot_be_used() -> None:
    network, tokens, pixels = build(ALL_HEADS), texts([4, 5, 6]), pictures(3)
    with pytest.raises(ValueError, match="2 queries don't divide 3 pairs"):
        head_loss(network, "rank", pixels, tokens, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="0 queries don't divide 3 pairs"):
        head_loss(network, "rank", pixels, tokens, torch.zeros(0))
    for head, wanted in (("mlm", r"\(3, \d\)"), ("vqa", r"\(3, \d\)"), ("itm", r"\(3,\)")):
        with pytest.raises(ValueError, match=rf"labels of {head} have the shape \(4, 4, 4\), expected {wanted}"):
            head_loss(network, head, pixels, tokens, torch.zeros(4, 4, 4))
    with pytest.raises(ConfigError, match="unknown head 'vqaa'"):
        head_loss(network, "vqaa", pixels, tokens, torch.zeros(3))
    with pytest.raises(MissingVerbError, match="no vqa head"):
        head_loss(build(), "vqa", pixels, tokens, torch.zeros(3, 2))
    nothing = torch.full_like(tokens.input_ids, IGNORED)
    assert head_loss(network, "mlm", pixels, tokens, nothing) == 0


@torch.no_grad()
def test_padding_costs_nothing() -> None:
    network, tokens, pixels = build(ALL_HEADS), texts([4, 5]), pictures(2)
    padded = F.pad(pixels, (0, 8, 0, 8))
    mask = torch.zeros(2, 32, 32, dtype=torch.bool)
    mask[:, :24, :24] = True
    for name, labels in {"itm": torch.tensor([1, 0]), "rank": torch.tensor([1]), "vqa": torch.ones(2, 3)}.items():
        close(
            head_loss(network, name, padded, tokens, labels, pixel_mask=mask),
            head_loss(network, name, pixels, tokens, labels),
            1e-5,
        )


def test_the_plan_carries_words_to_patches() -> None:
    plan = build().word_patch_plan(pictures(2), texts([4, 7]))
    assert plan.shape == (2, 7, 10) and not plan.requires_grad
    assert (plan[:, 0] == 0).all() and (plan[:, :, 0] == 0).all()  # neither [CLS]
    assert (plan[0, 3:] == 0).all() and (plan[1, 6] == 0).all()  # [SEP] and padding
    close(plan.sum(dim=2)[0, 1:3], torch.full((2,), 0.5), 1e-5)
    close(plan.sum(dim=2)[1, 1:6], torch.full((5,), 0.2), 1e-5)
    assert (build().word_patch_plan(pictures(1), texts([2])) == 0).all()  # a text without words


def test_words_begin_in_the_size_that_is_set() -> None:
    words = Vilt(replace(SMALL, word_size=10.0)).words
    states = words.embed(torch.arange(10)[None])  # (1, 10, D)
    close(states.std(dim=2, unbiased=False), torch.full((1, 10), 10.0), 0.1)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"unknown head 'vqaa' \(did you mean 'vqa'\?\)"):
        Vilt(replace(SMALL, heads=("vqaa",)))
    with pytest.raises(ConfigError, match="vqa head needs both"):
        Vilt(replace(SMALL, heads=("vqa",)))
    with pytest.raises(ConfigError, match=r"word_size 0\.0 must be above 0"):
        Vilt(replace(SMALL, word_size=0.0))
    with pytest.raises(ConfigError, match="patch_dropout must be 0"):
        Vilt(replace(SMALL, image=replace(IMAGE, patch_dropout=0.5)))
