"""What BLIP begins with: a CLIP, an ALBEF, or a BLIP with other heads or sharing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlm
from tests.weights.made import scrambled
from tests.weights.test_stages import IMAGE, TEXT, albef_folder, begun, clip_folder
from vlm.data.tokenizers import wordpiece
from vlm.data.transforms import ImageTransform
from vlm.errors import WeightsError
from vlm.models.albef_heads import ClassifierConfig, Nlvr2, med_two_image_text
from vlm.models.blip import SHARING, Blip, BlipConfig
from vlm.models.vqa import Vqa, VqaConfig, med_answer_decoder
from vlm.weights.files import save_model

CLS = 101
MED = replace(TEXT, vocab_size=30524, layers=3, cross_layers=(1, 2), cross_width=24)
BLIP = BlipConfig(IMAGE, MED, embed_dim=16, projection_bias=False, image_pool="mean", text_pool="mean")
PICTURES = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
TOKENS = wordpiece(max_length=24)(["a cat", "two dogs in a wood, late at night"])


def fresh(config: BlipConfig) -> Blip:
    torch.manual_seed(3)
    return Blip(config).eval()


def blip_folder(folder: Path, config: BlipConfig) -> Blip:
    network = scrambled(Blip(config))
    save_model(network, wordpiece(max_length=24), ImageTransform(24), folder, name="small", family="blip")  # type: ignore[arg-type]
    return network  # type: ignore[return-value]


def grown(value: Tensor) -> Tensor:
    """Words of the earlier stage, then [DEC] and [ENC] as copies of [CLS]."""
    return torch.cat([value, value[CLS : CLS + 1], value[CLS : CLS + 1]])


def moved(name: str) -> str:
    plain = name.replace(".self_attn.decoder.", ".self_attn.text.").replace(".route_norm.decoder.", ".self_norm.")
    return "text." + plain.removeprefix("decoder.") if plain.startswith("decoder.") else plain


@pytest.mark.parametrize("sharing", SHARING)
def test_from_clip_both_roles_begin_as_its_text_tower(tmp_path: Path, sharing: Any) -> None:
    source = clip_folder(tmp_path / "clip", 3).state_dict()
    network = fresh(replace(BLIP, sharing=sharing))
    before, after = begun(network, tmp_path / "clip")
    for name, value in after.items():
        wanted = source.get(moved(name), before[name])
        wanted = grown(wanted) if name.endswith("tokens.weight") else wanted
        assert torch.equal(value, wanted), name
    kept = {name.split(".")[0] for name, value in after.items() if torch.equal(value, before[name])}
    assert kept <= {"text", "decoder", "itm_head", "lm_head"}
    assert all(
        ".cross_" in n for n, v in after.items() if n.startswith(("text", "decoder")) and torch.equal(v, before[n])
    )
    with torch.no_grad():
        clip = vlm.load(tmp_path / "clip", device="cpu").network
        torch.testing.assert_close(network.encode_text(TOKENS), clip.encode_text(TOKENS))
        torch.testing.assert_close(network.encode_image(PICTURES), clip.encode_image(PICTURES))


@pytest.mark.parametrize("sharing", SHARING)
def test_from_albef_the_fusion_layers_give_their_eyes_to_the_upper_layers(tmp_path: Path, sharing: Any) -> None:
    """ALBEF has 3 text and 2 fusion layers: 3 and 4 look for MED's 1 and 2; its MLM head begins to say words."""
    source = albef_folder(tmp_path / "albef")
    network = fresh(replace(BLIP, sharing=sharing))
    _, after = begun(network, tmp_path / "albef")
    for name, value in after.items():
        theirs = moved(name).replace("lm_head.", "mlm_head.")
        if ".cross_" in theirs:
            theirs = theirs.replace("layers.1.", "layers.3.").replace("layers.2.", "layers.4.")
        wanted = source[theirs]
        assert torch.equal(value, grown(wanted) if len(wanted) == 30522 else wanted), name
    with torch.no_grad():
        albef = vlm.load(tmp_path / "albef", device="cpu").network
        torch.testing.assert_close(network.encode_text(TOKENS), albef.encode_text(TOKENS))


def test_an_albef_as_deep_gives_layer_by_layer(tmp_path: Path) -> None:
    source = albef_folder(tmp_path / "albef")
    network = fresh(replace(BLIP, text=replace(MED, layers=5, cross_layers=(0, 1, 2, 3, 4))))
    before, after = begun(network, tmp_path / "albef")
    for name, value in after.items():
        if name.startswith("text.layers."):
            assert torch.equal(value, source.get(moved(name), before[name])), name
    assert torch.equal(after["text.layers.0.cross_attn.q.weight"], before["text.layers.0.cross_attn.q.weight"])
    assert torch.equal(after["text.layers.3.cross_attn.q.weight"], source["text.layers.3.cross_attn.q.weight"])


@pytest.mark.parametrize("before", SHARING)
@pytest.mark.parametrize("after", SHARING)
def test_captioner_and_filter_start_from_the_same_blip(tmp_path: Path, before: Any, after: Any) -> None:
    """Each does what the whole did, whatever was shared."""
    whole = blip_folder(tmp_path / "blip", replace(BLIP, sharing=before))
    captioner, filter_ = (fresh(replace(BLIP, heads=heads, sharing=after)) for heads in (("lm",), ("itc", "itm")))
    for network in (captioner, filter_):
        begun(network, tmp_path / "blip")
    with torch.no_grad():
        torch.testing.assert_close(captioner.lm_logits(PICTURES, TOKENS), whole.lm_logits(PICTURES, TOKENS))
        torch.testing.assert_close(filter_.match(PICTURES, TOKENS), whole.match(PICTURES, TOKENS))
        torch.testing.assert_close(filter_.encode_text(TOKENS), whole.encode_text(TOKENS))
        torch.testing.assert_close(filter_.logit_scale, whole.logit_scale)


@pytest.mark.parametrize("sharing", ["none", "all_but_self_attention"])
def test_a_whole_goes_on_from_a_whole(tmp_path: Path, sharing: Any) -> None:
    whole = blip_folder(tmp_path / "blip", replace(BLIP, sharing=sharing)).state_dict()
    _, after = begun(fresh(replace(BLIP, sharing=sharing)), tmp_path / "blip")
    assert all(torch.equal(value, whole[name]) for name, value in after.items())


@pytest.mark.parametrize("sharing", SHARING)
def test_vqa_reads_as_the_encoder_and_answers_as_the_decoder(tmp_path: Path, sharing: Any) -> None:
    """Question states are wider than image states here, so their keys and values begin afresh."""
    whole = blip_folder(tmp_path / "blip", replace(BLIP, sharing=sharing))
    theirs = whole.state_dict()
    config = VqaConfig(IMAGE, MED, med_answer_decoder(MED), enc_id=30523, dec_id=30522)
    torch.manual_seed(3)
    network = Vqa(config).eval()
    before, after = begun(network, tmp_path / "blip")
    assert all(torch.equal(after[n], theirs[n]) for n in after if n.startswith(("image.", "text.")))
    assert all(torch.equal(after[n], theirs[n.replace("answer_", "lm_")]) for n in after if n.startswith("answer_"))
    captioner = fresh(replace(BLIP, heads=("lm",)))
    begun(captioner, tmp_path / "blip")
    for name, value in captioner.state_dict().items():
        if name.startswith("decoder."):
            assert torch.equal(after[name], before[name] if ".cross_attn.kv.w" in name else value), name


def test_nlvr2_looks_at_both_images_as_blip_did_at_one(tmp_path: Path) -> None:
    theirs = blip_folder(tmp_path / "blip", BLIP).state_dict()
    network = Nlvr2(ClassifierConfig(IMAGE, med_two_image_text(MED), "nlvr2", enc_id=30523))
    before, after = begun(network, tmp_path / "blip")
    for name, value in after.items():
        wanted = theirs.get(name.replace(".cross_other.", ".cross_attn."), before[name])
        assert torch.equal(value, wanted), name
    assert {n.split(".")[0] for n, v in after.items() if torch.equal(v, before[n])} == {"text", "nlvr2_head"}
    assert all("cross_merge" in n for n, v in after.items() if n.startswith("text") and torch.equal(v, before[n]))


@pytest.mark.parametrize("heads", [("itc", "itm", "lm"), ("lm",), ("itc", "itm")])
@pytest.mark.parametrize("sharing", SHARING)
def test_models_are_kept(tmp_path: Path, heads: Any, sharing: Any) -> None:
    config = replace(BLIP, heads=heads, sharing=sharing, prompt_ids=(1037, 3861, 1997))
    network: nn.Module = blip_folder(tmp_path / "blip", config)
    model = vlm.load(tmp_path / "blip", device="cpu")
    assert model.network.config == config and model.family == "blip"
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in model.network.state_dict().items())


def test_other_depths_are_refused_with_what_was_expected(tmp_path: Path) -> None:
    albef_folder(tmp_path / "albef")
    network = fresh(replace(BLIP, text=replace(MED, layers=4)))
    with pytest.raises(
        WeightsError, match=r"albef.*5 layers, 2 of which look at images, can't start one of 4; expected 4"
    ):
        begun(network, tmp_path / "albef")
    clip_folder(tmp_path / "clip", 2)
    with pytest.raises(WeightsError, match="2 layers, 0 of which look at images, can't start one of 4"):
        begun(network, tmp_path / "clip")


def test_other_widths_are_refused(tmp_path: Path) -> None:
    albef_folder(tmp_path / "albef")
    network = fresh(replace(BLIP, text=replace(MED, context_length=30)))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(WeightsError, match=r"positions\.weight \(24, 32\), expected \(30, 32\)"):
        begun(network, tmp_path / "albef")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
