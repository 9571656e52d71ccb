"""Packed linear layers give what the network gave."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.models.small_blip import BLIP, build
from tests.tasks.small import noise, random_model
from vlm.models.packed import PackedLinear, pack_linears

MAPS = Path("/proc/self/maps")


def test_both_towers_give_the_same_features() -> None:
    model = random_model()
    pixels, tokens = model.pixels(noise(5)), model.tokens(["a red dot", "frog", "a much longer sentence about frogs"])
    before = model.encode_image(pixels), model.encode_text(tokens)
    linears = sum(type(module) is nn.Linear for module in model.network.modules())
    assert pack_linears(model.network) == linears > 10
    assert not any(type(module) is nn.Linear for module in model.network.modules())
    for expected, rows in ((before[0], model.encode_image(pixels)), (before[1], model.encode_text(tokens))):
        assert torch.allclose(rows, expected, atol=1e-6)
    for row, expected in zip(pixels, before[0], strict=True):  # whatever the batch
        assert torch.allclose(model.encode_image(row[None])[0], expected, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_any_leading_shape(bias: bool) -> None:
    linear = nn.Linear(6, 4, bias=bias)
    packed = PackedLinear(linear.weight, linear.bias)
    with torch.inference_mode():
        for shape in ((6,), (3, 6), (2, 3, 6), (0, 6)):
            states = torch.randn(shape)
            assert torch.allclose(packed(states), linear(states), atol=1e-6)


def test_other_types_and_derived_layers_are_left() -> None:
    class Own(nn.Linear):
        """Others may look into it."""

    network = nn.Sequential(nn.Linear(4, 4).bfloat16(), Own(4, 4), nn.Sequential(nn.Linear(4, 4)))
    assert pack_linears(network) == 1
    assert isinstance(network[2][0], PackedLinear) and type(network[1]) is Own


@pytest.mark.skipif(not MAPS.is_file(), reason="this system has no /proc/self/maps")
def test_nothing_of_the_weights_file_is_kept(tmp_path: Path) -> None:
    """Tensors of a safetensors file are parts of one mapping, which the last of them keeps in memory."""
    network = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 4), nn.LayerNorm(4))
    path, ids = tmp_path / "model.safetensors", torch.tensor([[1, 2]])
    save_file(network.state_dict(), path)
    network.load_state_dict(load_file(path), assign=True)
    with torch.inference_mode():
        expected = network.eval()(ids)
        assert str(path) in MAPS.read_text("utf-8")
        assert pack_linears(network) == 1
        gc.collect()
        assert str(path) not in MAPS.read_text("utf-8")
        assert torch.allclose(network(ids), expected, atol=1e-6)


@pytest.mark.parametrize("sharing", ["none", "all_but_self_attention"])
def test_a_decoder_says_the_same(sharing: Literal["none", "all_but_self_attention"]) -> None:
    network = build(replace(BLIP, sharing=sharing))
    ids = torch.randint(0, 40, (3, 5), generator=torch.Generator().manual_seed(0))
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pixels = torch.randn(3, 3, BLIP.image.image_size, BLIP.image.image_size)
    with torch.inference_mode():
        expected = network.lm_logits(pixels, tokens), network.match(pixels, tokens)
        assert pack_linears(network) > 10
        assert torch.allclose(network.lm_logits(pixels, tokens), expected[0], atol=1e-5)
        assert torch.allclose(network.match(pixels, tokens), expected[1], atol=1e-5)
