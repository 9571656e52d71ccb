"""A stage of other sizes than the one before it: positions are interpolated, another common space begins afresh."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import nn

from tests.weights.test_stages import ALBEF, IMAGE, clip_folder, started
from vlm.errors import WeightsError
from vlm.train.config import load_config, named_config
from vlm.train.run import run_kind
from vlm.weights.families import FAMILIES
from vlm.weights.refit import POSITIONS
from vlm.weights.start import start_parts

CLS = 101
SPACE = {"image_projection", "log_scale", "text_projection"}
ALIKE, GROWN = "", "14 x 14 patches are interpolated to 16 x 16"


def recipe(stage: str, size: str) -> nn.Module:
    """The network of a packaged configuration, without its numbers."""
    with torch.device("meta"):
        return FAMILIES[stage].network(load_config(run_kind(stage), named_config(stage, size)).model)


@pytest.mark.parametrize(
    ("before", "after", "parts", "change"),
    [
        (("clip", "tiny"), ("vilt", "tiny"), {"image", "words"}, ALIKE),
        (("clip", "tiny"), ("albef", "tiny"), {"image", "text", *SPACE}, ALIKE),
        (("albef", "tiny"), ("blip", "tiny"), {"image", "text", "lm_head", "itm_head", *SPACE}, ALIKE),
        (("clip", "tiny"), ("blip2", "tiny"), {"image", "qformer"}, ALIKE),
        (("blip2", "tiny"), ("blip2-llm", "tiny"), {"image", "qformer"}, ALIKE),
        (("blip2", "base"), ("blip2-llm", "base"), {"image", "qformer"}, ALIKE),
        (("clip", "base"), ("vilt", "base"), {"image", "words"}, "7 x 7 patches are interpolated to 12 x 12"),
        (("clip", "base-16"), ("albef", "base"), {"image", "text"}, GROWN),
        (
            ("albef", "base"),
            ("blip", "base"),
            {"image", "text", "lm_head", "itm_head", *SPACE},
            "16 x 16 patches are interpolated to 14 x 14",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)
def test_each_recipe_starts_from_the_stage_before(
    caplog: pytest.LogCaptureFixture,
    before: tuple[str, str],
    after: tuple[str, str],
    parts: set[str],
    change: str,
) -> None:
    caplog.set_level(logging.INFO, logger="vlm.weights")
    start_parts(recipe(*after), recipe(*before).state_dict(), where="before", start_id=CLS)
    *changes, last = (record.getMessage() for record in caplog.records)
    assert set(last.removesuffix(" start from before").split(", ")) == parts
    assert ("interpolated" in caplog.text) == bool(change) and change in caplog.text
    assert any("begin afresh" in line for line in changes) == (before == ("clip", "base-16"))


def test_other_patches_are_refused() -> None:
    with pytest.raises(WeightsError, match=r"patch_embed\.proj\.weight \(768, 3, 32, 32\), expected \(768, 3, 16"):
        start_parts(recipe("albef", "base"), recipe("clip", "base").state_dict(), where="before")


@torch.no_grad()
def test_positions_become_those_of_timm(tmp_path: Path) -> None:
    """The network then sees larger pictures as the CLIP does, which interpolates each time."""
    clip = clip_folder(tmp_path / "clip", 3)
    theirs = clip.image.trunk.pos_embed  # (1, 10, 24)
    same, _, after = started(ALBEF, tmp_path / "clip")
    assert torch.equal(after[POSITIONS], theirs)
    larger, _, after = started(replace(ALBEF, image=replace(IMAGE, image_size=40)), tmp_path / "clip")
    assert torch.equal(after[POSITIONS], resample_abs_pos_embed(theirs, [5, 5]))
    grid = theirs[:, 1:].unflatten(1, (3, 3)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (5, 5), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(after[POSITIONS], torch.cat([theirs[:, :1], grid], dim=1))
    others = [name for name in same.state_dict() if name in clip.state_dict() and name != POSITIONS]
    assert all(torch.equal(after[name], same.state_dict()[name]) for name in others)
    pixels = torch.randn(2, 3, 40, 40)
    torch.testing.assert_close(larger.encode_image(pixels), clip.encode_image(pixels))


@pytest.mark.parametrize("change", [{"embed_dim": 8}, {"projection_bias": True}])
def test_another_common_space_begins_afresh(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict[str, int]
) -> None:
    caplog.set_level(logging.INFO, logger="vlm.weights")
    source = clip_folder(tmp_path / "clip", 3).state_dict()
    _, before, after = started(replace(ALBEF, **change), tmp_path / "clip")  # type: ignore[arg-type]
    fresh = [name for name in after if name.split(".")[0] in SPACE]
    assert len(fresh) >= 3 and all(torch.equal(after[name], before[name]) for name in fresh)
    assert all(torch.equal(value, source[name]) for name, value in after.items() if name.startswith("image."))
    assert "clip: another common space (image_projection {'weight': (16, 24)}, here {" in caplog.text
