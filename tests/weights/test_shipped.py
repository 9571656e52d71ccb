"""Shipped models, and folders that keep only what differs from one of them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import vlm
from tests.weights.made import scrambled
from tests.weights.test_files import CONFIG, TEXT
from vlm.data.tokenizers import wordpiece
from vlm.data.transforms import ImageTransform
from vlm.errors import WeightsError
from vlm.models.clip import Clip
from vlm.weights.base import Base, with_shared, without_shared
from vlm.weights.files import save_model
from vlm.weights.loaded import VisionLanguageModel
from vlm.weights.shipped import base_of, model_tensors
from vlm.weights.start import start_from


def test_a_folder_that_leaves_out_what_its_base_holds(tmp_path, monkeypatch):
    """Frozen parts and the first rows of a longer vocabulary are stored once, with the base."""
    monkeypatch.setattr("vlm.weights.shipped._assets", lambda: tmp_path)
    transform, words = ImageTransform(24), wordpiece()
    base = scrambled(Clip(CONFIG))
    save_model(base, words, transform, tmp_path / "first", name="first", dtype=torch.float16)
    longer = replace(CONFIG, text=replace(TEXT, vocab_size=30524))
    network = Clip(longer)
    state = vlm.load("first").network.state_dict()
    state["text.tokens.weight"] = torch.cat([state["text.tokens.weight"], torch.ones(2, 32)])
    state["image_projection.weight"] = state["image_projection.weight"] + 1
    network.load_state_dict(state)
    model = VisionLanguageModel(network, words, transform, name="second", family="clip")
    model.save(tmp_path / "second", dtype=torch.float16, base="first")
    stored = load_file(tmp_path / "second" / "model.safetensors")
    assert {name: tuple(value.shape) for name, value in stored.items()} == {
        "text.tokens.weight@rows": (2, 32),
        "image_projection.weight": (16, 48),
    }
    found = vlm.load(tmp_path / "second").network.state_dict()
    assert all(torch.equal(found[name], value.half().float()) for name, value in state.items())
    assert set(found) == set(state)
    started = Clip(longer)
    start_from(started, str(tmp_path / "second"))
    assert torch.equal(started.image_projection.weight, found["image_projection.weight"])
    with pytest.raises(WeightsError, match=r"base: no shipped model 'frist' \(did you mean 'first'"):
        model.save(tmp_path / "third", base="frist")
    model.network = Clip(replace(longer, text=replace(longer.text, layers=1)))
    with pytest.raises(WeightsError, match=r"base first: this model has no text\.layers\.1\."):
        model.save(tmp_path / "third", base="first")
    with pytest.raises(WeightsError, match="base: second is kept as a part of another model itself"):
        model.save(tmp_path / "third", base="second")
    save_model(scrambled(Clip(CONFIG)), words, transform, tmp_path / "first", name="first", dtype=torch.bfloat16)
    with pytest.raises(WeightsError, match=r"second: was kept as a part of first with the SHA-256 .*shipped here has"):
        vlm.load(tmp_path / "second")
    (tmp_path / "first" / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"second.config\.json: no shipped model 'first'"):
        vlm.load(tmp_path / "second")


def test_a_part_alone_can_be_left_out(tmp_path, monkeypatch):
    """Such as a frozen image encoder, in a model without the base's text tower."""
    monkeypatch.setattr("vlm.weights.shipped._assets", lambda: tmp_path)
    transform, words = ImageTransform(24), wordpiece()
    save_model(scrambled(Clip(CONFIG)), words, transform, tmp_path / "first", name="first")
    base = base_of("first", where="base")
    image = {name: value for name, value in base.tensors.items() if name.startswith("image.")}
    model = SimpleNamespace(config=CONFIG, state_dict=lambda: image | {"queries": torch.ones(2)})
    save_model(model, words, transform, tmp_path / "second", name="second", base=base)
    assert set(load_file(tmp_path / "second" / "model.safetensors")) == {"queries"}
    found = model_tensors(tmp_path / "second")
    assert found.keys() == model.state_dict().keys() and all(torch.equal(found[n], image[n]) for n in image)
    alone = SimpleNamespace(config=CONFIG, state_dict=lambda: {"queries": torch.ones(2)})
    with pytest.raises(WeightsError, match="base first: this model has no part of it, such as image"):
        save_model(alone, words, transform, tmp_path / "third", name="third", base=base)


def test_what_is_left_out_comes_back():
    """Only equal tensors of one type are shared; a shorter one, or one of another type, is stored whole."""
    generator = torch.Generator().manual_seed(0)
    old = {name: torch.randn(4, 3, generator=generator) for name in ("same", "longer", "shorter", "half", "other")}
    base = Base("base", old | {"scalar": torch.tensor(1.0)}, "")
    new = {
        "same": old["same"].clone(), "longer": torch.cat([old["longer"], torch.ones(2, 3)]),
        "shorter": old["shorter"][:3].clone(), "half": old["half"].half(), "other": old["other"] + 1,
        "scalar": torch.tensor(1.0), "new": torch.ones(1),
    }  # fmt: skip
    stored = without_shared(new, base)
    assert set(stored) == {"longer@rows", "shorter", "half", "other", "scalar", "new"}
    found = with_shared(stored, base, where="here")
    assert set(found) == set(new)
    assert all(found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in new.items())
    for wrong in (torch.ones(2, 5), torch.ones(2, 3).half()):
        with pytest.raises(WeightsError, match="here: same@rows continues a tensor that base doesn't hold"):
            with_shared({"same@rows": wrong}, base, where="here")
    with pytest.raises(WeightsError, match="here: no@rows continues"):
        with_shared({"no@rows": torch.ones(2, 3)}, base, where="here")


def test_words_under_another_name_are_left_out_too():
    """A decoder's words may be those of the base's text tower; too small a thing isn't looked for."""
    generator = torch.Generator().manual_seed(0)
    words, image = (torch.randn(4, 3, generator=generator) for _ in range(2))
    whole = Base("base", {"text.tokens.weight": words, "image.weight": image, "text.bias": torch.ones(4)}, "")
    new = {
        "image.weight": image.clone(), "decoder.tokens.weight": torch.cat([words, torch.ones(2, 3)]),
        "decoder.same": words.clone(), "decoder.bias": torch.ones(4), "decoder.other": words + 1,
    }  # fmt: skip
    stored = without_shared(new, whole.only({"image"}), whole=whole)
    shapes = {name: tuple(value.shape) for name, value in stored.items()}
    assert shapes == {
        "decoder.tokens.weight@rows of text.tokens.weight": (2, 3), "decoder.same@rows of text.tokens.weight": (0, 3),
        "decoder.bias": (4,), "decoder.other": (4, 3),
    }  # fmt: skip
    found = with_shared(stored, whole.only({"image"}), where="here", whole=whole)
    assert set(found) == set(new) and all(torch.equal(found[name], value) for name, value in new.items())
    with pytest.raises(WeightsError, match="here: x@rows of gone continues a tensor that base doesn't hold"):
        with_shared({"x@rows of gone": torch.ones(2, 3)}, whole, where="here", whole=whole)


def test_shipped_albef_stands_on_the_shipped_clip():
    """Its base is the tiny-clip of this checkout; a tower that was trained on is its own."""
    clip, albef = (vlm.load(name, device="cpu").network.state_dict() for name in ("tiny-clip", "tiny-albef"))
    assert torch.equal(clip["text.tokens.weight"], albef["text.tokens.weight"])
    assert not torch.equal(clip["image_projection.weight"], albef["image_projection.weight"])
    assert all(value.isfinite().all() for value in albef.values())
