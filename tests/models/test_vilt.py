"""ViLT: padding and batching, what each loss reads, which pictures are replaced, every head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.models.small_vilt import IMAGE, SMALL, batch, build, pictures, texts
from vlm.data.batch import Batch, Tokens
from vlm.models.stage import Pairs, joint_loss
from vlm.models.vilt import Vilt
from vlm.models.vit import ViT
from vlm.objectives.mlm import IGNORED


def close(a: Tensor, b: Tensor, within: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, rtol=within, atol=within)


def padded(tokens: Tokens, more: int, filler: int = 17) -> Tokens:
    """The texts with further columns and something else in all padding."""
    mask = F.pad(tokens.attention_mask, (0, more))
    return Tokens(torch.where(mask, F.pad(tokens.input_ids, (0, more)), filler), mask)


def canvas(pixels: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Pictures on a larger, noisy canvas, and which pixels are theirs."""
    rows, _, high, wide = pixels.shape
    whole = pictures(rows, height, width, seed=99) * 5
    whole[:, :, :high, :wide] = pixels
    mask = torch.zeros(rows, height, width, dtype=torch.bool)
    mask[:, :high, :wide] = True
    return whole, mask


# The transformer over words and patches.


@pytest.mark.parametrize("pre_norm", [False, True])
@torch.no_grad()
def test_the_blocks_without_words_are_the_image_encoder(pre_norm: bool) -> None:
    torch.manual_seed(0)
    vit, pixels = ViT(replace(IMAGE, pre_norm=pre_norm)).eval(), pictures(2)
    close(vit.run(*vit.embed(pixels)), vit(pixels), 1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 3), st.integers(0, 2), st.integers(0, 2))
@torch.no_grad()
def test_padding_never_changes_a_result(high: int, wide: int, more: int, below: int, beside: int) -> None:
    network, tokens, pixels = build(), texts([4, 6]), pictures(2, 8 * high, 8 * wide)
    plain = network.fuse(pixels, tokens)
    image, mask = canvas(pixels, 8 * (high + below), 8 * (wide + beside))
    fused = network.fuse(image, padded(tokens, more), mask)
    real = tokens.attention_mask
    close(fused.words[:, : real.shape[1]][real], plain.words[real], 1e-5)
    close(fused.patches[fused.patch_mask], plain.patches.flatten(0, 1), 1e-5)
    close(network.match(image, padded(tokens, more), mask), network.match(pixels, tokens))
    plan = network.word_patch_plan(image, padded(tokens, more), mask)
    assert plan.sum().item() == pytest.approx(2, abs=1e-5)
    close(plan[plan > 0], (whole := network.word_patch_plan(pixels, tokens))[whole > 0], 1e-5)


@torch.no_grad()
def test_padded_and_unpadded_agree_in_double_precision() -> None:
    """Without rounding the mask leaves nothing of the padding."""
    network, tokens, pixels = build().double(), texts([3, 7]), pictures(2, 16, 24).double()
    image, mask = canvas(pixels.float(), 32, 40)
    fused, plain = network.fuse(image.double(), padded(tokens, 3), mask), network.fuse(pixels, tokens)
    real = tokens.attention_mask
    close(fused.words[:, :7][real], plain.words[real], 1e-12)
    close(fused.patches[fused.patch_mask], plain.patches.flatten(0, 1), 1e-12)


@torch.no_grad()
def test_pictures_of_different_size_in_one_batch() -> None:
    network, tokens = build(), texts([5, 3, 6])
    alone = [pictures(1, *size, seed=i) for i, size in enumerate([(24, 24), (8, 40), (32, 16)])]
    image, mask = torch.zeros(3, 3, 32, 40), torch.zeros(3, 32, 40, dtype=torch.bool)
    for row, picture in enumerate(alone):
        image[row, :, : picture.shape[2], : picture.shape[3]] = picture[0]
        mask[row, : picture.shape[2], : picture.shape[3]] = True
    together = network.match(image, tokens, mask)
    for row, picture in enumerate(alone):
        one = tokens.select(torch.tensor([row]))
        close(together[row : row + 1], network.match(picture, one), 1e-5)


@torch.no_grad()
def test_batched_equals_single() -> None:
    network, tokens, pixels = build(), texts([5, 3, 7, 4]), pictures(4)
    logits, words = network.match(pixels, tokens), network.mlm_logits(pixels, tokens)
    for row in range(4):
        one = tokens.select(torch.tensor([row]))
        close(network.match(pixels[row : row + 1], one), logits[row : row + 1], 1e-5)
        length = one.input_ids.shape[1]
        close(network.mlm_logits(pixels[row : row + 1], one), words[row : row + 1, :length], 1e-5)


@torch.no_grad()
def test_words_patches_their_order_and_their_kind_matter() -> None:
    network, tokens, pixels = build(), texts([5, 5]), pictures(2)
    plain = network.match(pixels, tokens)

    def moved(other: Tensor) -> bool:
        return bool((other - plain).abs().amin(dim=0).max() > 1e-3)

    turned = tokens.input_ids.clone()
    turned[:, [1, 2]] = turned[:, [2, 1]]
    assert moved(network.match(pixels.flip(3), tokens))
    assert moved(network.match(pixels, Tokens(turned, tokens.attention_mask)))
    assert moved(network.match(pixels.flip(0), tokens))
    network.modality.copy_(network.modality.flip(0))
    assert moved(network.match(pixels, tokens))


def test_bad_pictures_and_texts() -> None:
    network, tokens = build(), texts([4])
    with pytest.raises(ValueError, match="20 x 24 pixels can't be cut into patches of 8"):
        network.match(pictures(1, 20, 24), tokens)
    with pytest.raises(ValueError, match="without pixels"):
        network.match(pictures(1), tokens, torch.zeros(1, 24, 24, dtype=torch.bool))
    with pytest.raises(ValueError, match="text of 13 tokens, but context_length is 12"):
        network.match(pictures(1), texts([13]))


# Pre-training.


def fixed(name: str, count: int) -> Tensor:
    """Draws for six rows: every other picture is replaced."""
    assert count == 1
    values = {"replace": [0.0, 0.9, 0.49, 0.5, 0.1, 0.7], "image": [0.0, 0.3, 0.99, 0.5, 0.4, 0.1]}[name]
    return torch.tensor(values)[:, None]


def chosen(rows: Batch, draws: Any = fixed) -> Any:
    return build().choose(rows, {}, {}, row_ids=rows.ids, ids=rows.ids, draws=draws)


def test_half_of_the_rows_get_another_picture() -> None:
    partners = chosen(batch()).partners["image"]
    assert (partners >= 0).tolist() == [True, False, True, False, True, False]
    assert partners[0].item() == 1 and partners[2].item() == 5
    rows = 4000
    ids = torch.stack([torch.arange(rows) % 40, torch.arange(rows)], dim=1)
    many = Batch(torch.zeros(rows, 1), texts([3] * rows), ids, ("x",) * rows)
    generator = torch.Generator().manual_seed(0)
    partners = chosen(many, lambda _, count: torch.rand(rows, count, generator=generator)).partners["image"]
    replaced = (partners >= 0).nonzero().flatten()
    assert abs(len(replaced) - rows / 2) < 4.5 * (rows / 4) ** 0.5
    assert (ids[partners[replaced], 0] != ids[replaced, 0]).all()
    assert len(partners.unique()) > 1000  # drawn evenly, not one for all


def test_pictures_of_the_same_thing_never_replace_each_other() -> None:
    same = torch.tensor([[1, 5], [1, 6], [1, 7], [2, 7], [3, 8], [1, 9]])
    for draw in torch.rand(50, generator=torch.Generator().manual_seed(0)).tolist():
        rows = batch(ids=same)
        values = {"replace": torch.zeros(6, 1), "image": torch.full((6, 1), draw)}
        partners = chosen(rows, lambda name, _, values=values: values[name]).partners["image"].tolist()
        allowed = [{3, 4}, {3, 4}, {4}, {0, 1, 4, 5}, {0, 1, 2, 3, 5}, {3, 4}]
        assert all(partner in known for partner, known in zip(partners, allowed, strict=True))


def test_a_batch_of_one_kind_keeps_its_pictures() -> None:
    rows = batch(ids=torch.tensor([[1, i] for i in range(6)]))
    assert chosen(rows).partners["image"].tolist() == [-1] * 6
    parts = build().loss(rows)
    assert all(value.isfinite() for value in parts.values())
    assert build().loss(batch(1))["loss"].isfinite()


def test_counts() -> None:
    assert chosen(batch()).counts == {"itm": 6, "wpa": 6, "itm_accuracy": 6, "mlm": 6, "mlm_accuracy": 6}
    assert chosen(batch(masked=False)).counts == {"itm": 6, "wpa": 6, "itm_accuracy": 6}


def test_every_part_by_hand() -> None:
    network, rows = build(), batch()
    parts = joint_loss(network, rows, draws=fixed)
    taken = torch.tensor([1, 1, 5, 3, chosen(rows).partners["image"][4].item(), 5])
    matched = torch.tensor([False, True, False, True, False, True])
    with torch.no_grad():
        logits = network.match(rows.pixels[taken], rows.tokens)
        hidden = Tokens(rows.masked_ids, rows.tokens.attention_mask)  # type: ignore[arg-type]
        words = network.mlm_logits(rows.pixels, hidden)
        fused = network.fuse(rows.pixels[taken], rows.tokens)
        plan = network.word_patch_plan(rows.pixels[taken], rows.tokens)
    labels = rows.labels
    assert labels is not None
    cosine = F.cosine_similarity(fused.words[:, :, None], fused.patches[:, None], dim=-1)
    distance = (plan * (1 - cosine)).sum(dim=(1, 2))
    expected = {
        "itm": F.cross_entropy(logits, matched.long()),
        "itm_accuracy": (logits.argmax(dim=1) == matched).float().mean(),
        "mlm": F.cross_entropy(words.flatten(0, 1), labels.flatten(), ignore_index=IGNORED),
        "mlm_accuracy": (words.argmax(dim=-1) == labels)[labels != IGNORED].float().mean(),
        "wpa": (distance * (matched.float() * 2 - 1)).mean(),
    }
    for name, value in expected.items():
        close(parts[name].detach(), value, 1e-5)
    close(parts["loss"].detach(), expected["itm"] + expected["mlm"] + 0.1 * expected["wpa"], 1e-5)
    assert set(parts) == {"loss", *expected}


def test_rows_with_partners_elsewhere_sum_to_the_joined_batch() -> None:
    """What ranks and micro-batches do: own rows first, then the partners' pixels from other rows."""
    network, rows = build().double(), batch()
    rows = replace(rows, pixels=rows.pixels.double())
    whole = joint_loss(network, rows, draws=fixed)
    partners = chosen(rows).partners["image"]
    sums: dict[str, float] = {}
    for start, part in zip((0, 3), rows.split(2), strict=True):
        wanted = partners[start : start + 3]
        places = torch.where(wanted < 0, -1, torch.arange(3, 6))
        pool = torch.cat([part.pixels, rows.pixels[wanted.clamp(min=0)]])
        found = network(part, Pairs({}, {"pixels": pool}, {"image": places}))
        sums = {name: sums.get(name, 0.0) + value.item() for name, value in found.items()}
    for name, value in sums.items():
        assert value / 6 == pytest.approx(whole[name].item(), rel=1e-6)


def test_pixel_masks_travel_with_their_pictures() -> None:
    network, rows = build(), batch()
    image, mask = canvas(rows.pixels, 32, 40)
    wide = replace(rows, pixels=image, pixel_mask=mask)
    inputs = network(wide).inputs
    assert set(inputs) == {"pixels", "pixel_mask"} and network(wide).features == {}
    for name, value in joint_loss(network, rows, draws=fixed).items():
        close(joint_loss(network, wide, draws=fixed)[name].detach(), value.detach(), 1e-4)


def test_every_parameter_gets_a_gradient() -> None:
    network = build().train()
    joint_loss(network, batch(), draws=fixed)["loss"].backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert without == []
    types = network.words.types
    assert types is not None and types.weight.grad is not None
    assert (types.weight.grad[1] == 0).all()  # a single text has one type


def test_nothing_hidden_still_gives_every_parameter_a_gradient() -> None:
    """Or DDP would wait for the head; a batch of short texts can have no masked token."""
    network, rows = build().train(), batch()
    rows = replace(rows, masked_ids=rows.tokens.input_ids, labels=torch.full_like(rows.tokens.input_ids, IGNORED))
    parts = joint_loss(network, rows, draws=fixed)
    parts["loss"].backward()
    assert parts["mlm"] == 0 and all(p.grad is not None for p in network.parameters())


def test_parts_can_be_left_out() -> None:
    assert set(build().loss(batch(masked=False))) == {"loss", "itm", "itm_accuracy", "wpa"}
    assert "wpa" not in build(replace(SMALL, wpa_weight=0.0)).loss(batch())
    parts = build(replace(SMALL, heads=("itm",), itm_weight=2.0)).loss(batch())
    assert "mlm" not in parts
    close(parts["loss"].detach(), (2 * parts["itm"] + 0.1 * parts["wpa"]).detach())


def test_checkpointing_changes_nothing() -> None:
    network = build().train()
    network.image.checkpointing = True
    loss = joint_loss(network, batch(), draws=fixed)["loss"]
    loss.backward()
    plain = build().train()
    other = joint_loss(plain, batch(), draws=fixed)["loss"]
    other.backward()
    close(loss.detach(), other.detach())
    for (_, one), (_, two) in zip(network.named_parameters(), plain.named_parameters(), strict=True):
        assert one.grad is not None and two.grad is not None
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6)


def test_it_learns() -> None:
    """Six pairs by heart: who belongs to whom, and the hidden words."""
    torch.manual_seed(0)
    network, rows = Vilt(SMALL).train(), batch()
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for _ in range(250):
        optimiser.zero_grad()
        network.loss(rows)["loss"].backward()
        optimiser.step()
    parts = [network.loss(rows) for _ in range(20)]
    assert sum(part["itm_accuracy"].item() for part in parts) / 20 > 0.85  # chance is 0.5
    assert parts[0]["mlm_accuracy"] == 1 and parts[0]["mlm"] < 0.1


def test_autocast() -> None:
    network = build().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = joint_loss(network, batch(), draws=fixed)
    plain = joint_loss(network, batch(), draws=fixed)
    assert all(parts[name].dtype == torch.float32 for name in ("itm", "mlm", "wpa"))
    close(parts["loss"].detach(), plain["loss"].detach(), 0.05)
