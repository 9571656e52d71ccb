"""Padding left out of linear layers on a CPU: the same numbers and gradients, from fewer rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.models.small import CAUSAL, SMALL, build
from vlm.models import attention
from vlm.models.attention import Attention, real_tokens
from vlm.models.cache import KeyValues
from vlm.models.transformer import TransformerConfig

LENGTHS = (3, 8, 1, 5)
CROSS = replace(SMALL, cross_layers=(0, 2), cross_width=16)


def mask() -> Tensor:
    return torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


def run(config: TransformerConfig, monkeypatch: pytest.MonkeyPatch, *, packed: bool) -> tuple[Tensor, list[Tensor]]:
    """States of real tokens, and the gradient of every parameter."""
    with monkeypatch.context() as patch:
        if not packed:
            patch.setattr(attention, "_WORTH", -1.0)
        model = build(config)
        torch.manual_seed(1)
        ids = torch.randint(1, config.vocab_size, (len(LENGTHS), max(LENGTHS)))
        image = model.image_states(torch.randn(2, 7, 16)) if config.cross_layers else None  # each for two texts
        states = model(model.embed(ids), key_mask=mask(), image=image)[mask()]  # (M, D)
        (states * torch.randn_like(states)).sum().backward()
    return states, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("config", [SMALL, CAUSAL, replace(SMALL, norm="pre"), CROSS, replace(CROSS, causal=True)])
def test_states_and_gradients_are_those_of_padded_rows(
    config: TransformerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    states, gradients = run(config, monkeypatch, packed=True)
    wanted, slopes = run(config, monkeypatch, packed=False)
    torch.testing.assert_close(states, wanted, atol=1e-5, rtol=1e-5)
    assert len(gradients) == len(slopes)
    for found, slope in zip(gradients, slopes, strict=True):
        torch.testing.assert_close(found, slope, atol=1e-4, rtol=1e-4)


def test_linear_layers_see_real_tokens_alone() -> None:
    model = build(SMALL)
    rows: set[int] = set()
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda _, given: rows.add(given[0].shape[:-1].numel()))
    found = model(model.embed(torch.ones(len(LENGTHS), max(LENGTHS), dtype=torch.long)), key_mask=mask())
    assert rows == {sum(LENGTHS)}
    assert found.shape == (len(LENGTHS), max(LENGTHS), SMALL.width)
    assert not found[~mask()].any()


def test_hardly_any_padding_stays() -> None:
    nearly = torch.ones(4, 8, dtype=torch.bool)
    nearly[0, 6:] = False
    assert real_tokens(nearly) is None
    assert real_tokens(torch.ones(4, 8, dtype=torch.bool)) is None
    assert real_tokens(mask()) is not None


def test_a_text_keeps_its_place() -> None:
    real = real_tokens(mask())
    assert real is not None
    x = torch.randn(len(LENGTHS), max(LENGTHS), 5)
    assert torch.equal(real.pad(real.pack(x)), x * mask()[..., None])


def test_images_that_texts_cannot_share_are_refused() -> None:
    looks = Attention(32, 4, source_width=16)
    source = looks.keys_values(torch.randn(3, 7, 16))
    with pytest.raises(ValueError, match="4 texts can't share 3 images evenly"):
        looks(torch.randn(4, 6, 32), source)
    assert isinstance(source, KeyValues)
