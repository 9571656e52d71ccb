"""BLIP's training: losses by the verbs, prompts, partners, heads without a weight, shared keys, learning."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.small import check_finite, check_learns, close, far
from tests.models.small_albef import batch
from tests.models.small_blip import BLIP, DEC, build
from tests.models.test_albef_losses import fixed, paired, taught
from vlm.models.blip import SHARING
from vlm.models.stage import joint_loss


@pytest.mark.parametrize("sharing", SHARING)
def test_losses_by_the_verbs(sharing: Any) -> None:
    """ITM and LM from `match` and `lm_logits`, pair by pair, as a reader of the paper would write them."""
    model, some = build(replace(BLIP, sharing=sharing)), batch(4)
    sums, pairs = paired(model, some)
    other = pairs.partners
    own = model.match(some.pixels, some.tokens)
    tokens = {name: some.tokens[name][other["text"]] for name in some.tokens}
    wrong = torch.cat([model.match(some.pixels, tokens), model.match(some.pixels[other["image"]], some.tokens)])
    expected = F.cross_entropy(own, torch.ones(4, dtype=torch.long), reduction="sum")
    close(sums["itm"], expected + F.cross_entropy(wrong, torch.zeros(8, dtype=torch.long), reduction="sum"))
    assert sums["itm_accuracy"] == (own.argmax(dim=1) == 1).sum() + (wrong.argmax(dim=1) == 0).sum()

    logits = model.lm_logits(some.pixels, some.tokens)[:, :-1].flatten(0, 1)
    said = some.tokens.attention_mask[:, 1:].flatten()
    truth = some.tokens.input_ids[:, 1:].flatten()
    close(sums["lm"], F.cross_entropy(logits[said], truth[said], label_smoothing=0.1, reduction="sum"))
    assert sums["lm_accuracy"] == (logits[said].argmax(dim=1) == truth[said]).sum()


def test_joint_loss_takes_means() -> None:
    model, some = build(), batch(4)
    losses = joint_loss(model, some, draws=fixed(4))
    sums, _ = paired(model, some)
    close(losses["itm"], sums["itm"] / 12)
    close(losses["lm"], sums["lm"] / int(some.tokens.attention_mask[:, 1:].sum()))
    image, text = model.encode_image(some.pixels), model.encode_text(some.tokens)
    logits, truth = model.similarity(image, text), torch.arange(4)
    close(losses["itc"], 0.5 * (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)))
    close(losses["loss"], losses["itc"] + losses["itm"] + losses["lm"])
    assert model.loss(some)["loss"].isfinite()


def test_a_prompt_is_put_in_and_not_learnt() -> None:
    text = replace(BLIP.text, context_length=10)
    model, some = build(replace(BLIP, heads=("lm",), text=text, prompt_ids=(5, 6))), batch(4)
    ids, mask = some.tokens.input_ids, some.tokens.attention_mask
    prompted = torch.cat([torch.full((4, 1), DEC), torch.tensor([[5, 6]]).expand(4, 2), ids[:, 1:]], dim=1)
    real = torch.cat([mask[:, :1], torch.ones(4, 2, dtype=torch.bool), mask[:, 1:]], dim=1)
    logits = model.lm_logits(some.pixels, {"input_ids": prompted, "attention_mask": real})[:, 2:-1]
    expected = F.cross_entropy(logits[mask[:, 1:]], ids[:, 1:][mask[:, 1:]], label_smoothing=0.1)
    close(model.loss(some)["lm"], expected)
    assert far(build(replace(BLIP, heads=("lm",), text=text)).loss(some)["lm"], expected)


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("heads", [("itc", "itm", "lm"), ("itc", "itm"), ("lm",), ("itc", "lm"), ("itc",)])
def test_every_parameter_gets_a_gradient(sharing: Any, heads: Any) -> None:
    model, some = build(replace(BLIP, sharing=sharing, heads=heads)).train(), batch(6, full=True)
    model.loss(some)["loss"].backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    if "itm" in heads or ("lm" in heads and sharing != "none") or heads == ("lm",):
        assert idle == set()
    else:  # a text encoder alone never looks at images
        assert idle and all(name.startswith("text.layers.") and ".cross_" in name for name in idle)


@pytest.mark.parametrize("other", ["image", "text"])
def test_a_partner_changes_its_own_term_only(other: str) -> None:
    model, some = build(), batch(4)
    seen: list[Tensor] = []
    assert model.itm_head is not None
    model.itm_head.register_forward_hook(lambda *parts: seen.append(parts[2]))
    partners = {"image": [1, 2, 3, 0], "text": [1, 2, 3, 0]}
    before, _ = paired(model, some, **partners)
    after, _ = paired(model, some, **partners | {other: [1, 2, 3, 1]})
    expected = torch.zeros(3, 4, dtype=torch.bool)
    expected[{"image": 2, "text": 1}[other], 3] = True
    assert torch.equal((seen[1] - seen[0]).abs().amax(dim=-1) > 1e-5, expected)
    close(after["lm"], before["lm"])


def test_the_teacher_softens_the_contrast_alone() -> None:
    model, student, some = build(), build(seed=1), batch(5)

    def losses(alpha: float) -> dict[str, Tensor]:
        features, _ = taught(model, some, alpha)
        return joint_loss(student, some, draws=fixed(5), taught=features)

    close(losses(0.3)["itc"], 0.7 * losses(0.0)["itc"] + 0.3 * losses(1.0)["itc"])
    assert far(losses(0.0)["itc"], losses(1.0)["itc"])
    for name in ("itm", "lm"):
        close(losses(0.3)[name], losses(1.0)[name])


@pytest.mark.parametrize(
    ("change", "losses"),
    [
        ({"itc_weight": 0.0}, {"itm", "lm"}),
        ({"itm_weight": 0.0}, {"itc", "lm"}),
        ({"lm_weight": 0.0}, {"itc", "itm"}),
        ({"itm_weight": 0.0, "lm_weight": 0.0}, {"itc"}),
        ({"itc_weight": 0.0, "itm_weight": 0.0, "heads": ("lm",)}, {"lm"}),
    ],
)
def test_a_loss_without_weight_isn_t_computed(change: dict[str, Any], losses: set[str]) -> None:
    model, some = build(replace(BLIP, **change)).train(), batch(5)
    found = model.loss(some)
    assert {name for name in found if name in ("itc", "itm", "lm")} == losses
    close(found["loss"], sum(found[name] for name in losses))  # type: ignore[arg-type]
    assert model.teachable is ("itc" in losses)


def test_weights_weigh() -> None:
    model, some = build(replace(BLIP, itc_weight=0.5, itm_weight=2.0, lm_weight=3.0)), batch(5)
    losses = model.loss(some)
    close(losses["loss"], 0.5 * losses["itc"] + 2 * losses["itm"] + 3 * losses["lm"])


@pytest.mark.parametrize(("sharing", "expected"), [("all_but_self_attention", [5] * 4), ("none", [5] * 8)])
def test_image_keys_are_computed_once(sharing: Any, expected: list[int]) -> None:
    """Both roles meet an image in one projection for each layer, where they share it."""
    model, some = build(replace(BLIP, sharing=sharing)), batch(5)
    counts: list[int] = []
    for part in (model.text, model.decoder):
        for layer in part.layers if part is not None else ():
            kv: Any = layer.cross_attn.kv  # type: ignore[union-attr]
            kv.register_forward_hook(lambda _, given, __: counts.append(len(given[0])))
    model.loss(some)
    assert counts == expected


def test_checkpointed_layers_give_the_same_gradient() -> None:
    some, gradients = batch(4, full=True), []
    for enabled in (False, True):
        model = build().train()
        model.image.checkpointing = model.text.checkpointing = enabled  # type: ignore[union-attr]
        joint_loss(model, some, draws=fixed(4))["loss"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient)  # type: ignore[arg-type]


def test_half_precision_losses_are_near() -> None:
    model, some = build().train(), batch(6)
    exact = joint_loss(model, some, draws=fixed(6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = joint_loss(model, some, draws=fixed(6))
    half["loss"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    for name in ("itc", "lm", "loss"):
        torch.testing.assert_close(half[name].float(), exact[name], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("rows", [1, 2])
def test_small_batches(rows: int) -> None:
    check_finite(build(), batch(rows))


def test_sixty_steps_learn_eight_pairs() -> None:
    check_learns(build(replace(BLIP, logit_scale_init=14.0)).train(), batch(8), ("itc", "itm", "lm"))
