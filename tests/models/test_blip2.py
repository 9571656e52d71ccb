"""BLIP-2's first stage: verbs, what is frozen, padding and batches, leaks, losses by the verbs, settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.small import close, far
from tests.models.small_albef import batch
from tests.models.small_blip2 import BLIP2, build, digest
from tests.models.small_qformer import DEC, QUERIES
from tests.models.test_albef_losses import fixed, paired
from vlm.errors import ConfigError, MissingVerbError
from vlm.models.blip2 import HEADS, Blip2, Blip2Config
from vlm.models.cache import KVCache
from vlm.models.stage import joint_loss


def rows(tokens: Any, chosen: slice) -> dict[str, Tensor]:
    part = tokens.select(chosen)
    return {name: part[name] for name in part}


def other_word(tokens: Any, place: int) -> dict[str, Tensor]:
    ids = tokens.input_ids.clone()
    ids[:, place] = (ids[:, place] + 5) % 48
    return {"input_ids": ids, "attention_mask": tokens.attention_mask}


def test_verbs_and_shapes() -> None:
    model, some = build(), batch(3)
    image, text = model.encode_image(some.pixels), model.encode_text(some.tokens)
    assert image.shape == (3, QUERIES, 16) and text.shape == (3, 16)
    close(image.norm(dim=-1), torch.ones(3, QUERIES))
    by_hand = torch.stack([(image[i] @ text.T).max(dim=0).values for i in range(3)])
    close(model.similarity(image, text), model.logit_scale * by_hand)
    assert model.match(some.pixels, some.tokens).shape == (3, 2)
    assert model.lm_logits(some.pixels, some.tokens).shape == (3, 8, 50)


def test_matching_is_the_mean_over_queries() -> None:
    model, some = build(), batch(3)
    assert model.itm_head is not None
    states = model.qformer.joint(some.tokens.input_ids, some.tokens.attention_mask, model.look(some.pixels))
    expected = torch.stack([model.itm_head(states[:, i]) for i in range(QUERIES)]).mean(dim=0)
    close(model.match(some.pixels, some.tokens), expected)


def test_batched_equals_single() -> None:
    """Whatever stands beside a row, and however far it is padded."""
    model, some = build(), batch(4)
    whole = [model.encode_text(some.tokens), model.match(some.pixels, some.tokens)]
    logits = model.lm_logits(some.pixels, some.tokens)
    for row in range(4):
        alone, pixels = rows(some.tokens, slice(row, row + 1)), some.pixels[row : row + 1]
        close(model.encode_image(pixels)[0], model.encode_image(some.pixels)[row])
        close(model.encode_text(alone)[0], whole[0][row])
        close(model.match(pixels, alone)[0], whole[1][row])
        close(model.lm_logits(pixels, alone)[0], logits[row, : alone["input_ids"].shape[1]])


def test_no_leaks() -> None:
    """A later word changes no earlier logit; features of a side never depend on the other side."""
    model, some = build(), batch(3, full=True)
    changed = other_word(some.tokens, 5)
    before, after = (model.lm_logits(some.pixels, tokens) for tokens in (some.tokens, changed))
    assert torch.equal(before[:, :5], after[:, :5]) and far(before[:, 5:], after[:, 5:])
    encoded = [model(replace_tokens(some, tokens)) for tokens in (some.tokens, changed)]
    assert torch.equal(encoded[0].features["image"], encoded[1].features["image"])
    assert torch.equal(encoded[0].states["own_past"], encoded[1].states["own_past"])
    assert far(encoded[0].features["text"], encoded[1].features["text"])
    pictures = model(replace(some, pixels=some.pixels.flip(0)))
    assert torch.equal(pictures.features["text"], encoded[0].features["text"])


def replace_tokens(some: Any, tokens: Any) -> Any:
    return replace(some, tokens=type(some.tokens)(tokens["input_ids"], tokens["attention_mask"]))


def test_the_start_token_of_what_is_said_is_dec() -> None:
    model, some = build(), batch(3)
    ids = some.tokens.input_ids.clone()
    ids[:, 0] = DEC
    close(model.lm_logits(some.pixels, {"input_ids": ids, "attention_mask": some.tokens.attention_mask}),
          model.lm_logits(some.pixels, some.tokens))  # fmt: skip


def test_decoding_with_a_cache() -> None:
    model, some = build(), batch(2, full=True)
    ids = some.tokens.input_ids.clone()
    ids[:, 0] = DEC
    expected = model.lm_logits(some.pixels, some.tokens)
    image, cache = model.decoder_keys_values(model.image_states(some.pixels).states), KVCache()
    found = [model.decode(ids[:, i : i + 1], image=image, cache=cache) for i in range(8)]
    close(torch.stack(found, dim=1), expected)


def test_the_image_encoder_is_frozen() -> None:
    """No gradient, eval mode whatever is asked for, and the same weights after steps that move all others."""
    model, some = build().train(), batch(4)
    assert not model.image.training and not any(p.requires_grad for p in model.image.parameters())
    assert model.qformer.training and all(p.requires_grad for n, p in model.named_parameters() if n[:6] != "image.")
    before, others = digest(model.image), digest(model.qformer)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model.loss(some)["loss"].backward()
        optimiser.step()
        model.clamp_()
    assert digest(model.image) == before and digest(model.qformer) != others
    assert all(p.grad is None for p in model.image.parameters())


@pytest.mark.parametrize("heads", [HEADS, ("itc", "itm"), ("itg",), ("itc", "itg"), ("itc",)])
def test_every_trained_parameter_gets_a_gradient(heads: Any) -> None:
    model, some = build(replace(BLIP2, heads=heads)).train(), batch(6, full=True)
    model.loss(some)["loss"].backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    idle = {name for name, p in trained.items() if p.grad is None or not p.grad.any()}
    if heads == ("itg",):  # what the queries become after the last layer is of no use to words
        last = ("cross_attn", "cross_norm", "mlp.query", "mlp_norm.query")
        assert idle and all(name.startswith(tuple(f"qformer.text.layers.2.{part}" for part in last)) for name in idle)
    else:
        assert idle == set()


def test_losses_by_the_verbs() -> None:
    """All three as a reader of the paper would write them, from the verbs; ITC and ITG smoothed."""
    model, some = build(), batch(4)
    sums, pairs = paired(model, some)
    other = pairs.partners
    own = model.match(some.pixels, some.tokens)
    tokens = {name: some.tokens[name][other["text"]] for name in some.tokens}
    wrong = torch.cat([model.match(some.pixels, tokens), model.match(some.pixels[other["image"]], some.tokens)])
    expected = F.cross_entropy(own, torch.ones(4, dtype=torch.long), reduction="sum")
    close(sums["itm"], expected + F.cross_entropy(wrong, torch.zeros(8, dtype=torch.long), reduction="sum"))
    assert sums["itm_accuracy"] == (own.argmax(dim=1) == 1).sum() + (wrong.argmax(dim=1) == 0).sum()
    logits = model.lm_logits(some.pixels, some.tokens)[:, :-1].flatten(0, 1)
    said, truth = some.tokens.attention_mask[:, 1:].flatten(), some.tokens.input_ids[:, 1:].flatten()
    close(sums["itg"], F.cross_entropy(logits[said], truth[said], label_smoothing=0.1, reduction="sum"))
    losses = joint_loss(model, some, draws=fixed(4))
    close(losses["itg"], sums["itg"] / int(said.sum()))
    close(losses["itm"], sums["itm"] / 12)
    similar = model.similarity(model.encode_image(some.pixels), model.encode_text(some.tokens))
    both = [F.cross_entropy(one, torch.arange(4), label_smoothing=0.1) for one in (similar, similar.T)]
    close(losses["itc"], (both[0] + both[1]) / 2)
    close(losses["loss"], losses["itc"] + losses["itm"] + losses["itg"])


def test_the_image_is_encoded_once_a_step() -> None:
    model, some, counts = build(), batch(4), []
    model.image.register_forward_hook(lambda *_: counts.append(1))
    model.loss(some)
    assert counts == [1]


def test_states_seen_before_are_the_same_as_pixels() -> None:
    model, some = build(), batch(4)
    seen = replace(some, pixels=torch.empty(4, 3, 0, 0), seen=model.look(some.pixels))
    found, expected = (joint_loss(model, one, draws=fixed(4)) for one in (seen, some))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("change", "losses"),
    [
        ({"itc_weight": 0.0}, {"itm", "itg"}),
        ({"itm_weight": 0.0}, {"itc", "itg"}),
        ({"itg_weight": 0.0}, {"itc", "itm"}),
        ({"heads": ("itg",)}, {"itg"}),
    ],
)
def test_a_loss_without_weight_isn_t_computed(change: dict[str, Any], losses: set[str]) -> None:
    found = build(replace(BLIP2, **change)).train().loss(batch(5))
    assert {name for name in found if name in HEADS} == losses
    close(found["loss"], sum(found[name] for name in losses))  # type: ignore[arg-type]


def test_a_prompt_is_put_in_and_not_learnt() -> None:
    text = replace(BLIP2.qformer.text, context_length=10)
    config = replace(BLIP2, heads=("itg",), qformer=replace(BLIP2.qformer, text=text))
    model, some = build(replace(config, prompt_ids=(5, 6))), batch(4)
    ids, mask = some.tokens.input_ids, some.tokens.attention_mask
    prompted = torch.cat([torch.full((4, 1), DEC), torch.tensor([[5, 6]]).expand(4, 2), ids[:, 1:]], dim=1)
    real = torch.cat([mask[:, :1], torch.ones(4, 2, dtype=torch.bool), mask[:, 1:]], dim=1)
    logits = model.lm_logits(some.pixels, {"input_ids": prompted, "attention_mask": real})[:, 2:-1]
    close(model.loss(some)["itg"], F.cross_entropy(logits[mask[:, 1:]], ids[:, 1:][mask[:, 1:]], label_smoothing=0.1))
    assert far(build(config).loss(some)["itg"], model.loss(some)["itg"])


def test_half_precision_losses_are_near() -> None:
    model, some = build().train(), batch(6)
    exact = joint_loss(model, some, draws=fixed(6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = joint_loss(model, some, draws=fixed(6))
    half["loss"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    for name in ("itc", "itg"):
        torch.testing.assert_close(half[name].float(), exact[name], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("count", [1, 2])
def test_small_batches(count: int) -> None:
    losses = build().loss(batch(count))
    losses["loss"].backward()
    assert all(value.isfinite() and value.shape == () for value in losses.values())


def test_heads_that_aren_t_there() -> None:
    model, some = build(replace(BLIP2, heads=("itg",))), batch(2)
    assert model.qformer.config.speaks and model.image_states(some.pixels).features.shape == (2, 0)
    for call in (lambda: model.encode_image(some.pixels), lambda: model.match(some.pixels, some.tokens)):
        with pytest.raises(MissingVerbError, match="BLIP-2 has no it"):
            call()
    with pytest.raises(MissingVerbError, match="no itg head"):
        build(replace(BLIP2, heads=("itc",))).lm_logits(some.pixels, some.tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": ("itm",)}, "itc beside itm"),
        ({"heads": ("lm",)}, "unknown head 'lm'"),
        ({"itg_weight": -1.0}, "at least 0"),
        ({"itc_smoothing": 1.0}, "itc_smoothing is a share"),
        ({"prompt_ids": (50,)}, r"prompt_ids \[50\]"),
        ({"image": replace(BLIP2.image, width=32)}, "must be image.width 32"),
        ({"qformer": replace(BLIP2.qformer, instructed=True)}, "instructed must be false"),
        ({"logit_scale_init": 1.0}, "logit_scale_init"),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Blip2(replace(BLIP2, **change))


def test_defaults_are_the_papers() -> None:
    config = Blip2Config()
    assert (config.qformer.queries, config.embed_dim, config.itc_smoothing, config.label_smoothing) == (
        32,
        256,
        0.1,
        0.1,
    )
    with torch.device("meta"):
        model = Blip2(config)
    assert not model.teachable and model.loss_weights == {"itc": 1.0, "itm": 1.0, "itg": 1.0}
