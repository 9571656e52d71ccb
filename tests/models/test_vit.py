"""The image encoder: sizes, patches, patch dropout, checkpointing, settings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlm.errors import ConfigError
from vlm.models.vit import ViT, ViTConfig

SMALL = ViTConfig(image_size=32, patch_size=8, width=32, layers=2, heads=4, mlp_width=64)


def build(config: ViTConfig = SMALL) -> ViT:
    torch.manual_seed(0)
    return ViT(config).eval()


def pixels(rows: int, height: int = 32, width: int = 32, seed: int = 1) -> Tensor:
    return torch.randn(rows, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("size", "patch"), [(32, 8), (32, 16), (48, 16), (56, 14), (16, 4), (8, 8)])
def test_any_size_and_patch(size: int, patch: int) -> None:
    model = build(replace(SMALL, image_size=size, patch_size=patch))
    assert model(pixels(2, size, size)).shape == (2, (size // patch) ** 2 + 1, 32)


@pytest.mark.parametrize(("width", "mlp"), [(112, 488), (1408, 6144), (32, 33)])
def test_the_feed_forward_is_as_wide_as_asked(width: int, mlp: int) -> None:
    with torch.device("meta"):
        model = ViT(replace(SMALL, width=width, mlp_width=mlp, layers=1))
    assert model.trunk.blocks[0].mlp.fc1.weight.shape == (mlp, width)


@pytest.mark.parametrize(("final", "wanted"), [(0.0, 1e-3), (0.5, 0.5)])
def test_the_last_norm_may_have_an_eps_of_its_own(final: float, wanted: float) -> None:
    model = build(replace(SMALL, norm_eps=1e-3, final_norm_eps=final))
    before: list[Tensor] = []
    model.trunk.blocks[-1].register_forward_hook(lambda *call: before.append(call[-1]))
    states = model(pixels(1))
    torch.testing.assert_close(states, torch.nn.functional.layer_norm(before[0], (32,), eps=wanted))
    assert model.trunk.blocks[0].norm1.eps == 1e-3


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7))
def test_other_sizes_interpolate_the_positions(high: int, wide: int) -> None:
    states = build()(pixels(1, 8 * high, 8 * wide))
    assert states.shape == (1, high * wide + 1, 32)
    assert states.isfinite().all()


def test_positions_are_interpolated_and_not_cut() -> None:
    """On a flat image only the positions differ: twice the size has their in-betweens, in the same order."""
    model = build()
    with torch.no_grad():
        ramp = torch.arange(4.0)
        grid = model.trunk.pos_embed[:, 1:].reshape(4, 4, 32)
        grid.zero_()
        grid[..., 0] = ramp[:, None]
        grid[..., 1] = ramp[None, :]
    first = model.trunk.blocks[0]
    seen: list[Tensor] = []
    first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    flat = torch.zeros(1, 3, 64, 64)
    model(flat)
    bias = model.trunk.patch_embed.proj.bias
    places = (seen[0][0, 1:] - bias).reshape(8, 8, 32)
    rows, columns = places[:, 0, 0], places[0, :, 1]
    torch.testing.assert_close(rows, columns)
    assert (rows[1:-1].diff() > 0).all()
    assert rows.mean().item() == pytest.approx(1.5, abs=1e-3)
    assert rows[0].item() < 0.1 and rows[-1].item() > 2.9


def test_a_row_does_not_depend_on_its_batch() -> None:
    model, images = build(), pixels(4)
    batched = model(images)
    for i in range(4):
        torch.testing.assert_close(batched[i : i + 1], model(images[i : i + 1]), rtol=1e-5, atol=1e-5)


def test_the_patches_stand_row_by_row_after_cls() -> None:
    """A change in one patch moves that token's input alone."""
    model = build()
    seen: list[Tensor] = []
    model.trunk.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = pixels(1)
    changed = images.clone()
    changed[:, :, 8:16, 24:32] += 1  # second row, last of four columns
    model(images)
    model(changed)
    moved = (seen[0] - seen[1]).abs().amax(dim=(0, 2)) > 0
    assert moved.nonzero().flatten().tolist() == [1 + 4 + 3]


def test_patch_dropout_only_in_training() -> None:
    model, images = build(replace(SMALL, patch_dropout=0.5)), pixels(2)
    assert model(images).shape == (2, 17, 32)
    torch.testing.assert_close(model(images), build()(images))
    model.train()
    assert model(images).shape == (2, 9, 32)  # [CLS] is kept
    assert not torch.equal(model(images), model(images))


def test_stochastic_depth_only_in_training() -> None:
    model, images = build(replace(SMALL, drop_path=0.5)), pixels(4)
    torch.testing.assert_close(model(images), build()(images))
    model.train()
    outputs = [model(images) for _ in range(4)]
    assert any(not torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("changes", [{}, {"patch_dropout": 0.25}, {"drop_path": 0.5}])
def test_checkpointing_changes_nothing(changes: dict[str, float]) -> None:
    def run(checkpointing: bool) -> tuple[Tensor, dict[str, Tensor]]:
        model = build(replace(SMALL, **changes)).train()  # type: ignore[arg-type]
        model.checkpointing = checkpointing
        assert model.checkpointing is checkpointing
        torch.manual_seed(7)
        out = model(pixels(4))
        out.pow(3).sum().backward()
        return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    (plain, slopes), (again, again_slopes) = run(False), run(True)
    torch.testing.assert_close(again, plain)
    torch.testing.assert_close(again_slopes, slopes)
    assert len(slopes) == len(list(build().parameters()))


def test_checkpointing_holds_less() -> None:
    def held(checkpointing: bool) -> int:
        model, seen = build(replace(SMALL, layers=4)).train(), {}
        model.checkpointing = checkpointing

        def pack(tensor: Tensor) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(pixels(8))
        assert out.requires_grad
        return sum(seen.values())

    assert held(True) < held(False) / 2


def test_every_parameter_gets_a_gradient() -> None:
    for config in (SMALL, replace(SMALL, pre_norm=True, activation="quick_gelu")):
        model = build(config).train()
        model(pixels(2)).pow(3).sum().backward()
        assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_pre_norm_is_clips_form() -> None:
    names = dict(build(replace(SMALL, pre_norm=True)).named_parameters())
    assert "trunk.norm_pre.weight" in names and "trunk.patch_embed.proj.bias" not in names
    assert "trunk.norm_pre.weight" not in dict(build().named_parameters())


def test_activations_and_eps_are_used() -> None:
    outputs = [
        build(replace(SMALL, activation=name))(pixels(1))  # type: ignore[arg-type]
        for name in ("gelu", "quick_gelu", "gelu_tanh")
    ]
    assert not any(torch.equal(outputs[i], outputs[j]) for i, j in [(0, 1), (0, 2), (1, 2)])
    model = build(replace(SMALL, norm_eps=0.25))
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {0.25}


@pytest.mark.parametrize(("height", "width"), [(33, 32), (32, 31), (4, 8)])
def test_sides_that_the_patch_does_not_divide(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=rf"{height} x {width} pixels.*patches of 8"):
        build()(pixels(1, height, width))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"heads": 5}, "width 32 is not a multiple of heads 5"),
        ({"patch_size": 7}, "patch_size 7 does not divide image_size 32"),
        ({"patch_size": 0}, "patch_size 0"),
        ({"activation": "quickgelu"}, "did you mean 'quick_gelu'"),
    ],
)
def test_bad_settings_are_named(change: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ViT(replace(SMALL, **change))  # type: ignore[arg-type]
