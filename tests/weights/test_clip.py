"""Published CLIPs in our classes: features of transformers and open_clip, both ways, and what is refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import vlm
from tests.weights.made import (
    SMALL_HF,
    SMALL_OPEN_CLIP,
    TEXTS,
    hf_folder,
    open_clip_model,
    pixels,
    scrambled,
)
from vlm.data.tokenizers import clip_bpe, wordpiece
from vlm.data.transforms import ImageTransform
from vlm.errors import WeightsError
from vlm.models.clip import Clip
from vlm.weights.export import export_hf, export_open_clip
from vlm.weights.files import assign
from vlm.weights.from_hf import hf_clip_config
from vlm.weights.from_open_clip import infer_config, wrap
from vlm.weights.keymaps.clip import hf_clip_rules, open_clip_rules
from vlm.weights.loaded import VisionLanguageModel
from vlm.weights.rules import to_ours, to_theirs


def hf_features(model, images, texts):
    from transformers import CLIPTokenizer

    tokens = clip_bpe(max_length=20)(texts)
    with torch.no_grad():
        out = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask.long(), pixel_values=images)
    assert CLIPTokenizer is not None
    return out.image_embeds, out.text_embeds, out.logits_per_image


def close(ours, theirs):
    torch.testing.assert_close(ours.clone(), theirs, rtol=0, atol=1e-4)


def test_hugging_face_folder(tmp_path):
    model, folder = hf_folder(tmp_path / "clip")
    ours = vlm.load(folder, device="cpu")
    image, text, logits = hf_features(model, pixels(24), TEXTS)
    mine, words = ours.encode_image(pixels(24)), ours.encode_text(ours.tokens(TEXTS))
    close(mine, image)
    close(words, text)
    close(ours.similarity(mine, words), logits)
    assert image.std() > 0.05 and (image[0] - image[1]).abs().max() > 1e-2  # the pictures are told apart


def test_gelu_and_other_heads(tmp_path):
    text = SMALL_HF["text_config"] | {"hidden_act": "gelu", "num_attention_heads": 4}
    vision = SMALL_HF["vision_config"] | {"hidden_act": "gelu", "layer_norm_eps": 1e-3}
    model, folder = hf_folder(tmp_path / "clip", text_config=text, vision_config=vision)
    ours = vlm.load(folder, device="cpu")
    image, words, _ = hf_features(model, pixels(24), TEXTS)
    close(ours.encode_image(pixels(24)), image)
    close(ours.encode_text(ours.tokens(TEXTS)), words)


def test_open_clip_checkpoint_file(tmp_path, monkeypatch):
    import open_clip

    model = open_clip_model()
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, path)
    name = "tiny-test"
    (tmp_path / f"{name}.json").write_text(json.dumps(SMALL_OPEN_CLIP))
    open_clip.add_model_config(tmp_path / f"{name}.json")
    ours = vlm.load(f"open_clip:{name}/{path}", device="cpu")
    with torch.no_grad():
        image, text = model.encode_image(pixels(24)), model.encode_text(open_clip.tokenize(TEXTS, 20))
    close(ours.encode_image(pixels(24)), F.normalize(image, dim=-1))
    close(ours.encode_text(ours.tokens(TEXTS)), F.normalize(text, dim=-1))
    close(ours.logit_scale, model.logit_scale.exp().reshape(1))


@pytest.mark.parametrize("openai", [True, False])
def test_bare_checkpoint_tells_the_activation(tmp_path, openai):
    """OpenAI's files carry their input resolution and use quick-GELU."""
    import open_clip

    config = {**SMALL_OPEN_CLIP, "quick_gelu": openai}
    config["vision_cfg"] = {**config["vision_cfg"], "head_width": 64}
    config["text_cfg"] = {**config["text_cfg"], "width": 64, "heads": 1}
    model = open_clip_model(config)
    tensors = dict(model.state_dict())
    if openai:
        tensors |= {"input_resolution": torch.tensor(24), "context_length": torch.tensor(20)}
    path = tmp_path / "clip.safetensors"
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    ours = vlm.load(path, device="cpu")
    with torch.no_grad():
        image, text = model.encode_image(pixels(24)), model.encode_text(open_clip.tokenize(TEXTS, 20))
    close(ours.encode_image(pixels(24)), F.normalize(image, dim=-1))
    close(ours.encode_text(ours.tokens(TEXTS)), F.normalize(text, dim=-1))


def test_whole_vit_b_32_of_both_libraries():
    import open_clip
    from transformers import CLIPConfig, CLIPModel

    model = open_clip.create_model("ViT-B-32-quickgelu").eval()
    config = open_clip.get_model_config("ViT-B-32-quickgelu")
    ours = wrap(model, "ViT-B-32-quickgelu", name="b32", config=config)
    assert isinstance(ours.network, Clip)
    ours.network.eval()
    with torch.no_grad():
        image = F.normalize(model.encode_image(pixels(224, 1)), dim=-1)
        text = F.normalize(model.encode_text(open_clip.tokenize(TEXTS)), dim=-1)
    close(ours.encode_image(pixels(224, 1)), image)
    close(ours.encode_text(ours.tokens(TEXTS)), text)
    theirs = CLIPModel(CLIPConfig()).eval()
    settings = hf_clip_config(CLIPConfig().to_dict())
    tensors = to_theirs(ours.network.state_dict(), hf_clip_rules(settings))
    theirs.load_state_dict(tensors, strict=False)
    image, text, _ = hf_features(theirs, pixels(224, 1), TEXTS)
    close(ours.encode_image(pixels(224, 1)), image)
    close(ours.encode_text(ours.tokens(TEXTS)), text)


SIGLIP = {
    "embed_dim": 32,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False,
        "timm_pool": "map", "timm_proj": "none",
    },
    "text_cfg": {
        "context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2, "no_causal_mask": True,
        "proj_bias": True, "pool_type": "last",
    },
}  # fmt: skip


def test_other_architectures_run_on_open_clips_towers(tmp_path):
    import open_clip
    from PIL import Image

    SIGLIP["embed_dim"] = 192
    (tmp_path / "sigmoid-test.json").write_text(json.dumps(SIGLIP))
    open_clip.add_model_config(tmp_path / "sigmoid-test.json")
    model = scrambled(open_clip.create_model("sigmoid-test"))
    path = tmp_path / "weights.pt"
    torch.save(model.state_dict(), path)
    ours = vlm.load(f"open_clip:sigmoid-test/{path}", device="cpu")
    assert ours.family == "open_clip"
    image = model.encode_image(pixels(224), normalize=True)
    text = model.encode_text(open_clip.get_tokenizer("sigmoid-test")(TEXTS), normalize=True)
    close(ours.encode_image(pixels(224)), image)
    close(ours.encode_text(ours.tokens(TEXTS)), text)
    expected = model.logit_scale.exp() * image @ text.T + model.logit_bias
    close(ours.similarity(image, text), expected)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))
    best = vlm.ZeroShotClassifier(ours, ["cat", "dog"]).predict(picture, top_k=2)
    assert sum(prediction.score for prediction in best) == pytest.approx(1, abs=1e-5)
    with pytest.raises(WeightsError, match="no network of ours"):
        export_hf(ours, tmp_path / "out")


def our_clip(tmp_path) -> VisionLanguageModel:
    _, folder = hf_folder(tmp_path / "source")
    return vlm.load(folder, device="cpu")


def test_export_is_read_back_by_transformers(tmp_path):
    from transformers import CLIPModel, CLIPTokenizer

    ours = our_clip(tmp_path)
    folder = export_hf(ours, tmp_path / "out")
    model = CLIPModel.from_pretrained(folder).eval()
    image, text, _ = hf_features(model, pixels(24), TEXTS)
    close(ours.encode_image(pixels(24)), image)
    close(ours.encode_text(ours.tokens(TEXTS)), text)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    for words in TEXTS:
        assert tokenizer(words)["input_ids"] == ours.tokens(words).input_ids[0].tolist()
    again = vlm.load(folder, device="cpu")
    close(again.encode_image(pixels(24)), image)


def test_export_is_read_back_by_open_clip(tmp_path):
    import open_clip

    ours = our_clip(tmp_path)
    folder = export_open_clip(ours, tmp_path / "out")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    with torch.no_grad():
        image = model.encode_image(pixels(24), normalize=True)
        text = model.encode_text(open_clip.tokenize(TEXTS, 20), normalize=True)
    close(ours.encode_image(pixels(24)), image)
    close(ours.encode_text(ours.tokens(TEXTS)), text)
    from PIL import Image

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8))
    torch.testing.assert_close(preprocess(picture), ours.transform(picture), atol=0.02, rtol=0)


def test_every_tensor_is_used_once_each_way():
    config = hf_clip_config(SMALL_HF)
    own = set(Clip(config).state_dict())
    for rules in (hf_clip_rules(config), open_clip_rules(config)):
        ours = [name for rule in rules for name in rule.ours]
        theirs = [name for rule in rules for name in rule.theirs]
        assert sorted(ours) == sorted(own) and len(set(theirs)) == len(theirs)
    model = open_clip_model()
    names = {
        name
        for rule in open_clip_rules(infer_config(model.state_dict(), quick=True, where="x"))
        for name in rule.theirs
    }
    assert names == set(model.state_dict())


def test_the_lineages_own_text_tower_is_refused_with_reasons(tmp_path):
    from tests.train.small import network

    own = VisionLanguageModel(network(), wordpiece(), ImageTransform(16), name="tiny", family="clip")
    with pytest.raises(WeightsError, match=r"bidirectional.*post-norm.*own format"):
        export_hf(own, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_tensors_are_listed_in_one_error(tmp_path):
    _, folder = hf_folder(tmp_path / "clip")
    tensors = load_file(folder / "model.safetensors")
    del tensors["visual_projection.weight"]
    tensors["stranger.weight"] = torch.zeros(1)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"1 missing: visual_projection\.weight\n.*1 unexpected: stranger\.weight"):
        vlm.load(folder)


def test_wrong_shapes_are_listed():
    config = hf_clip_config(SMALL_HF)
    tensors = dict(Clip(config).state_dict())
    tensors["text_projection.weight"] = torch.zeros(3, 3)
    before = Clip(config)
    kept = {name: value.clone() for name, value in before.state_dict().items()}
    with pytest.raises(WeightsError, match=r"wrong shape: text_projection\.weight \(3, 3\), expected \(24, 32\)"):
        assign(before, tensors, where="x")
    assert all(torch.equal(value, kept[name]) for name, value in before.state_dict().items())


def test_shapes_that_cannot_be_cut_are_listed(tmp_path):
    _, folder = hf_folder(tmp_path / "clip")
    tensors = load_file(folder / "model.safetensors")
    tensors["vision_model.embeddings.position_embedding.weight"] = torch.zeros(7, 48)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"1 of the wrong shape: vision_model\.embeddings\.position_embedding"):
        vlm.load(folder)
    tensors = dict(open_clip_model().state_dict())
    name = "transformer.resblocks.0.attn.in_proj_weight"
    config = infer_config(tensors, quick=True, where="x")
    tensors[name] = torch.zeros(100, 32)
    with pytest.raises(WeightsError, match=r"in_proj_weight \(100, 32\)"):
        to_ours(tensors, open_clip_rules(config), where="x")


def test_open_clip_export_refuses_another_norm_eps(tmp_path):
    config = hf_clip_config(SMALL_HF)
    other = dataclasses.replace(config, text=dataclasses.replace(config.text, norm_eps=1e-12))
    model = VisionLanguageModel(Clip(other), clip_bpe(max_length=20), ImageTransform(24), name="x", family="clip")
    with pytest.raises(WeightsError, match=r"norm_eps is always 1e-05.*1e-12 in the text tower.*--to hf"):
        export_open_clip(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_architecture_with_openais_file_uses_quick_gelu(tmp_path):
    import open_clip

    (tmp_path / "tiny-plain.json").write_text(json.dumps(SMALL_OPEN_CLIP | {"quick_gelu": False}))
    open_clip.add_model_config(tmp_path / "tiny-plain.json")
    tensors = {f"module.{name}": value for name, value in open_clip_model().state_dict().items()}
    torch.save(tensors | {"input_resolution": torch.tensor(24)}, tmp_path / "a.pt")
    loaded = vlm.load(f"open_clip:tiny-plain/{tmp_path / 'a.pt'}", device="cpu")
    assert loaded.network.config.image.activation == loaded.network.config.text.activation == "quick_gelu"


def test_wrong_family(tmp_path):
    from transformers import BertConfig, BertModel

    BertModel(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"model_type is 'bert', expected one of clip, "):
        vlm.load(tmp_path)


def test_sharded_weights(tmp_path):
    model, folder = hf_folder(tmp_path / "clip")
    shutil.rmtree(folder)
    model.save_pretrained(folder, max_shard_size="1MB")
    assert (folder / "model.safetensors.index.json").is_file()
    image, _, _ = hf_features(model, pixels(24), TEXTS)
    close(vlm.load(folder, device="cpu").encode_image(pixels(24)), image)


def test_round_trip_of_rules():
    model = open_clip_model()
    tensors = model.state_dict()
    config = infer_config(tensors, quick=True, where="x")
    rules = open_clip_rules(config)
    back = to_theirs(to_ours(tensors, rules, where="x"), rules)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert dataclasses.is_dataclass(config)
