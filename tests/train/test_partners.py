"""Partners of rows: pools of micro-batches, padding, and the way back of gradients, on one rank and on two."""

from __future__ import annotations

import pytest
import torch

from tests.train.small import ALONE, spawn
from vlm.train.distributed import Ranks, order
from vlm.train.partners import Partners, joined

ROWS, LENGTH, PATCHES, WIDTH = 7, 5, 3, 2
CHOSEN = {"text": torch.tensor([1, 0, 6, 2, -1, 1, 0]), "image": torch.tensor([6, 6, 6, 0, 3, -1, 2])}
CUTS = [slice(0, 3), slice(3, 5), slice(5, 7)]


def tensors() -> dict[str, torch.Tensor]:
    """Rows whose every number is different."""
    image = torch.arange(ROWS * PATCHES * WIDTH, dtype=torch.float32).view(ROWS, PATCHES, WIDTH)
    text = 1000 + torch.arange(ROWS * LENGTH * WIDTH, dtype=torch.float32).view(ROWS, LENGTH, WIDTH)
    mask = torch.arange(LENGTH)[None] <= torch.arange(ROWS)[:, None] % LENGTH
    return {"image": image, "text": text, "text_mask": mask}


def test_pools_hold_own_rows_and_partners_once() -> None:
    own = tensors()
    partners = Partners(own, CHOSEN, order([ROWS]), ALONE)
    pool = partners.pool(CUTS[0], {kind: rows[CUTS[0]] for kind, rows in CHOSEN.items()})
    assert pool.rows["image"].tolist() == [0, 1, 2, 6]  # row 6 is three rows' partner
    assert pool.rows["text"].tolist() == [0, 1, 2, 6]
    assert pool.partners["image"].tolist() == [3, 3, 3] and pool.partners["text"].tolist() == [1, 0, 3]
    second = partners.pool(CUTS[1], {kind: rows[CUTS[1]] for kind, rows in CHOSEN.items()})
    assert second.rows["image"].tolist() == [3, 4, 0] and second.partners["image"].tolist() == [2, 0]
    assert second.rows["text"].tolist() == [3, 4, 2] and second.partners["text"].tolist() == [2, -1]
    for cut, one in zip(CUTS[:2], (pool, second), strict=True):
        for name, value in one.tensors.items():
            kind = name.split("_")[0]
            assert torch.equal(value, own[name][one.rows[kind]])
            for row, place in zip(CHOSEN[kind][cut].tolist(), one.partners[kind].tolist(), strict=True):
                assert row < 0 or torch.equal(value[place], own[name][row])


def test_a_kind_without_partners_is_its_own_rows() -> None:
    own = tensors()
    partners = Partners(own, {"image": CHOSEN["image"]}, order([ROWS]), ALONE)
    pool = partners.pool(CUTS[0], {"image": CHOSEN["image"][CUTS[0]]})
    assert pool.rows["text"].tolist() == [0, 1, 2] and set(pool.partners) == {"image"}
    assert torch.equal(pool.tensors["text"], own["text"][:3])


def test_shorter_texts_are_padded_with_zeros() -> None:
    own = tensors()
    parts = [
        {"text": own["text"][:3, :2], "image": own["image"][:3]},
        {"text": own["text"][3:], "image": own["image"][3:]},
    ]
    whole = joined(parts)
    assert whole["text"].shape == own["text"].shape and torch.equal(whole["image"], own["image"])
    assert torch.equal(whole["text"][:3, :2], own["text"][:3, :2]) and not whole["text"][:3, 2:].any()
    assert torch.equal(whole["text"][3:], own["text"][3:])
    alone = joined(parts[:1])
    assert alone["text"].shape == (3, 2, WIDTH)


def pulled(own: dict[str, torch.Tensor], chosen: dict[str, torch.Tensor]) -> torch.Tensor:
    """A loss in which each pair has a weight of its own, taken on all rows at once."""
    total = torch.zeros(())
    for kind, rows in chosen.items():
        for row, other in enumerate(rows.tolist()):
            if other >= 0:
                total = total + (row + 1) * own[kind][other].square().sum() + own[kind][row].sum()
    return total


@pytest.mark.parametrize("cuts", [[slice(0, ROWS)], CUTS])
def test_gradients_come_back_to_their_rows(cuts: list[slice]) -> None:
    own = tensors()
    states = {name: own[name].clone().requires_grad_() for name in ("image", "text")}
    pulled(states, CHOSEN).backward()
    partners = Partners(own, CHOSEN, order([ROWS]), ALONE)
    for cut in cuts:
        pool = partners.pool(cut, {kind: rows[cut] for kind, rows in CHOSEN.items()})
        leaves = {name: pool.tensors[name].clone().requires_grad_() for name in states}
        total = torch.zeros(())
        for kind, places in pool.partners.items():
            for row, place in enumerate(places.tolist()):
                if place >= 0:
                    total = total + (cut.start + row + 1) * leaves[kind][place].square().sum() + leaves[kind][row].sum()
        total.backward()
        for name, leaf in leaves.items():
            assert leaf.grad is not None
            partners.add_gradient(name, pool, leaf.grad)
    for name, gradient in partners.returned(["image", "text"]).items():
        assert torch.equal(gradient, states[name].grad), name


def test_what_got_no_gradient_comes_back_as_zeros() -> None:
    partners = Partners(tensors(), CHOSEN, order([ROWS]), ALONE)
    assert not partners.returned(["image"])["image"].any()


def exchange(here: Ranks, sizes: list[int]) -> None:
    """Rank 0 has rows with texts of 3 tokens, the others with 5; each reads partners of the others."""
    whole, places = tensors(), order(sizes)
    mine = places[here.rank]
    own = {name: value[mine] for name, value in whole.items()}
    if here.first:
        own = {name: value[:, :3] if name.startswith("text") else value for name, value in own.items()}
        whole = {n: v.clone() for n, v in whole.items()}
    chosen = {kind: rows[mine] for kind, rows in CHOSEN.items()}
    partners = Partners(own, chosen, places, here)
    pool = partners.pool(slice(0, len(mine)), chosen)
    short = {int(row) for row in places[0]}
    for kind, found in pool.partners.items():
        for row, place in zip(chosen[kind].tolist(), found.tolist(), strict=True):
            if row < 0:
                assert place == -1
                continue
            expected = whole[kind][row].clone()
            if kind == "text" and row in short:
                expected[3:] = 0  # shorter texts are padded to the longest of all ranks
            assert torch.equal(pool.tensors[kind][place], expected)
    for kind in ("image", "text"):
        gradient = torch.zeros_like(pool.tensors[kind])
        for row, place in zip(mine.tolist(), pool.partners[kind].tolist(), strict=True):
            if place >= 0:
                gradient[place] += row + 1
        partners.add_gradient(kind, pool, gradient)
    for kind, back in partners.returned(["image", "text"]).items():
        asked = CHOSEN[kind].tolist()
        for place, row in enumerate(mine.tolist()):
            assert (back[place] == sum(i + 1 for i, other in enumerate(asked) if other == row)).all()


@pytest.mark.parametrize("sizes", [[4, 3], [3, 2, 2]])
def test_ranks_exchange_rows_and_gradients(sizes: list[int]) -> None:
    """With three, a rank sends rows that only one of the others wants, and one row to both."""
    spawn(exchange, sizes, count=len(sizes))
