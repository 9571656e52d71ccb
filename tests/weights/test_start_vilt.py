"""ViLT started from the stage before it, and fine-tuned heads from a pre-trained ViLT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.models.small_vilt import IMAGE, SMALL, build, pictures
from tests.weights.made import scrambled
from vlm.data.tokenizers import wordpiece
from vlm.data.transforms import ImageTransform
from vlm.errors import WeightsError
from vlm.models.clip import Clip, ClipConfig
from vlm.models.transformer import TransformerConfig
from vlm.models.vilt import Vilt
from vlm.weights.files import save_model
from vlm.weights.start import start_from


def clip_folder(folder: Path, **image: bool | int) -> Clip:
    text = TransformerConfig(vocab_size=30522, context_length=12, width=16, layers=1, heads=2, mlp_width=16)
    network = scrambled(Clip(ClipConfig(replace(IMAGE, **image), text, embed_dim=16)))
    save_model(network, wordpiece(max_length=12), ImageTransform(24), folder, name="clip")  # type: ignore[arg-type]
    return network  # type: ignore[return-value]


@pytest.mark.parametrize("pre_norm", [False, True])
def test_the_image_encoder_of_a_clip(tmp_path: Path, pre_norm: bool) -> None:
    clip = clip_folder(tmp_path / "clip", pre_norm=pre_norm)
    network = build(replace(SMALL, image=replace(IMAGE, pre_norm=pre_norm)))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    start_from(network, str(tmp_path / "clip"))
    for name, value in network.state_dict().items():
        own = clip.state_dict()[name] if name.startswith("image.") else before[name]
        assert torch.equal(value, own), name
    pixels = pictures(2)
    with torch.no_grad():
        alone = network.image.run(*network.image.embed(pixels))
        torch.testing.assert_close(alone, clip.image(pixels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (
            {"pre_norm": True},
            r"1 missing: image\.trunk\.patch_embed\.proj\.bias\n.*2 unexpected: image\.trunk\.norm_pre",
        ),
        (
            {"patch_size": 4},
            r"1 of the wrong shape: image\.trunk\.patch_embed\.proj\.weight \(32, 3, 4, 4\), expected \(32, 3, 8, 8\)",
        ),
        ({"layers": 3}, r"12 unexpected: image\.trunk\.blocks\.2"),
    ],
)
def test_a_clip_of_another_shape_is_refused(tmp_path: Path, image: dict[str, int], message: str) -> None:
    clip_folder(tmp_path / "clip", **image)
    network = build()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(WeightsError, match=message):
        start_from(network, str(tmp_path / "clip"))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_text_encoder_cannot_start_it() -> None:
    with pytest.raises(WeightsError, match="can't start a Vilt, which has no text tower"):
        start_from(build(), "minilm")


def test_a_file_that_is_no_official_checkpoint_is_refused(tmp_path: Path) -> None:
    clip_folder(tmp_path / "clip")
    with pytest.raises(WeightsError, match="not an official ALBEF, BLIP or BLIP-2 checkpoint"):
        start_from(build(), str(tmp_path / "clip" / "model.safetensors"))


def test_fine_tuned_heads_start_from_pre_training(tmp_path: Path) -> None:
    config = replace(SMALL, vocab_size=30522)
    first = build(config)
    save_model(first, wordpiece(max_length=12), ImageTransform(24), tmp_path / "m", name="m", family="vilt")
    network = Vilt(replace(config, heads=("vqa", "nlvr2"), answers=("yes", "no")))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    start_from(network, str(tmp_path / "m"))
    new = ("vqa.", "nlvr2.", "second_image")
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name] if name.startswith(new) else first.state_dict()[name]), name


def test_words_begin_as_near_each_other_as_in_the_clip(tmp_path: Path) -> None:
    """As principal components, which keep as much of the distances as any projection; in the size of fresh words."""
    text = TransformerConfig(vocab_size=30522, context_length=12, width=48, layers=1, heads=2, mlp_width=16)
    clip = scrambled(Clip(ClipConfig(IMAGE, text, embed_dim=16)))
    with torch.no_grad():  # words of 20 dimensions, all of which fit
        clip.text.tokens.weight.copy_(torch.randn(30522, 20) @ torch.randn(20, 48) + 3)
    save_model(clip, wordpiece(max_length=12), ImageTransform(24), tmp_path / "clip", name="clip")
    config = replace(SMALL, vocab_size=30522)
    network = build(config)
    fresh = {name: value.clone() for name, value in network.words.state_dict().items()}
    start_from(network, str(tmp_path / "clip"))
    found, own = network.words.tokens.weight.detach(), clip.text.tokens.weight.detach()
    assert found.shape == fresh["tokens.weight"].shape
    torch.testing.assert_close(found.std(), fresh["tokens.weight"].std(), rtol=1e-3, atol=0)
    near, far = (torch.cdist(w[:50].double(), w[:50].double()) for w in (found, own))
    torch.testing.assert_close(near / near.max(), far / far.max(), rtol=1e-3, atol=1e-4)
    assert all(torch.equal(network.words.state_dict()[n], v) for n, v in fresh.items() if n != "tokens.weight")
    again = build(config)
    start_from(again, str(tmp_path / "clip"))
    assert torch.equal(again.words.tokens.weight, network.words.tokens.weight)
