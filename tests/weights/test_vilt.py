"""Published ViLTs in our class: outputs of transformers for every head, both ways, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import vlm
from tests.weights.made_vilt import HEADS, SIZES, SMALL, TEXTS, folder_of, make, pictures, words
from vlm.data.transforms import ImageTransform
from vlm.models.vilt import Vilt, ViltConfig
from vlm.objectives.downstream import classes, soft_answers
from vlm.weights.export import export_hf, export_open_clip
from vlm.weights.keymaps.vilt import HF_LEFT_OUT, hf_vilt_rules
from vlm.weights.loaded import VisionLanguageModel
from vlm.weights.vilt import hf_vilt_config

LISTED = list(HEADS)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.clone(), theirs, rtol=0, atol=1e-4)


def outputs(model: Any, name: str, pixels: Tensor, mask: Tensor | None) -> Tensor:
    """What transformers gives: logits, or a bare model's pooled state."""
    given: dict[str, Tensor] = words() | {"pixel_values": pixels}
    if mask is not None:
        given["pixel_mask"] = mask.long()
    if name == "ViltForImagesAndTextClassification":
        given["pixel_values"] = torch.stack([pixels, pixels.flip(3) * 0.5], dim=1)
        if mask is not None:
            given["pixel_mask"] = torch.stack([mask, mask], dim=1).long()
    with torch.no_grad():
        out = model(**given)
    return out.pooler_output if name == "ViltModel" else out.logits


@torch.no_grad()
def same_here(model: VisionLanguageModel, name: str, pixels: Tensor, mask: Tensor | None) -> Tensor:
    """What our verbs give for it."""
    network: Vilt = model.network  # type: ignore[assignment]
    tokens = model.tokens(TEXTS)
    if name == "ViltModel":
        return network.pool(network.fuse(pixels, tokens, mask))
    if name == "ViltForImagesAndTextClassification":
        masks = None if mask is None else torch.stack([mask, mask], dim=1)
        return network.nlvr2_logits(torch.stack([pixels, pixels.flip(3) * 0.5], dim=1), tokens, masks)
    verb = {"mlm": network.mlm_logits, "vqa": network.vqa_logits, "rank": network.rank_scores}[HEADS[name][0]]
    return verb(pixels, tokens, mask)


def check(model: Any, ours: VisionLanguageModel, name: str) -> None:
    """All outputs agree: the model's own size, another one, and several in one batch; and tell rows apart."""
    plain = pictures([(24, 24)] * 3)[0]
    cases = [(plain, None), (pictures([(32, 40)] * 3)[0], None), pictures(), pictures([(8, 16), (24, 24), (40, 8)])]
    for pixels, mask in cases:
        expected = outputs(model, name, pixels, mask)
        found = same_here(ours, name, pixels, mask)
        if name == "ViltForMaskedLM":
            real = ours.tokens(TEXTS).attention_mask
            expected, found = expected[real], found[real]
        close(found.reshape(expected.shape), expected)
        assert expected.std() > 0.01
    assert (outputs(model, name, plain, None)[0] - outputs(model, name, plain.flip(3), None)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", LISTED)
def test_every_class_of_transformers(tmp_path: Path, name: str) -> None:
    model = folder_of(name, tmp_path / "vilt")
    ours = vlm.load(tmp_path / "vilt", device="cpu")
    assert ours.family == "vilt" and ours.network.config.heads == HEADS[name]  # type: ignore[union-attr]
    check(model, ours, name)


@pytest.mark.parametrize("changes", [{"hidden_act": "gelu_new", "layer_norm_eps": 1e-3}, {"type_vocab_size": 1}])
def test_other_settings(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = folder_of("ViltForMaskedLM", tmp_path / "vilt", **changes)
    check(model, vlm.load(tmp_path / "vilt", device="cpu"), "ViltForMaskedLM")


@torch.no_grad()
def test_states_of_words_and_patches(tmp_path: Path) -> None:
    """transformers shuffles the patches where a mask is given, so these are compared as sets."""
    model = folder_of("ViltModel", tmp_path / "vilt")
    network: Vilt = vlm.load(tmp_path / "vilt", device="cpu").network  # type: ignore[assignment]
    given, (pixels, mask) = words(), pictures()
    expected = model(**given, pixel_values=pixels, pixel_mask=mask.long()).last_hidden_state
    fused = network.fuse(pixels, given, mask)
    real, length = given["attention_mask"].bool(), given["input_ids"].shape[1]
    close(fused.words[real], expected[:, :length][real])
    close(fused.patches[:, 0], expected[:, length])
    for row, (high, wide) in enumerate(SIZES):
        own = fused.patches[row][fused.patch_mask[row]][1:]
        assert len(own) == high * wide // 64
        far = torch.cdist(own, expected[row, length + 1 :]).amin(dim=1)
        assert far.max() < 1e-4


@pytest.mark.parametrize("name", LISTED)
def test_export_is_read_back_by_transformers(tmp_path: Path, name: str) -> None:
    import transformers

    folder_of(name, tmp_path / "source")
    ours = vlm.load(tmp_path / "source", device="cpu")
    folder = export_hf(ours, tmp_path / "out")
    model = getattr(transformers, name).from_pretrained(folder).eval()
    check(model, ours, name)
    assert json.loads((folder / "config.json").read_text())["architectures"] == [name]
    source, written = load_file(tmp_path / "source" / "model.safetensors"), load_file(folder / "model.safetensors")
    prefix = "vilt." if name == "ViltModel" else ""
    assert {prefix + key: value.shape for key, value in source.items()} == {k: v.shape for k, v in written.items()}
    assert all(torch.equal(written[prefix + key], value) for key, value in source.items())
    check(model, vlm.load(folder, device="cpu"), name)


def test_exported_tokenizer_and_pictures_are_transformers(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image
    from transformers import BertTokenizer
    from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil

    folder_of("ViltForQuestionAnswering", tmp_path / "source", patch_size=32, image_size=96)
    ours = vlm.load(tmp_path / "source", device="cpu")
    assert ours.network.config.answers == ("yes", "no", "two", "red")  # type: ignore[union-attr]
    folder = export_hf(ours, tmp_path / "out")
    tokenizer = BertTokenizer.from_pretrained(folder)
    assert tokenizer(TEXTS[2])["input_ids"] == ours.tokens(TEXTS[2]).input_ids[0].tolist()
    raw = np.random.default_rng(0).integers(0, 255, (2, 120, 200, 3), dtype=np.uint8)
    shown = [Image.fromarray(raw[0]), Image.fromarray(raw[1]).resize((90, 130))]
    theirs = ViltImageProcessorPil.from_pretrained(folder)(shown, return_tensors="pt")
    pixels, mask = ours.padded(shown)
    assert mask is not None and torch.equal(mask.long(), theirs["pixel_mask"])
    assert (pixels - theirs["pixel_values"]).abs().max() < 0.01
    with pytest.raises(vlm.errors.DataError, match="different sizes: use padded"):
        ours.pixels(shown)
    assert vlm.load(folder, device="cpu").transform == ours.transform


def test_processor_files_of_newer_transformers(tmp_path: Path) -> None:
    from transformers import BertTokenizer, ViltImageProcessor, ViltProcessor

    from vlm.data.tokenizers import ASSETS

    folder_of("ViltForMaskedLM", tmp_path)
    pictures_of = ViltImageProcessor(size={"shortest_edge": 96}, size_divisor=16, image_mean=[0.1, 0.2, 0.3])
    ViltProcessor(pictures_of, BertTokenizer(vocab=str(ASSETS))).save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.txt").exists() and not (tmp_path / "preprocessor_config.json").exists()
    found = vlm.load(tmp_path, device="cpu")
    assert found.transform == ImageTransform(96, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5), "fit", multiple=16)
    assert found.tokenizer.max_length == 16
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"do_lower_case": False}))
    with pytest.raises(vlm.errors.WeightsError, match=r"tokenizer_config\.json: do_lower_case is false"):
        vlm.load(tmp_path)


def test_matching_and_masked_words_of_our_own_go_both_ways(tmp_path: Path) -> None:
    """transformers has no class for the matching head: it reads the rest, we read all."""
    from transformers import ViltForMaskedLM

    from tests.models.small_vilt import build

    config = hf_vilt_config(SMALL, ("itm", "mlm"))
    ours = vlm.load(folder_of("ViltModel", tmp_path / "x") and tmp_path / "x", device="cpu")
    own = VisionLanguageModel(build(config), ours.tokenizer, ours.transform, name="own", family="vilt")
    folder = export_hf(own, tmp_path / "out")
    check(ViltForMaskedLM.from_pretrained(folder).eval(), own, "ViltForMaskedLM")
    again, (pixels, mask) = vlm.load(folder, device="cpu"), pictures()
    assert again.network.config == config  # type: ignore[union-attr]
    assert torch.equal(again.match(pixels, again.tokens(TEXTS), mask), own.match(pixels, own.tokens(TEXTS), mask))


def test_losses_equal_transformers() -> None:
    """VQA's over rows, NLVR2's, and MLM's over labels are what transformers computes from the same logits."""
    given, (pixels, mask) = words() | {"pixel_values": pictures()[0]}, pictures()
    given["pixel_mask"] = mask.long()
    scores = torch.tensor([[1.0, 0, 0.3, 0], [0, 0, 0, 0], [0.6, 0.6, 0, 1.0]])
    out = make("ViltForQuestionAnswering")(**given, labels=scores)
    torch.testing.assert_close(soft_answers(out.logits, scores) / 3, out.loss)
    pair = {"pixel_values": torch.stack([pixels, pixels], 1), "pixel_mask": torch.stack([mask, mask], 1).long()}
    labels = torch.tensor([0, 1, 1])
    out = make("ViltForImagesAndTextClassification")(**(given | pair), labels=labels)
    torch.testing.assert_close(classes(out.logits, labels) / 3, out.loss)


def test_every_tensor_is_used_once_each_way() -> None:
    import re

    for name, heads in HEADS.items():
        theirs = set(make(name).state_dict())
        settings = SMALL | ({"num_images": 2} if heads == ("nlvr2",) else {})
        answers = {"id2label": {0: "yes", 1: "no", 2: "two", 3: "red"}} if heads == ("vqa",) else {}
        config = hf_vilt_config(settings | answers, heads)
        rules = hf_vilt_rules(config, prefix="" if name == "ViltModel" else "vilt.")
        ours, wanted = [n for r in rules for n in r.ours], [n for r in rules for n in r.theirs]
        assert sorted(ours) == sorted(Vilt(config).state_dict()) and len(set(wanted)) == len(wanted)
        rest = theirs - set(wanted)
        assert set(wanted) <= theirs and all(any(re.fullmatch(p, n) for p in HF_LEFT_OUT) for n in rest)


def test_shapes_of_the_base_configuration() -> None:
    """Of all classes, as published: 384 pixels, patches of 32, 768 wide, 12 layers; nothing is allocated."""
    import transformers

    for name, heads in HEADS.items():
        more = {"num_images": 2, "modality_type_vocab_size": 3} if heads == ("nlvr2",) else {}
        theirs_config = transformers.ViltConfig(**more)
        with torch.device("meta"):
            theirs = getattr(transformers, name)(theirs_config)
            config = hf_vilt_config(theirs_config.to_dict(), heads)
            ours = Vilt(config)
        assert config.image == ViltConfig().image.__class__(384, 32, 768, 12, 12, 3072, norm_eps=1e-12)
        shapes, own = theirs.state_dict(), ours.state_dict()
        for rule in hf_vilt_rules(config, prefix="" if name == "ViltModel" else "vilt."):
            assert sum(own[n].numel() for n in rule.ours) == sum(shapes[n].numel() for n in rule.theirs)
            if len(rule.ours) == len(rule.theirs) == 1:
                assert own[rule.ours[0]].shape == shapes[rule.theirs[0]].shape
        tied = sum(p.numel() for p in theirs.parameters())
        assert sum(p.numel() for p in ours.parameters()) == tied


def changed(folder: Path, **tensors: Tensor | None) -> None:
    """Replace (or, with None, remove) tensors of a folder."""
    found = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        found.pop(name, None)
        if value is not None:
            found[name] = value
    save_file(found, folder / "model.safetensors")


def test_wrong_tensors_are_listed_in_one_error(tmp_path: Path) -> None:
    folder_of("ViltForMaskedLM", tmp_path)
    names = {"vilt.pooler.dense.bias": None, "vilt.layernorm.weight": None, "stranger": torch.zeros(1)}
    changed(tmp_path, **names)
    message = r"2 missing: vilt\.layernorm\.weight, vilt\.pooler\.dense\.bias\n  1 unexpected: stranger"
    with pytest.raises(vlm.errors.WeightsError, match=message):
        vlm.load(tmp_path)


def test_wrong_shapes_are_listed(tmp_path: Path) -> None:
    folder_of("ViltForMaskedLM", tmp_path)
    changed(tmp_path, **{"vilt.pooler.dense.bias": torch.zeros(3), "vilt.layernorm.bias": torch.zeros(4)})
    with pytest.raises(
        vlm.errors.WeightsError, match=r"2 of the wrong shape: .*image\.trunk\.norm\.bias \(4,\).*pooler"
    ):
        vlm.load(tmp_path)


@pytest.mark.parametrize("name", LISTED[1:])
def test_a_missing_head_is_named(tmp_path: Path, name: str) -> None:
    folder_of(name, tmp_path)
    (head,) = HEADS[name]
    found = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in found.items() if k.startswith("vilt.")}, tmp_path / "model.safetensors")
    with pytest.raises(vlm.errors.WeightsError, match=f"{name} needs the {head} head"):
        vlm.load(tmp_path)


def test_verbs_without_their_head_name_it(tmp_path: Path) -> None:
    folder_of("ViltForMaskedLM", tmp_path)
    model = vlm.load(tmp_path, device="cpu")
    pixels, mask = pictures()
    with pytest.raises(vlm.errors.MissingVerbError, match=r"no itm head \(it has: mlm\)"):
        model.match(pixels, model.tokens(TEXTS), mask)


def test_older_names_of_the_decoders_bias(tmp_path: Path) -> None:
    model = folder_of("ViltForMaskedLM", tmp_path)
    bias = model.mlm_score.decoder.bias.detach().clone()
    more = {
        "mlm_score.decoder.weight": model.mlm_score.decoder.weight.detach().clone(),
        "vilt.embeddings.text_embeddings.position_ids": torch.arange(16)[None],
    }
    changed(tmp_path, **more, **{"mlm_score.bias": bias, "mlm_score.decoder.bias": None})
    check(model, vlm.load(tmp_path, device="cpu"), "ViltForMaskedLM")
    changed(tmp_path, **{"mlm_score.decoder.bias": bias})
    check(model, vlm.load(tmp_path, device="cpu"), "ViltForMaskedLM")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("ViltForMaskedLM", {"hidden_act": "relu"}, "hidden_act 'relu': expected one of"),
        ("ViltForMaskedLM", {"qkv_bias": False}, "qkv_bias false"),
        ("ViltForImagesAndTextClassification", {"num_images": 3}, "num_images 3: expected 2"),
        ("ViltForMaskedLM", {"image_size": [24, 32]}, "image_size .*: expected a square"),
        ("ViltForMaskedLM", {"architectures": ["ViltForTokenClassification"]}, "ViltForTokenClassification isn't"),
        ("ViltForMaskedLM", {"vocab_size": 30}, r"words\.tokens\.weight \(30522, 32\), expected \(30, 32\)"),
        ("ViltForMaskedLM", {"patch_size": 7}, "patch_size 7 does not divide image_size 24"),
        ("ViltForMaskedLM", {"hidden_size": "many"}, "not a ViLT's configuration"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, name: str, changes: dict[str, Any], message: str) -> None:
    folder_of(name, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(vlm.errors.WeightsError, match=message):
        vlm.load(tmp_path)


def test_what_transformers_cannot_hold(tmp_path: Path) -> None:
    from dataclasses import replace

    folder_of("ViltForMaskedLM", tmp_path / "source")
    ours = vlm.load(tmp_path / "source", device="cpu")
    config = ours.network.config  # type: ignore[union-attr]
    network = Vilt(replace(config, image=replace(config.image, pre_norm=True)))
    odd = VisionLanguageModel(network, ours.tokenizer, ImageTransform(24, resize="pad"), name="odd", family="vilt")
    with pytest.raises(vlm.errors.WeightsError, match=r"norm before the first layer; .*'pad', not fit or squash"):
        export_hf(odd, tmp_path / "out")
    with pytest.raises(vlm.errors.WeightsError, match="open_clip's CLIP: it is a vilt model"):
        export_open_clip(ours, tmp_path / "out")
    assert not (tmp_path / "out").exists()
