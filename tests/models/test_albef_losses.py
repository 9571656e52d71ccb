"""ALBEF's training: partners and their terms, hidden tokens, the teacher's share, ablations, shared keys, learning."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.small import check_finite, check_learns, close, far
from tests.models.small_albef import ALBEF, batch, build
from vlm.data.batch import Batch
from vlm.models.stage import Choice, Encoded, Pairs, Taught, joint_loss
from vlm.objectives.mlm import IGNORED


def fixed(rows: int, seed: int = 0) -> Any:
    """Draws that are the same in each call."""
    values = torch.rand(2, rows, 1, generator=torch.Generator().manual_seed(seed))
    return lambda kind, count: values[["image", "text"].index(kind)].expand(-1, count)


def chosen(model: Any, some: Batch, encoded: Encoded, draws: Any = None) -> Choice:
    features = encoded.features
    ids = {"row_ids": some.ids, "ids": some.ids}
    return model.choose(some, features, features, **ids, draws=draws or fixed(len(some)))


def paired(model: Any, some: Batch, **partners: Any) -> tuple[dict[str, Tensor], Pairs]:
    """Sums with the given partners, or those that `choose` draws."""
    encoded = model(some)
    drawn = chosen(model, some, encoded).partners
    pairs = Pairs(encoded.states, encoded.inputs, drawn | {n: torch.tensor(v) for n, v in partners.items()})
    return model(some, pairs), pairs


def test_losses_by_the_verbs() -> None:
    """ITM and MLM from `match` and `mlm_logits`, pair by pair, as a reader of the paper would write them."""
    model, some = build(), batch(4)
    sums, pairs = paired(model, some)
    other = pairs.partners
    own = model.match(some.pixels, some.tokens)
    tokens = {name: some.tokens[name][other["text"]] for name in some.tokens}
    wrong = [model.match(some.pixels, tokens), model.match(some.pixels[other["image"]], some.tokens)]
    expected = F.cross_entropy(own, torch.ones(4, dtype=torch.long), reduction="sum")
    expected = expected + F.cross_entropy(torch.cat(wrong), torch.zeros(8, dtype=torch.long), reduction="sum")
    close(sums["itm"], expected)
    right = (own.argmax(dim=1) == 1).sum() + (torch.cat(wrong).argmax(dim=1) == 0).sum()
    assert sums["itm_accuracy"] == right

    logits = model.mlm_logits(some.pixels, {"input_ids": some.masked_ids, "attention_mask": some.tokens.attention_mask})
    close(sums["mlm"], F.cross_entropy(logits.flatten(0, 1), some.labels.flatten(), reduction="sum"))
    assert sums["mlm_accuracy"] == (logits.argmax(dim=2) == some.labels).sum()


def test_joint_loss_takes_means() -> None:
    model, some = build(), batch(4)
    losses = joint_loss(model, some, draws=fixed(4))
    sums, _ = paired(model, some)
    hidden = int((some.labels != IGNORED).sum())
    close(losses["itm"], sums["itm"] / 12)
    close(losses["mlm"], sums["mlm"] / hidden)
    assert (
        losses["itm_accuracy"] == sums["itm_accuracy"] / 12 and losses["mlm_accuracy"] == sums["mlm_accuracy"] / hidden
    )
    image, text = model.encode_image(some.pixels), model.encode_text(some.tokens)
    logits, truth = model.similarity(image, text), torch.arange(4)
    close(losses["itc"], 0.5 * (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)))
    close(losses["loss"], losses["itc"] + losses["itm"] + losses["mlm"])
    assert losses["scale"].item() == pytest.approx(1 / 0.07)
    assert model.loss(some)["loss"].isfinite()


def test_every_parameter_gets_a_gradient() -> None:
    model, some = build().train(), batch(6, full=True)
    model.loss(some)["loss"].backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(("other", "moved"), [("image", 2), ("text", 1)])
def test_a_partner_changes_its_own_term_only(other: str, moved: int) -> None:
    model, some = build(), batch(4)
    seen: list[Tensor] = []
    model.itm_head.register_forward_hook(lambda *parts: seen.append(parts[2]))
    partners = {"image": [1, 2, 3, 0], "text": [1, 2, 3, 0]}
    before, _ = paired(model, some, **partners)
    after, _ = paired(model, some, **partners | {other: [1, 2, 3, 1]})  # row 3 alone gets another partner
    change = (seen[1] - seen[0]).abs().amax(dim=-1) > 1e-5  # (3, b)
    expected = torch.zeros(3, 4, dtype=torch.bool)
    expected[moved, 3] = True
    assert torch.equal(change, expected)
    close(after["mlm"], before["mlm"])


def test_rows_without_a_partner_are_left_out() -> None:
    model, some = build(), batch(3)
    sums, _ = paired(model, some, image=[-1, 0, 0], text=[1, -1, 0])
    parts = [paired(model, some, image=[-1, 0, -1], text=[-1, -1, 0])[0]["itm"]]
    parts += [paired(model, some, image=[-1, -1, 0], text=[1, -1, -1])[0]["itm"]]
    alone = paired(model, some, image=[-1] * 3, text=[-1] * 3)[0]
    close(sums["itm"] + alone["itm"], parts[0] + parts[1])
    own = F.cross_entropy(model.match(some.pixels, some.tokens), torch.ones(3, dtype=torch.long), reduction="sum")
    close(alone["itm"], own)
    assert alone["itm_accuracy"] <= 3


def test_positives_are_never_partners() -> None:
    """Rows 0 and 1 share a concept, 1 and 2 a caption; the last batch is all of one concept."""
    model, some = build(), batch(4)
    some = replace(some, ids=torch.tensor([[7, 0], [7, 1], [8, 1], [9, 2]]))
    allowed = {0: {2, 3}, 1: {3}, 2: {0, 3}, 3: {0, 1, 2}}
    encoded = model(some)
    for seed in range(20):
        choice = chosen(model, some, encoded, fixed(4, seed))
        for partners in choice.partners.values():
            assert all(int(partner) in allowed[row] for row, partner in enumerate(partners))
    alike = replace(some, ids=torch.full((4, 2), 5))
    choice = chosen(model, alike, encoded)
    assert all((partners == -1).all() for partners in choice.partners.values())
    assert choice.counts["itm"] == choice.counts["itm_accuracy"] == 4


def test_hard_negatives_follow_similarity_and_random_ones_don_t() -> None:
    rows, count = 4, 4000
    image = F.normalize(torch.randn(rows, 16, generator=torch.Generator().manual_seed(1)), dim=1)
    text = F.normalize(torch.randn(rows, 16, generator=torch.Generator().manual_seed(2)), dim=1)
    ids = {"row_ids": torch.arange(rows)[:, None].repeat(count, 1), "ids": torch.arange(rows)[:, None]}
    generator = torch.Generator().manual_seed(3)
    names = ("image", "text", "image easy", "text easy")
    draws = {name: torch.rand(rows * count, 1, generator=generator) for name in names}
    everyone = {"image": image, "text": text, "log_scale": torch.tensor([1.5])}
    features = {name: value if name == "log_scale" else value.repeat(count, 1) for name, value in everyone.items()}
    similar = math.exp(1.5) * text @ image.T  # (texts, images)
    hard = {"image": similar.softmax(dim=1), "text": similar.T.softmax(dim=1)}
    even = (1 - torch.eye(rows)) / (rows - 1)
    hard = {kind: F.normalize(weights.fill_diagonal_(0), p=1, dim=1) for kind, weights in hard.items()}
    for negatives, given, share in (("hard", 1.0, 1.0), ("random", 1.0, 0.0), ("hard", 0.3, 0.3)):
        config = replace(ALBEF, negatives=negatives, hard_share=given, mlm_weight=0.0)  # type: ignore[arg-type]
        choice = build(config).choose(batch(1), features, everyone, **ids, draws=lambda kind, _: draws[kind])
        for kind, partners in choice.partners.items():
            drawn = F.one_hot(partners.reshape(count, rows), rows).float().mean(dim=0)
            torch.testing.assert_close(drawn, share * hard[kind] + (1 - share) * even, atol=0.03, rtol=0)


def taught(model: Any, some: Batch, alpha: float, queue: int = 3) -> tuple[Taught, dict[str, Tensor]]:
    """What a teacher and its queue would give."""
    with torch.no_grad():
        encoded = model(some)
    old = F.normalize(torch.randn(2, queue, 16, generator=torch.Generator().manual_seed(5)), dim=-1)
    rows = {name: encoded.features[name] for name in ("image", "text")}
    columns = {name: torch.cat([rows[name], old[i]]) for i, name in enumerate(rows)}
    ids = torch.cat([some.ids, torch.full((queue, 2), -1)])
    targets = model.teach(some, encoded.states, encoded.inputs) if hasattr(model, "teach") else {}
    return Taught(rows, columns, ids, alpha), targets


def test_a_full_share_is_pure_distillation() -> None:
    """With alpha 1 the least loss is the teacher's own entropy, reached by the teacher itself."""
    model, some = build(), batch(5)
    features, targets = taught(model, some, 1.0)
    losses = joint_loss(model, some, draws=fixed(5), taught=features, targets=targets)
    spread = torch.distributions.Categorical(logits=targets["mlm"]).entropy()
    close(losses["mlm"], spread.mean())
    scale = model.logit_scale
    logits = [scale * features.rows[a] @ features.columns[b].T for a, b in (("image", "text"), ("text", "image"))]
    entropies = [torch.distributions.Categorical(logits=one).entropy().mean() for one in logits]
    close(losses["itc"], sum(entropies) / 2)
    student = build(seed=1)
    worse = joint_loss(student, some, draws=fixed(5), taught=features, targets=targets)
    assert worse["mlm"] > losses["mlm"] and worse["itc"] > losses["itc"]


def test_the_share_mixes_both_targets() -> None:
    model, some = build(), batch(5)
    student = build(seed=1)

    def losses(alpha: float) -> dict[str, Tensor]:
        features, targets = taught(model, some, alpha)
        return joint_loss(student, some, draws=fixed(5), taught=features, targets=targets)

    for name in ("itc", "mlm"):
        close(losses(0.3)[name], 0.7 * losses(0.0)[name] + 0.3 * losses(1.0)[name])
        assert far(losses(0.0)[name], losses(1.0)[name])
    close(losses(0.0)["mlm"], joint_loss(student, some, draws=fixed(5))["mlm"])
    close(losses(0.3)["itm"], losses(1.0)["itm"])


def test_rows_of_the_queue_that_share_an_id_are_positives() -> None:
    """Without the teacher's share: the mean over a row's own pair and the second of the queue, by its caption."""
    model, some = build(), batch(3)
    features, _ = taught(model, some, 0.0)
    ids = features.ids.clone()
    ids[4, 1] = some.ids[0, 1]
    own = model(some).features
    found = model.contrast(own, own, row_ids=some.ids, ids=some.ids, taught=replace(features, ids=ids))["itc"]
    expected = torch.zeros(())
    for rows, columns in (("image", "text"), ("text", "image")):
        logs = (own[rows] @ features.columns[columns].T / 0.07).log_softmax(dim=1)
        expected = expected - 0.5 * (0.5 * (logs[0, 0] + logs[0, 4]) + logs[1, 1] + logs[2, 2]) / 3
    close(found, expected)


def test_teach_gives_the_hidden_tokens_in_order() -> None:
    model, some = build(), batch(5)
    encoded = model(some)
    targets = model.teach(some, encoded.states, encoded.inputs)
    tokens = {"input_ids": some.masked_ids, "attention_mask": some.tokens.attention_mask}
    close(targets["mlm"], model.mlm_logits(some.pixels, tokens)[some.labels != IGNORED])
    assert not targets["mlm"].requires_grad
    nothing = replace(some, masked_ids=some.tokens.input_ids, labels=torch.full_like(some.labels, IGNORED))
    assert model.teach(nothing, encoded.states, encoded.inputs) == {}
    sums = model(nothing, Pairs(encoded.states, encoded.inputs, chosen(model, nothing, encoded).partners))
    assert sums["mlm"] == 0 and sums["mlm_accuracy"] == 0
    assert joint_loss(model, nothing)["mlm"] == 0


@pytest.mark.parametrize(
    ("change", "losses", "idle"),
    [
        ({"itc_weight": 0.0}, {"itm", "mlm"}, {"image_projection", "text_projection", "log_scale"}),
        ({"itm_weight": 0.0}, {"itc", "mlm"}, {"itm_head"}),
        ({"mlm_weight": 0.0}, {"itc", "itm"}, {"mlm_head"}),
        ({"itm_weight": 0.0, "mlm_weight": 0.0}, {"itc"}, {"itm_head", "mlm_head"}),
    ],
)
def test_a_loss_without_weight_isn_t_computed(change: dict[str, float], losses: set[str], idle: set[str]) -> None:
    model, some = build(replace(ALBEF, **change)).train(), batch(5)  # type: ignore[arg-type]
    found = model.loss(some)
    assert {name for name in found if name in ("itc", "itm", "mlm")} == losses
    close(found["loss"], sum(found[name] for name in losses))
    found["loss"].backward()
    without = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == idle if losses != {"itc"} else idle <= without


def test_weights_weigh() -> None:
    model, some = build(replace(ALBEF, itc_weight=0.5, itm_weight=2.0, mlm_weight=3.0)), batch(5)
    losses = model.loss(some)
    close(losses["loss"], 0.5 * losses["itc"] + 2 * losses["itm"] + 3 * losses["mlm"])


def test_batches_without_hidden_tokens_are_named() -> None:
    model, some = build(), replace(batch(3), masked_ids=None, labels=None)
    with pytest.raises(ValueError, match="no masked_ids"):
        model.loss(some)
    assert build(replace(ALBEF, mlm_weight=0.0)).loss(some)["loss"].isfinite()


def test_image_keys_are_computed_once() -> None:
    """All of a step's texts meet an image in one projection for each fusion layer."""
    model, some = build(), batch(5)
    counts: list[int] = []
    for layer in model.text.layers[2:]:
        layer.cross_attn.kv.register_forward_hook(lambda _, given, __: counts.append(len(given[0])))
    model.loss(some)
    assert counts == [5, 5]


def test_rows_cut_into_parts_with_a_shared_pool_give_the_whole() -> None:
    """As the engine does: two micro-batches, partners that stand in the other one, states of both in each pool."""
    model, some = build(), batch(6)
    encoded = model(some)
    partners = {"image": torch.tensor([3, 2, 0, 5, 1, 4]), "text": torch.tensor([1, 4, 5, 0, 0, 2])}
    whole = model(some, Pairs(encoded.states, encoded.inputs, partners))
    parts = []
    for number, part in enumerate(some.split(2)):
        own = torch.arange(3) + 3 * number
        order = torch.cat([own, (own + 3) % 6])  # the rows' own first
        place = torch.empty(6, dtype=torch.long)
        place[order] = torch.arange(6)
        states = {name: value[order] for name, value in encoded.states.items()}
        inputs = {name: value[order] for name, value in encoded.inputs.items()}
        moved = {name: place[value[own]] for name, value in partners.items()}
        parts.append(model(part, Pairs(states, inputs, moved)))
    for name, total in whole.items():
        close(parts[0][name].float() + parts[1][name].float(), total.float())


def test_checkpointed_layers_give_the_same_gradient() -> None:
    some, gradients = batch(4, full=True), []
    for enabled in (False, True):
        model = build().train()
        model.checkpointing = enabled
        joint_loss(model, some, draws=fixed(4))["loss"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient)


def test_half_precision_losses_are_near() -> None:
    model, some = build().train(), batch(6)
    features, targets = taught(model, some, 0.4)
    exact = joint_loss(model, some, draws=fixed(6), taught=features, targets=targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = joint_loss(model, some, draws=fixed(6), taught=features, targets=targets)
    half["loss"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    for name in ("itc", "mlm", "loss"):
        torch.testing.assert_close(half[name].float(), exact[name], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("rows", [1, 2])
def test_small_batches(rows: int) -> None:
    check_finite(build(), batch(rows))


def test_sixty_steps_learn_eight_pairs() -> None:
    check_learns(build(replace(ALBEF, logit_scale_init=14.0)).train(), batch(8), ("itc", "itm", "mlm"))
