"""What ALBEF begins with when it starts from a CLIP."""

from dataclasses import replace

import pytest
import torch

import vlm
from tests.weights.made import scrambled
from vlm.data.tokenizers import wordpiece
from vlm.data.transforms import ImageTransform
from vlm.errors import WeightsError
from vlm.models.albef import Albef, AlbefConfig
from vlm.models.albef_heads import ClassifierConfig, Nlvr2, two_image_text
from vlm.models.clip import Clip, ClipConfig
from vlm.models.transformer import TransformerConfig
from vlm.models.vit import ViTConfig
from vlm.models.vqa import Vqa, VqaConfig, answer_decoder
from vlm.weights.families import FAMILIES, family_name
from vlm.weights.files import save_model
from vlm.weights.keymaps.stages import text_layers
from vlm.weights.start import start_from

IMAGE = ViTConfig(24, 8, 24, 2, 3, 72)
TEXT = TransformerConfig(vocab_size=30522, context_length=24, width=32, heads=4, mlp_width=48, token_types=2)
FUSED = replace(TEXT, layers=5, cross_layers=(3, 4), cross_width=24)
ALBEF = AlbefConfig(
    IMAGE, FUSED, embed_dim=16, projection_bias=False, image_pool="mean", text_pool="mean", logit_scale_init=30.0
)


def clip_folder(folder, layers):
    network = scrambled(Clip(ClipConfig(IMAGE, replace(TEXT, layers=layers), 16, "mean", "mean")))
    with torch.no_grad():
        network.log_scale.fill_(1.25)
    save_model(network, wordpiece(max_length=24), ImageTransform(24), folder, name="small")
    return network


def started(config, folder):
    """A network before and after it was started."""
    torch.manual_seed(3)
    network = Albef(config).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    start_from(network, str(folder))
    return network, before, network.state_dict()


@pytest.mark.parametrize(("layers", "expected"), [(3, [0, 1, 2, 1, 2]), (5, [0, 1, 2, 3, 4])])
def test_albef_started_from_clip(tmp_path, layers, expected):
    theirs = clip_folder(tmp_path / "clip", layers)
    _, before, after = started(ALBEF, tmp_path / "clip")
    source = theirs.state_dict()
    for name, value in after.items():
        if name.startswith("text.layers."):
            number, end = name.removeprefix("text.layers.").split(".", 1)
            wanted = before[name] if "cross" in end else source[f"text.layers.{expected[int(number)]}.{end}"]
        else:
            wanted = source.get(name, before[name])
        assert torch.equal(value, wanted), name
    kept = {name for name, value in after.items() if name not in source and torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in kept} == {"text", "itm_head", "mlm_head"}


def test_the_start_keeps_the_features_of_clip(tmp_path):
    theirs = clip_folder(tmp_path / "clip", 3)
    network, _, _ = started(ALBEF, tmp_path / "clip")
    pixels, tokens = torch.randn(2, 3, 24, 24), wordpiece(max_length=24)(["a cat", "two dogs in a wood, late at night"])
    with torch.no_grad():
        torch.testing.assert_close(network.encode_image(pixels), theirs.encode_image(pixels))
        torch.testing.assert_close(network.encode_text(tokens), theirs.encode_text(tokens))
        torch.testing.assert_close(network.logit_scale, theirs.logit_scale)


def test_albef_goes_on_from_albef(tmp_path):
    network = scrambled(Albef(ALBEF))
    save_model(network, wordpiece(max_length=24), ImageTransform(24), tmp_path / "model", name="small", family="albef")
    _, _, after = started(ALBEF, tmp_path / "model")
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in after.items())


def albef_folder(folder, config=ALBEF):
    network = scrambled(Albef(config))
    save_model(network, wordpiece(max_length=24), ImageTransform(24), folder, name="small", family="albef")
    return network.state_dict()


def begun(network, folder):
    """Tensors before and after a start."""
    before = {name: value.clone() for name, value in network.state_dict().items()}
    start_from(network, str(folder))
    return before, network.state_dict()


def test_two_images_start_from_each_fusion_layer_twice(tmp_path):
    source = albef_folder(tmp_path / "model")
    network = Nlvr2(ClassifierConfig(IMAGE, two_image_text(FUSED), "assignment"))
    before, after = begun(network, tmp_path / "model")
    origin = [0, 1, 2, 3, 3, 4, 4]
    for name, value in after.items():
        if name.startswith("text.layers."):
            number, end = name.removeprefix("text.layers.").split(".", 1)
            assert torch.equal(value, source[f"text.layers.{origin[int(number)]}.{end}"]), name
        else:
            assert torch.equal(value, source.get(name, before[name])), name
    assert all(torch.equal(after[name], before[name]) for name in after if "assignment_head" in name)
    save_model(
        network, wordpiece(max_length=24), ImageTransform(24), tmp_path / "ta", name="ta", family="albef-classifier"
    )
    fine = Nlvr2(ClassifierConfig(IMAGE, two_image_text(FUSED), "nlvr2"))
    before, final = begun(fine, tmp_path / "ta")
    assert all(torch.equal(value, after.get(name, before[name])) for name, value in final.items())


@pytest.mark.parametrize("width", [24, 32])
def test_the_answer_decoder_starts_from_the_fusion_layers(tmp_path, width):
    """Cross-attention comes along only where question and image states are as wide as each other."""
    fused = replace(FUSED, width=width, cross_width=24)
    source = albef_folder(tmp_path / "model", replace(ALBEF, text=fused))
    before, after = begun(Vqa(VqaConfig(IMAGE, fused, answer_decoder(fused))), tmp_path / "model")
    for name, value in after.items():
        theirs = name.replace("answer_head.", "mlm_head.")
        if name.startswith("decoder.layers."):
            number, end = name.removeprefix("decoder.layers.").split(".", 1)
            theirs = f"text.layers.{int(number) + 3}.{end}"
        elif name.startswith("decoder."):
            theirs = name.replace("decoder.", "text.")
        fresh = "cross_attn.kv.weight" in name and name.startswith("decoder.") and width != 24
        assert torch.equal(value, before[name] if fresh else source[theirs]), name


@pytest.mark.parametrize(
    "config",
    [
        ClassifierConfig(IMAGE, FUSED),
        ClassifierConfig(IMAGE, two_image_text(FUSED), "nlvr2"),
        VqaConfig(IMAGE, FUSED, answer_decoder(FUSED)),
    ],
    ids=["entailment", "nlvr2", "vqa"],
)
def test_fine_tuned_models_are_kept(tmp_path, config):
    name = family_name(config)
    network = scrambled(FAMILIES[name].network(config))
    save_model(network, wordpiece(max_length=24), ImageTransform(24), tmp_path / "fine", name="fine", family=name)
    model = vlm.load(tmp_path / "fine", device="cpu")
    assert model.network.config == config and type(model.network) is type(network)
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in model.network.state_dict().items())


def test_layers_of_base():
    text = AlbefConfig().text
    assert text_layers(12, text) == {i: i for i in range(12)}
    assert text_layers(6, text) == {i: i % 6 for i in range(12)}


@pytest.mark.parametrize(("layers", "cross"), [(4, (3, 4)), (2, (2, 3, 4))])
def test_other_depths_are_refused_with_both_numbers(tmp_path, layers, cross):
    clip_folder(tmp_path / "clip", layers)
    config = replace(ALBEF, text=replace(FUSED, cross_layers=cross))
    with pytest.raises(WeightsError, match=rf"clip: a text tower of {layers} layers can't start one of 5; expected 5"):
        started(config, tmp_path / "clip")


def test_a_part_of_another_shape_is_named(tmp_path):
    clip_folder(tmp_path / "clip", 3)
    with pytest.raises(WeightsError, match=r"text\.positions\.weight \(24, 32\), expected \(30, 32\)"):
        started(replace(ALBEF, text=replace(FUSED, context_length=30)), tmp_path / "clip")
