"""BLIP-2's stage 1 as transformers stores it: the same numbers both ways, and refusals."""

import json
from dataclasses import replace

import pytest
import torch

import vlm
from tests.weights.blip2_reference import DEC, POSITIONS, SIZES, gains, matcher, settings
from tests.weights.made import scrambled
from vlm.data.tokenizers import wordpiece
from vlm.data.transforms import ImageTransform
from vlm.errors import MissingVerbError, WeightsError
from vlm.models.blip2 import Blip2, Blip2Config
from vlm.weights.export import export_hf
from vlm.weights.hf_blip2 import hf_config, qformer_config, read_config
from vlm.weights.hf_parts import image_config
from vlm.weights.hf_qformer import export_hf_qformer
from vlm.weights.keymaps.blip2 import hf_heads, hf_rules
from vlm.weights.loaded import VisionLanguageModel
from vlm.weights.rules import to_theirs

TEXTS = ["a cat", "two dogs in a wood, late at night", "a red house"]
MATCHER = "Blip2ForImageTextRetrieval"


@pytest.fixture(scope="module")
def theirs():
    return matcher()


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("blip2")
    theirs.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return vlm.load(folder, device="cpu")


def inputs():
    side = SIZES["image_size"]
    pixels = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    return pixels, wordpiece(max_length=POSITIONS)(TEXTS)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert (wanted[0] - wanted[-1]).abs().max() > 1e-2  # rows are told apart


@torch.no_grad()
def check(model, theirs):
    """Features, the contrast of the nearest query, and matching."""
    pixels, tokens = inputs()
    ids, mask = tokens.input_ids, tokens.attention_mask.long()
    contrast = theirs(pixel_values=pixels, input_ids=ids, attention_mask=mask)
    image, text = model.encode_image(pixels), model.encode_text(tokens)
    close(image, contrast.image_embeds)
    close(text, contrast.text_embeds)
    # transformers takes the maximum over the queries in one place only where there is one image: here by hand.
    nearest = torch.einsum("iqd,td->iqt", contrast.image_embeds, contrast.text_embeds).amax(dim=1)
    close(model.similarity(image, text) / model.logit_scale, nearest)
    judged = theirs(pixel_values=pixels, input_ids=ids, attention_mask=mask, use_image_text_matching_head=True)
    close(model.match(pixels, tokens), judged.logits_per_image)
    one = theirs(pixel_values=pixels[:1], input_ids=ids, attention_mask=mask).logits_per_image
    torch.testing.assert_close(nearest[0], one[0], rtol=0, atol=1e-5)


def test_a_matcher_gives_the_same_numbers(model, theirs):
    check(model, theirs)
    config = model.network.config
    assert (model.family, config.heads, config.dec_id) == ("blip2", ("itc", "itm"), DEC)
    assert config.text.cross_layers == (0, 2) and not config.image.own_final_eps
    torch.testing.assert_close(model.logit_scale, torch.tensor([1 / 0.07]))
    with pytest.raises(MissingVerbError, match=r"no itg head \(it has: itc, itm\)"):
        model.network.lm_logits(*inputs())


def test_other_settings_are_kept(tmp_path):
    theirs = matcher(3, cross_attention_frequency=3, hidden_act="gelu_new", layer_norm_eps=1e-3, num_hidden_layers=4)
    theirs.save_pretrained(tmp_path)
    model = vlm.load(tmp_path, device="cpu")
    assert model.network.config.text.cross_layers == (0, 3)
    check(model, theirs)


def test_export_gives_the_folder_back(model, theirs, tmp_path):
    from transformers import Blip2ForImageTextRetrieval, Blip2Processor

    with torch.no_grad():
        model.network.log_scale.fill_(3.0)
    export_hf(model, tmp_path / "out")
    again, report = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [MATCHER]
    before, after = theirs.state_dict(), again.state_dict()
    assert set(before) == set(after) and all(torch.equal(before[key], after[key]) for key in before)
    read = vlm.load(tmp_path / "out", device="cpu")
    check(read, again.eval())
    torch.testing.assert_close(read.network.log_scale, torch.tensor([3.0]))  # the temperature is kept
    again.save_pretrained(tmp_path / "theirs")  # by transformers too
    torch.testing.assert_close(vlm.load(tmp_path / "theirs", device="cpu").network.log_scale, torch.tensor([3.0]))
    processor = Blip2Processor.from_pretrained(tmp_path / "out")
    assert torch.equal(processor(text=TEXTS, padding=True, return_tensors="pt").input_ids, inputs()[1].input_ids)


def test_the_head_that_says_words_stands_beside(tmp_path):
    """And token types, which their Q-Former hasn't got, are put into the positions."""
    from transformers import Blip2ForImageTextRetrieval

    theirs = read_config("Blip2Config", settings(), "here")
    qformer = qformer_config(theirs.qformer_config, SIZES["queries"], words=True, speaks=True, where="here")
    qformer = replace(qformer, text=replace(qformer.text, token_types=2))
    network = scrambled(Blip2(Blip2Config(image_config(theirs.vision_config, where="here"), qformer, embed_dim=24)))
    tokenizer, transform = wordpiece(max_length=POSITIONS), ImageTransform(SIZES["image_size"])
    own = VisionLanguageModel(network, tokenizer, transform, name="own", family="blip2")
    export_hf(own, tmp_path / "out")
    read = vlm.load(tmp_path / "out", device="cpu")
    pixels, tokens = inputs()
    assert read.network.config.heads == ("itc", "itm", "itg") and not read.network.config.text.token_types
    torch.testing.assert_close(read.network.lm_logits(pixels, tokens), network.lm_logits(pixels, tokens))
    inner, report = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and all("cls.predictions" in name for name in report["unexpected_keys"])
    check(own, inner.eval())


@pytest.mark.parametrize("gone", ["qformer.layernorm.bias", "qformer.encoder.layer.1.output_query.dense.weight"])
def test_a_missing_tensor_is_named(theirs, tmp_path, gone):
    theirs.save_pretrained(tmp_path, state_dict={k: v for k, v in theirs.state_dict().items() if k != gone})
    with pytest.raises(WeightsError, match=f"1 missing: {gone}"):
        vlm.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_config": {"qkv_bias": False}}, "qkv_bias false: expected true"),
        ({"qformer_config": {"hidden_act": "relu"}}, "hidden_act 'relu': expected one of"),
        ({"num_query_tokens": 5}, r"query_tokens \(1, 4, 128\), which can't become qformer.query_tokens \(5, 128\)"),
        ({"architectures": ["Blip2VisionModelWithProjection"]}, "isn't known; expected one of Blip2For"),
    ],
)
def test_settings_that_don_t_fit_are_named(theirs, tmp_path, change, message):
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    found = json.loads(path.read_text())
    for key, value in change.items():
        found[key] = found[key] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(found))
    with pytest.raises(WeightsError, match=message):
        vlm.load(tmp_path)


def test_published_sizes_fit():
    """transformers' defaults are BLIP-2's published sizes: every tensor of theirs has its place in ours."""
    from transformers import Blip2Config as Theirs
    from transformers import Blip2ForImageTextRetrieval

    full = Theirs(qformer_config={"use_qformer_text_input": True, "vocab_size": 30523})
    with torch.device("meta"):
        wanted = {k: v.shape for k, v in Blip2ForImageTextRetrieval(full).state_dict().items()}
        image = image_config(full.vision_config, where="here")
        qformer = qformer_config(full.qformer_config, full.num_query_tokens, words=True, where="here")
        config = Blip2Config(image, qformer, heads=("itc", "itm"))
        found = to_theirs(Blip2(config).state_dict(), [*hf_rules(config.image, config.qformer), *hf_heads()])
    assert {k: v.shape for k, v in found.items()} == wanted
    again = hf_config("Blip2Config", config.image, config.qformer)
    assert again["vision_config"]["intermediate_size"] == 6144


@torch.no_grad()
@pytest.mark.parametrize("words", [False, True])
def test_a_q_former_alone_gives_the_same_numbers(words, tmp_path):
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    sizes = settings()["qformer_config"] | {"use_qformer_text_input": words, "encoder_hidden_size": 40}
    theirs = gains(scrambled(Blip2QFormerModel(Blip2QFormerConfig(**sizes))))
    theirs.save_pretrained(tmp_path / "theirs")
    network = vlm.load(tmp_path / "theirs", device="cpu").network
    random = torch.Generator().manual_seed(2)
    queries, seen = torch.randn(1, 32, SIZES["text"], generator=random), torch.randn(2, 5, 40, generator=random)
    network.query_tokens.copy_(queries[0])
    given = {"query_embeds": queries.expand(2, -1, -1), "encoder_hidden_states": seen}
    close(network.queries(seen), theirs(**given).last_hidden_state)
    if words:
        texts = torch.randn(2, 6, SIZES["text"], generator=random)
        given["query_embeds"] = torch.cat([given["query_embeds"], texts], dim=1)
        wanted = theirs(**given, query_length=32).last_hidden_state
        x = torch.cat([network.embed_queries(2), network.text.embed_norm(texts)], dim=1)
        close(network.text(x, image=network.image_keys_values(seen), queries=32), wanted)
    export_hf_qformer(network, tmp_path / "ours")
    again, report = Blip2QFormerModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in again.state_dict().items())
    assert again.config.encoder_hidden_size == 40 and again.config.use_qformer_text_input == words


def test_the_q_former_of_a_whole_model_is_written_alone(model, theirs, tmp_path):
    export_hf_qformer(model.network, tmp_path)
    from transformers import Blip2QFormerModel

    again = Blip2QFormerModel.from_pretrained(tmp_path).state_dict()
    wanted = theirs.qformer.state_dict()
    assert set(again) == set(wanted) and all(torch.equal(again[name], wanted[name]) for name in wanted)
