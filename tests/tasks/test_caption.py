"""The captioner: what `transformers` writes with the same weights, in any batch; what it says and refuses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import vlm
from tests.generated import captioner, pictures, reference
from tests.models.small_blip import build
from tests.tasks.small import colour_model, noise
from vlm.errors import ConfigError, DataError, MissingVerbError
from vlm.generate import GenerationConfig
from vlm.models.blip import BlipConfig
from vlm.models.packed import PackedLinear
from vlm.tasks.caption import Captioner, Summary, caption_draws, content_keys
from vlm.weights.loaded import VisionLanguageModel

BEAM = GenerationConfig(max_new_tokens=10, beams=3, sequences=2)
# Of 30,000 nearly even words some are drawn at a rounding error's distance; among the first 20 none is.
NUCLEUS = GenerationConfig("nucleus", max_new_tokens=10, sequences=2, top_k=20)
DEC, SEP = 30522, 102


@cache
def theirs() -> Any:
    return reference(vocabulary=30524, start=DEC, end=SEP, end_bias=8.0)


@cache
def ours() -> VisionLanguageModel:
    return captioner(theirs())


@torch.inference_mode()
def written(pixels: Tensor, prompt: Iterable[int] = (), **settings: Any) -> list[str]:
    """The texts of `transformers`, without special tokens."""
    prompt = [DEC, *prompt]
    out = theirs().generate(pixels, torch.tensor([[*prompt, SEP]] * len(pixels)), **settings)
    cut = [row[len(prompt) :] for row in out.tolist()]
    return [ours().tokenizer.decode([i for i in row if i < DEC]) for row in cut]


def photos(count: int) -> list[Image.Image]:
    return noise(count)


@pytest.mark.parametrize("batch", [1, 3, 7])
@pytest.mark.parametrize("beams", [1, 3, 5])
def test_captions_are_those_of_transformers(beams: int, batch: int) -> None:
    settings: dict[str, Any] = {"min_new_tokens": 3, "repetition_penalty": 1.1, "max_new_tokens": 10}
    expected = written(pictures(batch), num_beams=beams, no_repeat_ngram_size=2, do_sample=False, **settings)
    found = Captioner(ours(), GenerationConfig(beams=beams, no_repeat_ngram=2, **settings)).caption_pixels(
        pictures(batch)
    )
    assert [texts[0].text for texts in found] == expected
    assert batch == 1 or len(set(expected)) > 1


def test_a_prompt_begins_each_text() -> None:
    prompt = ours().tokenizer(["A red"]).input_ids[0, 1:-1].tolist()
    expected = written(pictures(3), prompt, num_beams=3, max_new_tokens=10)
    found = Captioner(ours(), BEAM, prompt=" A red ").caption_pixels(pictures(3))
    assert [texts[0].text for texts in found] == [f"A red {text}".strip() for text in expected]
    plain = Captioner(ours(), BEAM).caption_pixels(pictures(3))
    assert [texts[0].text for texts in plain] != expected


def test_the_prompt_of_its_training_is_left_out() -> None:
    trained = captioner(theirs())
    network: Any = trained.network
    network.config = replace(network.config, prompt_ids=(1037, 3861, 1997))
    found = Captioner(trained, BEAM).caption_pixels(pictures(3))
    assert [texts[0].text for texts in found] == written(
        pictures(3), (1037, 3861, 1997), num_beams=3, max_new_tokens=10
    )


@pytest.mark.parametrize("config", [BEAM, NUCLEUS], ids=lambda config: config.strategy)
def test_no_caption_depends_on_batch_or_order(config: GenerationConfig) -> None:
    images = photos(7)
    whole = [found for _, found in Captioner(ours(), config, batch_size=7).caption_each(images)]
    assert len({text.text for texts in whole for text in texts}) > 7
    for size in (1, 3):
        found = [found for _, found in Captioner(ours(), config, batch_size=size).caption_each(images[::-1])]
        assert [[one.text for one in texts] for texts in found[::-1]] == [
            [one.text for one in texts] for texts in whole
        ]


def test_pictures_are_encoded_and_projected_once_for_all_beams(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = captioner(theirs()), dict[str, list[int]]()
    network: Any = model.network
    for verb in ("image_states", "decoder_keys_values"):
        call, rows = getattr(network, verb), asked.setdefault(verb, [])
        monkeypatch.setattr(network, verb, lambda x, call=call, rows=rows: (rows.append(len(x)), call(x))[1])
    Captioner(model, replace(BEAM, beams=5), prompt="a red").caption_pixels(pictures(3))
    assert asked == {"image_states": [3], "decoder_keys_values": [3]}


def test_seeds_and_keys_fix_what_is_drawn() -> None:
    found = [Captioner(ours(), NUCLEUS, seed=seed).caption_pixels(pictures(3)) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert found[0][0][0].text != found[0][0][1].text
    named = Captioner(ours(), NUCLEUS)
    assert named.caption_pixels(pictures(3), ["a", "b", "c"])[1] == named.caption_pixels(pictures(3)[1:2], ["b"])[0]
    assert named.caption_pixels(pictures(3), ["a", "b", "c"]) != named.caption_pixels(pictures(3), ["a", "c", "b"])


def test_draws_belong_to_picture_and_text() -> None:
    found = caption_draws(["a", "b"], seed=0, sequences=3, count=5)
    assert found.shape == (2, 3, 5) and len(found.unique()) == 30
    assert torch.equal(found[1:, :2, :4], caption_draws(["b"], seed=0, sequences=2, count=4))
    assert len(set(content_keys(pictures(4)))) == 4
    assert content_keys(pictures(4))[2:] == content_keys(pictures(4)[2:])


def test_one_picture_or_several(tmp_path: Path) -> None:
    images = photos(2)
    images[0].save(tmp_path / "one.png")
    captions = Captioner(ours(), BEAM)
    one = captions.caption(tmp_path / "one.png")
    assert isinstance(one, str) and one == captions.caption(np.asarray(images[0]))
    assert captions.caption(images) == [one, captions.caption(images[1])]
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"bad\.png"):
        captions.caption(tmp_path / "bad.png")
    failed: list[str] = []
    mixed = [tmp_path / "bad.png", images[1]]
    found = list(captions.caption_each(mixed, on_error=lambda path, _: failed.append(path.name)))
    assert failed == ["bad.png"] and len(found) == 1
    with pytest.raises(DataError, match="expected a picture or several, got int"):
        captions.caption(3)


def test_scores_come_with_beams_alone() -> None:
    first, second = Captioner(ours(), BEAM).caption_pixels(pictures(1))[0]
    assert first.score is not None and second.score is not None and first.score >= second.score
    assert Captioner(ours(), NUCLEUS).caption_pixels(pictures(1))[0][0].score is None


def test_a_model_that_it_loads_itself_is_packed(tmp_path: Path) -> None:
    model = captioner(theirs())
    expected = Captioner(model, BEAM).caption(photos(3))
    assert not any(isinstance(module, PackedLinear) for module in model.network.modules())
    model.save(tmp_path / "model")
    own = vlm.Captioner(tmp_path / "model", BEAM)
    assert any(isinstance(module, PackedLinear) for module in own.model.network.modules())
    assert own.caption(photos(3)) == expected


def test_refusals() -> None:
    with pytest.raises(MissingVerbError, match=r"colours is a clip model and has no generate; BLIP"):
        Captioner(colour_model())
    small: BlipConfig = build().config
    retrieval = VisionLanguageModel(
        build(replace(small, heads=("itc", "itm"))), ours().tokenizer, ours().transform, name="r", family="blip"
    )
    with pytest.raises(MissingVerbError, match=r"no lm head \(it has: itc, itm\)"):
        Captioner(retrieval)
    with pytest.raises(ConfigError, match="batch_size must be at least 1"):
        Captioner(ours(), batch_size=0)
    with pytest.raises(ConfigError, match="4 tokens and 37 new ones are more than its texts can have, 40"):
        Captioner(ours(), GenerationConfig(max_new_tokens=37), prompt="a red cat").caption_pixels(pictures(1))
    with pytest.raises(ConfigError, match=r"41 tokens and 8 new ones are more than .* 40; .* shorten the prompt"):
        Captioner(ours(), GenerationConfig(max_new_tokens=8), prompt="red " * 40).caption_pixels(pictures(1))
    short = replace(ours().tokenizer, max_length=4)  # what is learnt may be shorter than what can be said
    cut = VisionLanguageModel(ours().network, short, ours().transform, name="cut", family="blip")
    whole = [Captioner(model, BEAM, prompt="a red cat on a").caption_pixels(pictures(1)) for model in (ours(), cut)]
    assert whole[0] == whole[1]


def test_summary_by_hand() -> None:
    summary = Summary()
    assert (summary.length, summary.repetition) == (0.0, 0.0)
    for text in ("a cat and a Cat and a dog", "a cat", "", "red"):
        summary.add(text)
    # "a cat" and "cat and" and "and a" come twice in the first text; the second one's "a cat" is its own first.
    assert summary.texts == 4 and summary.length == 11 / 4
    assert summary.repetition == pytest.approx(3 / 8)
