"""CLIP: pooling, temperature, both losses, gradients, learning."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import SigLipLoss
from torch import Tensor

from tests.models.small import key_mask, words
from vlm.errors import ConfigError
from vlm.models.clip import Clip, ClipConfig
from vlm.models.common_space import pool_text
from vlm.models.transformer import TransformerConfig
from vlm.models.vit import ViTConfig

SOFTMAX = ClipConfig(
    image=ViTConfig(image_size=16, patch_size=8, width=32, layers=2, heads=4, mlp_width=64),
    text=TransformerConfig(vocab_size=50, context_length=12, width=32, layers=2, heads=4, mlp_width=64),
    embed_dim=24,
)
SIGMOID = replace(SOFTMAX, loss="sigmoid", logit_scale_init=10.0, logit_bias_init=-10.0)
BOTH = pytest.mark.parametrize("config", [SOFTMAX, SIGMOID], ids=["softmax", "sigmoid"])


@dataclass(frozen=True)
class Some:
    """The part of a batch that CLIP reads."""

    pixels: Tensor
    tokens: dict[str, Tensor]
    ids: Tensor

    def __len__(self) -> int:
        return len(self.pixels)


def batch(rows: int, length: int = 8, seed: int = 0) -> Some:
    generator = torch.Generator().manual_seed(seed)
    mask = key_mask(torch.randint(2, length + 1, (rows,), generator=generator).tolist(), length)
    ids = words(rows, length, seed)
    pixels = torch.randn(rows, 3, 16, 16, generator=generator)
    return Some(pixels, {"input_ids": ids, "attention_mask": mask}, distinct(rows))


def distinct(rows: int) -> Tensor:
    return torch.arange(2 * rows).reshape(2, rows).T.contiguous()


def build(config: ClipConfig, seed: int = 0) -> Clip:
    torch.manual_seed(seed)
    return Clip(config).eval()


@pytest.mark.parametrize("image_pool", ["cls", "mean"])
@pytest.mark.parametrize("text_pool", ["cls", "eot", "mean"])
def test_features_have_unit_norm(image_pool: Any, text_pool: Any) -> None:
    model, some = build(replace(SOFTMAX, image_pool=image_pool, text_pool=text_pool)), batch(5)
    for features in (model.encode_image(some.pixels), model.encode_text(some.tokens)):
        assert features.shape == (5, 24)
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(5))


def test_text_pools_by_hand() -> None:
    states = torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert pool_text(states, mask, "cls").tolist() == [[0, 1], [6, 7]]
    assert pool_text(states, mask, "eot").tolist() == [[2, 3], [10, 11]]
    assert pool_text(states, mask, "mean").tolist() == [[1, 2], [8, 9]]
    with pytest.raises(ConfigError, match="did you mean 'mean'"):
        pool_text(states, mask, "means")


def test_image_pools_take_what_they_say() -> None:
    some = batch(3)
    model = build(SOFTMAX)
    states = model.image(some.pixels)
    expected = F.normalize(model.image_projection(states[:, 0]), dim=-1)
    torch.testing.assert_close(model.encode_image(some.pixels), expected)
    twin = build(replace(SOFTMAX, image_pool="mean"))
    twin.load_state_dict(model.state_dict())
    expected = F.normalize(model.image_projection(states[:, 1:].mean(dim=1)), dim=-1)
    torch.testing.assert_close(twin.encode_image(some.pixels), expected)


@pytest.mark.parametrize("text_pool", ["cls", "eot", "mean"])
def test_padding_and_batch_change_no_feature(text_pool: Any) -> None:
    model, some = build(replace(SOFTMAX, text_pool=text_pool)), batch(4)
    together = model.encode_text(some.tokens)
    wider = {name: F.pad(value, (0, 3), value=0) for name, value in some.tokens.items()}
    torch.testing.assert_close(model.encode_text(wider), together, rtol=1e-5, atol=1e-5)
    for i, length in enumerate(some.tokens["attention_mask"].sum(dim=1).tolist()):
        alone = {name: value[i : i + 1, :length] for name, value in some.tokens.items()}
        torch.testing.assert_close(model.encode_text(alone)[0], together[i], rtol=1e-5, atol=1e-5)


def test_integer_masks_are_taken() -> None:
    model, some = build(replace(SOFTMAX, text_pool="mean")), batch(4)
    tokens = some.tokens | {"attention_mask": some.tokens["attention_mask"].long()}
    torch.testing.assert_close(model.encode_text(tokens), model.encode_text(some.tokens))


@pytest.mark.parametrize(("start", "expected"), [(1e6, 100.0), (1e-3, 1.0), (14.0, 14.0)])
def test_clamp_keeps_the_scale_in_bounds(start: float, expected: float) -> None:
    model = build(replace(SOFTMAX, logit_scale_max=100.0))
    with torch.no_grad():
        model.log_scale.fill_(math.log(start))
    model.clamp_()
    assert model.logit_scale.shape == (1,)
    assert model.logit_scale.item() == pytest.approx(expected, rel=1e-5)
    assert model.log_scale.requires_grad and model.log_scale.grad_fn is None


def test_scale_starts_where_it_should() -> None:
    assert build(SOFTMAX).logit_scale.item() == pytest.approx(1 / 0.07)
    assert build(SIGMOID).logit_scale.item() == pytest.approx(10.0)
    assert build(SOFTMAX).logit_bias is None
    bias = build(SIGMOID).logit_bias
    assert bias is not None and bias.shape == (1,) and bias.item() == -10.0


@BOTH
def test_scale_is_bounded_after_steps_that_push_it_out(config: ClipConfig) -> None:
    model, some = build(replace(config, logit_scale_max=12.0)), batch(4)
    optimiser = torch.optim.SGD(model.parameters(), lr=5.0)
    for _ in range(3):
        optimiser.zero_grad()
        model.loss(some)["loss"].backward()
        optimiser.step()
        model.clamp_()
        assert 1.0 - 1e-6 <= model.logit_scale.item() <= 12.0 + 1e-4


@BOTH
def test_every_parameter_gets_a_gradient(config: ClipConfig) -> None:
    model = build(replace(config, text=replace(config.text, context_length=8))).train()
    some = batch(6)
    full = some.tokens | {"attention_mask": torch.ones(6, 8, dtype=torch.bool)}
    model.loss(replace(some, tokens=full))["loss"].backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@BOTH
def test_forward_gives_all_that_the_loss_reads(config: ClipConfig) -> None:
    model, some = build(config), batch(5)
    features = model(some).features
    names = {"image", "text", "log_scale"} | ({"logit_bias"} if config is SIGMOID else set())
    assert set(features) == names
    assert all(value.grad_fn is not None for value in features.values())
    torch.testing.assert_close(features["image"], model.encode_image(some.pixels))
    torch.testing.assert_close(features["text"], model.encode_text(some.tokens))


@BOTH
def test_loss_is_contrast_with_oneself(config: ClipConfig) -> None:
    model, some, ids = build(config), batch(5), distinct(5)
    alone = model.loss(replace(some, ids=ids))
    features = model(some).features
    assert set(alone) == {"loss", "itc", "scale"}
    contrast = model.contrast(features, features, row_ids=ids, ids=ids)
    torch.testing.assert_close({"loss": contrast["itc"], **contrast}, alone)
    assert alone["scale"].item() == pytest.approx(model.logit_scale.item())
    assert not alone["itc"].requires_grad and alone["loss"].requires_grad


def test_losses_equal_open_clips() -> None:
    model, some = build(SOFTMAX), batch(5)
    features = model(some).features
    expected = open_clip.ClipLoss()(features["image"], features["text"], model.logit_scale)
    torch.testing.assert_close(model.loss(some)["loss"], expected)
    model = build(SIGMOID)
    features = model(some).features
    expected = SigLipLoss()(features["image"], features["text"], model.logit_scale, model.logit_bias)
    torch.testing.assert_close(model.loss(some)["loss"], expected)


@BOTH
def test_repeated_ids_are_not_pushed_apart(config: ClipConfig) -> None:
    """Two rows of one concept with swapped texts cost the same as unswapped ones; without the id they don't."""
    model, some = build(config), batch(4)
    features = model(some).features
    swapped = features | {"text": features["text"][[1, 0, 2, 3]]}
    alike = torch.tensor([[7, 0], [7, 1], [8, 2], [9, 3]])

    def loss(of: dict[str, Tensor], ids: Tensor) -> float:
        return model.contrast(of, of, row_ids=ids, ids=ids)["itc"].item()

    assert loss(swapped, alike) == pytest.approx(loss(features, alike), rel=1e-5)
    assert abs(loss(swapped, distinct(4)) - loss(features, distinct(4))) > 1e-6
    assert abs(loss(features, alike) - loss(features, distinct(4))) > 1e-3


@BOTH
def test_chunks_and_parts_equal_the_whole(config: ClipConfig) -> None:
    some, ids = batch(6), torch.tensor([[0, 0], [0, 1], [1, 2], [2, 3], [3, 3], [4, 4]])
    whole, chunked = build(config), build(replace(config, chunk=2))
    losses = [model.loss(replace(some, ids=ids))["loss"] for model in (whole, chunked)]
    torch.testing.assert_close(losses[1], losses[0])
    slopes = [
        torch.autograd.grad(loss, list(m.parameters()), allow_unused=True)
        for loss, m in zip(losses, (whole, chunked), strict=True)
    ]
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other)

    features = whole(some).features
    parts = [
        whole.contrast(
            {name: value if value.numel() == 1 else value[rows] for name, value in features.items()},
            features,
            row_ids=ids[rows],
            ids=ids,
        )["itc"]
        for rows in (slice(0, 3), slice(3, 6))
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), losses[0])


@BOTH
@pytest.mark.parametrize("rows", [1, 2])
def test_small_batches(config: ClipConfig, rows: int) -> None:
    model = build(config)
    losses = model.loss(batch(rows))
    losses["loss"].backward()
    assert losses["loss"].shape == losses["scale"].shape == ()
    assert losses["loss"].isfinite()


@BOTH
def test_similarity_is_what_the_loss_contrasts(config: ClipConfig) -> None:
    model, some = build(config), batch(4)
    image, text = model.encode_image(some.pixels), model.encode_text(some.tokens)
    logits = model.similarity(image, text)
    assert logits.shape == (4, 4)
    wanted = torch.eye(4)
    if config is SIGMOID:
        expected = -F.logsigmoid((2 * wanted - 1) * logits).sum() / 4
    else:
        expected = 0.5 * (F.cross_entropy(logits, wanted) + F.cross_entropy(logits.T, wanted))
    torch.testing.assert_close(model.loss(some)["loss"], expected)


@BOTH
def test_thirty_steps_learn_sixteen_pairs(config: ClipConfig) -> None:
    model, some, ids = build(config).train(), batch(16), distinct(16)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = model.loss(replace(some, ids=ids))["loss"]
        loss.backward()
        optimiser.step()
        model.clamp_()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    with torch.no_grad():
        best = model.similarity(model.encode_image(some.pixels), model.encode_text(some.tokens)).argmax(dim=1)
    assert (best == torch.arange(16)).float().mean() > 0.8


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"image_pool": "avg"}, "image_pool 'avg'"),
        ({"text_pool": "eos"}, "text_pool 'eos'"),
        ({"loss": "sigmiod"}, "did you mean 'sigmoid'"),
        ({"logit_scale_init": 0.0}, "logit_scale_init 0"),
        ({"logit_scale_max": 0.5}, "logit_scale_max 0.5"),
    ],
)
def test_bad_settings_are_named(change: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Clip(replace(SOFTMAX, **change))  # type: ignore[arg-type]
