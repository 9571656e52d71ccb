"""BLIP as transformers stores it: the same numbers both ways, class by class, and refusals."""

import json

import pytest
import torch
from typer.testing import CliRunner

import vlm
from tests.weights.blip_reference import DEC, ENC, POSITIONS, SIZES, answer_logits, reference
from tests.weights.made import scrambled
from vlm.apps.cli import app
from vlm.data.tokenizers import wordpiece
from vlm.errors import MissingVerbError, WeightsError
from vlm.models.blip import Blip, BlipConfig
from vlm.weights.export import export_hf
from vlm.weights.hf_blip import hf_blip_config
from vlm.weights.keymaps.blip import hf_blip_rules, tied
from vlm.weights.official import load_official
from vlm.weights.rules import to_ours

TEXTS = ["a cat", "two dogs in a wood, late at night", "a red house"]
CAPTION, MATCH = "BlipForConditionalGeneration", "BlipForImageTextRetrieval"
VQA = "BlipForQuestionAnswering"


def settings(**text):
    width, image = SIZES["text"], SIZES["image"]
    return {
        "image_text_hidden_size": 40,
        "text_config": {
            "hidden_size": width, "num_attention_heads": 4, "intermediate_size": 2 * width, "num_hidden_layers": 3,
            "vocab_size": 30524, "max_position_embeddings": POSITIONS, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
        } | text,
        "vision_config": {
            "hidden_size": image, "num_attention_heads": 3, "intermediate_size": 2 * image, "num_hidden_layers": 2,
            "image_size": SIZES["image_size"], "patch_size": 8, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-3,
        },
    }  # fmt: skip


def made(name, seed=0, **text):
    """A random one of transformers' classes; its head's bias and last matrix stay tied."""
    import transformers

    model = scrambled(getattr(transformers, name)(transformers.BlipConfig(**settings(**text))), seed)
    with torch.no_grad():
        for key, gain in model.named_parameters():
            if key.endswith(("LayerNorm.weight", "layernorm.weight", "norm1.weight", "norm2.weight")):
                gain.add_(1.0 if "LayerNorm" in key else 0.0)
    model.tie_weights()
    return model


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    model, folder = made(CAPTION), tmp_path_factory.mktemp("caption")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def matcher(tmp_path_factory):
    model, folder = made(MATCH), tmp_path_factory.mktemp("match")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def answerer(tmp_path_factory):
    """Image and text are equally wide: transformers' decoder looks at a question of the image's width."""
    model, folder = made(VQA, hidden_size=SIZES["image"], num_attention_heads=3), tmp_path_factory.mktemp("vqa")
    model.save_pretrained(folder)
    return model, folder


def inputs():
    side = SIZES["image_size"]
    pixels = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    return pixels, wordpiece(max_length=POSITIONS)(TEXTS)


def begun(tokens, start):
    return torch.cat([torch.full_like(tokens.input_ids[:, :1], start), tokens.input_ids[:, 1:]], dim=1)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert (wanted[0] - wanted[-1]).abs().max() > 1e-2  # rows are told apart


@torch.no_grad()
def check_captions(model, theirs):
    pixels, tokens = inputs()
    mask = tokens.attention_mask.bool()
    given = {"input_ids": begun(tokens, DEC), "attention_mask": tokens.attention_mask}
    close(model.network.lm_logits(pixels, tokens)[mask], theirs(pixel_values=pixels, **given).logits[mask])


@torch.no_grad()
def check_matches(model, theirs):
    pixels, tokens = inputs()
    mask = tokens.attention_mask
    # Their class puts no [ENC], which the paper and the official code do: here it is given.
    wanted = theirs(input_ids=begun(tokens, ENC), pixel_values=pixels, attention_mask=mask).itm_score
    close(model.network.match(pixels, tokens), wanted)
    wanted = theirs(input_ids=tokens.input_ids, pixel_values=pixels, attention_mask=mask, use_itm_head=False).itm_score
    close(model.encode_image(pixels) @ model.encode_text(tokens).T, wanted)


@torch.no_grad()
def check_answers(model, theirs):
    pixels, tokens = inputs()
    answers = wordpiece(max_length=POSITIONS)(["two", "a dog", "red and white"])
    image = theirs.vision_model(pixel_values=pixels).last_hidden_state
    logits = answer_logits(theirs.text_encoder, theirs.text_decoder, image, tokens, answers)
    found = model.network.answer_logits(*model.network.question_states(pixels, tokens), answers)
    real = answers.attention_mask.bool()
    close(found[real], logits[real])


def test_question_answering_gives_the_same_numbers(answerer):
    theirs, folder = answerer
    model = vlm.load(folder, device="cpu")
    check_answers(model, theirs)
    config = model.network.config
    assert (model.family, config.enc_id, config.dec_id) == ("vqa", ENC, DEC)
    with pytest.raises(MissingVerbError, match="vqa model and has no match"):
        model.match(*inputs())


@torch.no_grad()
def test_answers_are_written_alike(answerer):
    """Token by token as transformers generates greedily; questions of one length, since it also looks at padding."""
    theirs, folder = answerer
    model = vlm.load(folder, device="cpu")
    pixels, _ = inputs()
    tokens = model.tokens(["how many cats", "what colour is", "who is that"])
    assert bool(tokens.attention_mask.all())
    wanted = theirs.generate(input_ids=begun(tokens, ENC), pixel_values=pixels, max_new_tokens=6, num_beams=1)
    question, mask = model.network.question_states(pixels, tokens)
    ids = torch.full((3, 1), DEC)
    for place in range(1, wanted.shape[1]):
        best = model.network.answer_step(ids, question=question, mask=mask).argmax(dim=1)
        going = (ids != model.tokenizer.end_id).all(dim=1)
        assert torch.equal(best[going], wanted[going, place])
        ids = torch.cat([ids, best[:, None]], dim=1)


def test_a_captioner_gives_the_same_numbers(captioner):
    theirs, folder = captioner
    model = vlm.load(folder, device="cpu")
    check_captions(model, theirs)
    config = model.network.config
    assert (model.family, config.heads, config.dec_id, config.enc_id) == ("blip", ("lm",), DEC, ENC)
    assert config.prompt_ids == () and config.text.heads == 4 and config.image.norm_eps == 1e-3
    with pytest.raises(MissingVerbError, match=r"no itm head \(it has: lm\)"):
        model.network.match(*inputs())


def test_a_matcher_gives_the_same_numbers(matcher):
    theirs, folder = matcher
    model = vlm.load(folder, device="cpu")
    check_matches(model, theirs)
    torch.testing.assert_close(model.logit_scale, torch.tensor([1 / 0.07]))
    with pytest.raises(MissingVerbError, match=r"no lm head \(it has: itc, itm\)"):
        model.network.lm_logits(*inputs())


def test_pictures_are_preprocessed_alike(captioner, tmp_path):
    import numpy as np
    from PIL import Image
    from transformers import BlipImageProcessor

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))
    theirs = BlipImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5, 0.4, 0.3])
    model, _ = captioner
    model.save_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path)
    loaded = vlm.load(tmp_path, device="cpu")
    assert loaded.transform.mean == (0.5, 0.4, 0.3)
    wanted = theirs(picture, return_tensors="pt")["pixel_values"]
    # Pillow and torchvision round bicubic differently by a few of 255 levels.
    assert (loaded.pixels(picture) - wanted).abs().mean() < 0.02


@pytest.mark.parametrize("name", [CAPTION, MATCH, VQA])
def test_export_gives_the_folder_back(name, request, tmp_path):
    import transformers

    theirs, folder = request.getfixturevalue({CAPTION: "captioner", MATCH: "matcher", VQA: "answerer"}[name])
    model = vlm.load(folder, device="cpu")
    export_hf(model, tmp_path / "out")
    again, report = getattr(transformers, name).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [name]
    before, after = theirs.state_dict(), again.state_dict()
    assert set(before) == set(after) and all(torch.equal(before[key], after[key]) for key in before)
    check = {CAPTION: check_captions, MATCH: check_matches, VQA: check_answers}[name]
    check(vlm.load(tmp_path / "out", device="cpu"), again.eval())
    processor = transformers.BlipProcessor.from_pretrained(tmp_path / "out")
    assert torch.equal(processor(text=TEXTS, padding=True, return_tensors="pt").input_ids, inputs()[1].input_ids)


@pytest.mark.parametrize("sharing", ["none", "all_but_self_attention", "all"])
def test_a_network_with_all_heads_is_read_by_each_class(sharing, tmp_path):
    """The official pre-training checkpoint by the command, in a folder that both classes read."""
    import transformers

    torch.save({"model": reference(2, sharing).checkpoint()}, tmp_path / "model.pth")
    model = load_official(tmp_path / "model.pth")
    command = ["export", "--model", str(tmp_path / "model.pth"), "--to", "hf", "--out", str(tmp_path / "out")]
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 0, run.output
    for name, check in ((CAPTION, check_captions), (MATCH, check_matches)):
        theirs, report = getattr(transformers, name).from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not report["missing_keys"] and not report["mismatched_keys"]
        check(model, theirs.eval())
    again = vlm.load(tmp_path / "out", device="cpu")
    assert again.network.config.sharing == sharing
    torch.testing.assert_close(again.logit_scale, torch.tensor([20.0]))  # noted for us in config.json
    assert all(
        torch.equal(value, again.network.state_dict()[key])
        for key, value in model.network.state_dict().items()
        if key != "log_scale"
    )


def test_official_by_the_command(captioner, tmp_path):
    _, folder = captioner
    out = str(tmp_path / "again.pth")
    run = CliRunner().invoke(app, ["export", "--model", str(folder), "--to", "official", "--out", out])
    assert isinstance(run.exception, WeightsError)
    assert "its activation isn't exact GELU; its norm_eps aren't 1e-12 and 1e-6" in str(run.exception)
    assert "its heads aren't 64 wide" in str(run.exception) and not (tmp_path / "again.pth").exists()


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("text_decoder.cls.predictions.bias", f"{CAPTION} needs the lm head, but no tensor text_decoder.cls"),
        ("text_decoder.cls.predictions.transform.dense.weight", "1 missing: text_decoder.cls.predictions.transform"),
        ("vision_model.post_layernorm.bias", "1 missing: vision_model.post_layernorm.bias"),
    ],
)
def test_a_captioner_without_a_tensor_is_refused(captioner, tmp_path, gone, message):
    theirs, _ = captioner
    theirs.save_pretrained(tmp_path, state_dict={k: v for k, v in theirs.state_dict().items() if k != gone})
    with pytest.raises(WeightsError, match=message):
        vlm.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": [MATCH]}, f"{MATCH} needs the itc head, but no tensor vision_proj.weight is there"),
        ({"architectures": [VQA]}, r"missing: text_encoder\.embeddings"),
        ({"architectures": ["BlipModel"]}, "BlipModel isn't known; expected one of BlipForImageTextRetrieval"),
        ({"vision_config": {"image_size": [32, 16]}}, "image_size .* expected a square"),
        ({"prompt_ids": ["a"]}, r"config\.json: prompt_ids \['a'\] can't be read"),
        ({"text_config": {"hidden_act": "relu"}}, "hidden_act 'relu': expected one of"),
    ],
)
def test_settings_that_don_t_fit_are_named(captioner, tmp_path, change, message):
    theirs, _ = captioner
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    found = json.loads(path.read_text())
    for key, value in change.items():
        found[key] = found[key] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(found))
    with pytest.raises(WeightsError, match=message):
        vlm.load(tmp_path)


@pytest.mark.parametrize(("name", "heads"), [(CAPTION, ("lm",)), (MATCH, ("itc", "itm"))])
def test_base_sizes_fit(name, heads):
    """transformers' defaults are the base configuration at 384 pixels, but for heads 96 wide in the text."""
    import transformers

    with torch.device("meta"):
        theirs = getattr(transformers, name)(transformers.BlipConfig(text_config={"num_attention_heads": 12}))
    tensors = theirs.state_dict()
    config = hf_blip_config(theirs.config.to_dict(), tensors, where="base")
    assert config.text == BlipConfig().text and config.image.layers == 12 and config.image.image_size == 384
    known = {key: value for key, value in tensors.items() if key not in tied(config)}
    whole = to_ours(known, hf_blip_rules(config), where="base")
    with torch.device("meta"):
        own = {key: value.shape for key, value in Blip(config).state_dict().items() if key != "log_scale"}
    assert config.heads == heads and {key: value.shape for key, value in whole.items()} == own


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", [CAPTION, MATCH])
def test_base_size_gives_the_same_numbers(name, tmp_path):
    import transformers

    torch.manual_seed(0)
    config = transformers.BlipConfig(text_config={"num_attention_heads": 12})
    theirs = scrambled_a_little(getattr(transformers, name)(config))
    theirs.save_pretrained(tmp_path)
    model = vlm.load(tmp_path, device="cpu")
    assert model.network.config.image.image_size == 384
    pixels = torch.randn(2, 3, 384, 384, generator=torch.Generator().manual_seed(1))
    tokens = model.tokens(TEXTS[:2])
    start = DEC if name == CAPTION else ENC
    given = {"input_ids": begun(tokens, start), "attention_mask": tokens.attention_mask, "pixel_values": pixels}
    if name == CAPTION:
        mask = tokens.attention_mask.bool()
        close(model.network.lm_logits(pixels, tokens)[mask], theirs(**given).logits[mask])
    else:
        close(model.network.match(pixels, tokens), theirs(**given).itm_score)


def scrambled_a_little(model):
    """Full-size weights of the size that training leaves: transformers starts the image encoder at 1e-10."""
    with torch.no_grad():
        for key, value in model.named_parameters():
            value.copy_(torch.randn_like(value) * 0.02 + (1.0 if "norm" in key.lower() and "weight" in key else 0.0))
    model.tie_weights()
    return model.eval()
