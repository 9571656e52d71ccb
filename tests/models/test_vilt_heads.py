"""ViLT's heads: each learns from labels, each is named where it is missing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.models.small_vilt import ALL_HEADS, IMAGE, SMALL, build, pictures, texts
from vlm.errors import ConfigError, MissingVerbError
from vlm.models.vilt import Vilt
from vlm.objectives.downstream import classes, ranking, soft_answers


def close(a: Tensor, b: Tensor, within: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, rtol=within, atol=within)


def test_every_head_learns_from_labels() -> None:
    network, tokens, pixels = build(ALL_HEADS).train(), texts([4, 5, 6, 4]), pictures(4)
    pair = torch.stack([pixels, pictures(4, seed=7)], dim=1)
    scores = torch.tensor([[1.0, 0.0, 0.3], [0.0, 0.6, 0.0], [0.0, 0.0, 1.0], [1.0, 0.9, 0.0]])
    losses = {
        "rank": ranking(network.rank_scores(pixels, tokens).view(2, 2), torch.tensor([0, 1])),
        "vqa": soft_answers(network.vqa_logits(pixels, tokens), scores),
        "nlvr2": classes(network.nlvr2_logits(pair, tokens), torch.tensor([0, 1, 1, 0])),
        "itm": classes(network.match(pixels, tokens), torch.tensor([1, 0, 1, 0])),
        "mlm": classes(network.mlm_logits(pixels, tokens)[:, 1], torch.tensor([7, 8, 9, 10])),
    }
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


def test_the_plan_carries_words_to_patches() -> None:
    plan = build().word_patch_plan(pictures(2), texts([4, 7]))
    assert plan.shape == (2, 7, 10) and not plan.requires_grad
    assert (plan[:, 0] == 0).all() and (plan[:, :, 0] == 0).all()  # neither [CLS]
    assert (plan[0, 3:] == 0).all() and (plan[1, 6] == 0).all()  # [SEP] and padding
    close(plan.sum(dim=2)[0, 1:3], torch.full((2,), 0.5), 1e-5)
    close(plan.sum(dim=2)[1, 1:6], torch.full((5,), 0.2), 1e-5)
    assert (build().word_patch_plan(pictures(1), texts([2])) == 0).all()  # a text without words


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"unknown head 'vqaa' \(did you mean 'vqa'\?\)"):
        Vilt(replace(SMALL, heads=("vqaa",)))
    with pytest.raises(ConfigError, match="vqa head needs both"):
        Vilt(replace(SMALL, heads=("vqa",)))
    with pytest.raises(ConfigError, match="patch_dropout must be 0"):
        Vilt(replace(SMALL, image=replace(IMAGE, patch_dropout=0.5)))
