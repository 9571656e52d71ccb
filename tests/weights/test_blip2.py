"""LAVIS's BLIP-2 of stage 1: the same numbers as a reference of transformers' parts, both ways, and refusals."""

import re
from dataclasses import replace

import pytest
import torch

import vlm
from tests.weights.blip2_reference import DEC, FINAL_EPS, POSITION_IDS, POSITIONS, SIZES, Reference
from tests.weights.facts import official
from vlm.data.tokenizers import wordpiece
from vlm.errors import WeightsError
from vlm.models.blip2 import Blip2, Blip2Config
from vlm.weights.blip2 import BLIP2, eva_tensors, infer_config, infer_qformer, with_image_encoder
from vlm.weights.export import export_hf
from vlm.weights.files import read_tensors
from vlm.weights.keymaps.blip2 import lavis_heads, lavis_rules, tied
from vlm.weights.loaded import VisionLanguageModel
from vlm.weights.official import export_official, layout_of, load_official
from vlm.weights.rules import ZEROS, to_ours

TEXTS = ["a cat", "two dogs in a wood, late at night", "a red house"]


@pytest.fixture(scope="module")
def theirs():
    return Reference()


@pytest.fixture(scope="module")
def path(theirs, tmp_path_factory):
    return saved(theirs.checkpoint(), tmp_path_factory.mktemp("blip2") / "blip2_pretrained.pth")


@pytest.fixture(scope="module")
def model(path):
    return vlm.load(path, device="cpu")


def saved(tensors, path):
    torch.save({"model": tensors}, path)
    return path


def inputs():
    side = SIZES["image_size"]
    pixels = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    return pixels, wordpiece(max_length=POSITIONS)(TEXTS)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert (wanted[0] - wanted[-1]).abs().max() > 1e-2  # rows are told apart


@torch.no_grad()
def check(network, theirs):
    pixels, tokens = inputs()
    ids, mask = tokens.input_ids, tokens.attention_mask
    close(network.look(pixels), theirs.image_states(pixels))
    contrast = theirs.inner(pixel_values=pixels, input_ids=ids, attention_mask=mask.long())
    close(network.encode_image(pixels), contrast.image_embeds)
    close(network.encode_text(tokens), contrast.text_embeds)
    given = {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask.long()}
    close(network.match(pixels, tokens), theirs.inner(**given, use_image_text_matching_head=True).logits_per_image)
    begun = torch.cat([torch.full_like(ids[:, :1], DEC), ids[:, 1:]], dim=1)
    close(network.lm_logits(pixels, tokens)[mask], theirs.said(pixels, begun, mask)[mask])


def test_a_checkpoint_gives_the_same_numbers(model, theirs):
    check(model.network, theirs)
    torch.testing.assert_close(model.logit_scale, torch.tensor([1 / theirs.temp]))
    config = model.network.config
    assert (model.family, model.name, config.dec_id) == ("blip2", "blip2_pretrained", DEC)
    assert (config.image.final_norm_eps, config.image.norm_eps, config.image.heads) == (FINAL_EPS, 1e-6, 2)
    assert (config.text.norm_eps, config.text.cross_layers) == (1e-12, (0, 2))
    transform = model.transform
    assert (transform.size, transform.resize, transform.interpolation) == (24, "squash", "bicubic")
    assert transform.mean == (0.48145466, 0.4578275, 0.40821073)


def test_the_image_encoder_comes_from_a_file_of_its_own(theirs, tmp_path):
    """LAVIS stores the frozen one alone, in fp16 and with one layer more than it takes."""
    whole = theirs.checkpoint()
    path = saved(theirs.checkpoint(image=False), tmp_path / "blip2_pretrained.pth")
    with pytest.raises(WeightsError, match=r"has no image encoder .*put that file beside.* or name one by vlm.load"):
        vlm.load(path)
    eva = {name.removeprefix("visual_encoder."): v for name, v in whole.items() if name.startswith("visual_encoder.")}
    more = {name.replace("blocks.1.", "blocks.2."): value for name, value in eva.items() if "blocks.1." in name}
    more |= {"norm.weight": torch.ones(3), "head.weight": torch.ones(3), "mask_token": torch.ones(3)}
    torch.save(eva | more, tmp_path / "eva_vit_g.pth")
    joined = with_image_encoder(read_tensors(path), path, layers=2)
    assert set(joined) == set(whole) and all(torch.equal(joined[name], value) for name, value in whole.items())
    torch.save({name: value.half() for name, value in eva.items()}, tmp_path / "eva_vit_g.pth")
    beside = vlm.load(path, device="cpu").network.image.trunk.blocks[1].mlp.fc1.weight
    assert torch.equal(beside, eva["blocks.1.mlp.fc1.weight"].half().float())
    torch.save(eva, tmp_path / "other.pth")
    check(vlm.load(path, device="cpu", image=tmp_path / "other.pth").network, theirs)
    with pytest.raises(WeightsError, match=r"no checkpoint file, so image='x' says nothing"):
        vlm.load("tiny-clip", image="x")
    with pytest.raises(WeightsError, match=r"1 unexpected: visual_encoder\.strange"):
        torch.save(eva | {"strange": torch.ones(1)}, tmp_path / "other.pth")
        vlm.load(path, image=tmp_path / "other.pth")


def test_export_gives_the_file_back(theirs, model, path, tmp_path):
    before, after = read_tensors(path), read_tensors(export_official(model, tmp_path / "again.pth"))
    assert set(before) == set(after)
    for name, value in before.items():
        assert torch.equal(value, after[name]) or name == "temp", name
    torch.testing.assert_close(after["temp"], before["temp"])
    model.save(tmp_path / "own")
    check(vlm.load(tmp_path / "own", device="cpu").network, theirs)


def test_a_bias_on_keys_changes_nothing_and_goes(model, path, tmp_path):
    """transformers trains one; LAVIS has no place for it."""
    changed = load_official(path)
    with torch.no_grad():
        for block in changed.network.image.trunk.blocks:
            block.attn.qkv.bias[SIZES["image"] : 2 * SIZES["image"]] = torch.randn(SIZES["image"])
        pixels, _ = inputs()
        torch.testing.assert_close(changed.network.eval().look(pixels), model.network.look(pixels), atol=1e-5, rtol=0)
    again = read_tensors(export_official(changed, tmp_path / "again.pth"))
    assert all(torch.equal(value, again[name]) for name, value in read_tensors(path).items() if name != "temp")


def test_transformers_has_one_eps_for_all_image_norms(theirs, model, tmp_path):
    from transformers import Blip2ForImageTextRetrieval

    with pytest.raises(WeightsError, match=r"last norm has an eps of 1e-05, the others 1e-06.*--near"):
        export_hf(model, tmp_path / "out")
    export_hf(model, tmp_path / "out", near=True)
    again = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "out").eval()
    assert again.vision_model.post_layernorm.eps == 1e-6
    wanted = theirs.inner.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in again.state_dict().items())
    assert vlm.load(tmp_path / "out", device="cpu").network.config.heads == ("itc", "itm", "itg")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {f"Qformer.bert.encoder.layer.2.{part}_query.dense.bias": None for part in ("intermediate", "output")},
            r"2 missing: Qformer\.bert\.encoder\.layer\.2\.intermediate_query\.dense\.bias, Qformer\.bert\.enc",
        ),
        ({"Qformer.bert.encoder.layer.2.crossattention.self.key.weight": None}, "1 missing: Qformer.*2.crossatt"),
        ({"Qformer.bert.encoder.layer.1.crossattention.self.key.weight": torch.ones(2)}, "1 unexpected: Qformer.*1.cr"),
        ({"Qformer.cls.predictions.transform.dense.bias": None}, "1 missing: Qformer.cls.predictions.transform"),
        ({"query_tokens": None}, "1 missing: query_tokens"),
        ({"temp": None}, "1 missing: temp"),
        ({"ln_vision.weight": None}, "1 missing: ln_vision.weight"),
        ({"visual_encoder.blocks.1.attn.q_bias": None}, "1 missing: visual_encoder.blocks.1.attn.q_bias"),
        ({"extra.weight": torch.ones(2)}, "1 unexpected: extra.weight"),
        ({"Qformer.cls.predictions.decoder.bias": torch.ones(30523)}, r"decoder\.bias differs from"),
        ({"vision_proj.bias": torch.ones(3)}, r"image_projection.bias \(3,\), expected \(24,\)"),
        ({"visual_encoder.class_embedding": torch.ones(2)}, "looks with CLIP's ViT-L, expected EVA-CLIP's"),
    ],
)  # fmt: skip
def test_what_doesn_t_fit_is_named(theirs, tmp_path, change, message):
    tensors = theirs.checkpoint() | change
    with pytest.raises(WeightsError, match=message):
        load_official(saved({n: v for n, v in tensors.items() if v is not None}, tmp_path / "bad.pth"))


def test_networks_that_lavis_can_t_hold_are_refused(model, tmp_path):
    config = model.network.config
    text = replace(config.text, cross_layers=(1,), heads=4)
    image = replace(config.image, final_norm_eps=0.0)
    with torch.device("meta"):
        odd = Blip2(replace(config, image=image, qformer=replace(config.qformer, text=text), heads=("itc", "itm")))
    named = VisionLanguageModel(odd, model.tokenizer, model.transform, name="odd", family="blip2")
    with pytest.raises(WeightsError) as error:
        export_official(named, tmp_path / "odd.pth")
    for reason in ("eps is 1e-06, not 1e-05", "heads aren't 64", r"layers \[1\] look", "heads are itc, itm, not itc"):
        assert re.search(reason, str(error.value)), reason
    assert not (tmp_path / "odd.pth").exists()


def test_full_size_names_are_used_once_and_fit():
    """The published file's tensors; ours of the same size take each of them once."""
    facts = official("blip2_stage1")
    assert len(facts) == 346 and layout_of(facts) is BLIP2
    meta = {key: torch.empty(shape, dtype=getattr(torch, kind), device="meta") for key, (kind, shape) in facts.items()}
    qformer = infer_qformer(meta, "facts", words=True, speaks=True)
    default = Blip2Config().qformer
    assert qformer == replace(default, text=replace(default.text, cross_width=1408))
    rules = [*lavis_rules(None, qformer), *lavis_heads()]
    used = [key for rule in rules for key in rule.theirs if key != ZEROS]
    beside = {"temp", POSITION_IDS}
    assert len(used) == len(set(used)) and set(used) | beside | set(tied()) == set(facts)
    assert not set(used) & (beside | set(tied()))
    whole = to_ours(meta, rules, where="facts", left_out=[".*"])
    eva = eva_tensors(_eva_g())
    config = infer_config(meta | eva, "facts")
    assert (config.image.heads, config.image.layers, config.image.image_size) == (16, 39, 224)
    whole |= to_ours(eva | meta, lavis_rules(config.image, qformer), where="facts", left_out=[".*"])
    with torch.device("meta"):
        own = {key: value.shape for key, value in Blip2(config).state_dict().items()}
    assert {key: value.shape for key, value in whole.items()} | {"log_scale": (1,)} == own


def _eva_g():
    """Names and shapes of EVA-CLIP-g's file, of which LAVIS takes 39 layers."""
    width, hidden = 1408, 6144
    block = {
        "norm1.weight": (width,), "norm1.bias": (width,), "norm2.weight": (width,), "norm2.bias": (width,),
        "attn.q_bias": (width,), "attn.v_bias": (width,), "attn.qkv.weight": (3 * width, width),
        "attn.proj.weight": (width, width), "attn.proj.bias": (width,), "mlp.fc1.weight": (hidden, width),
        "mlp.fc1.bias": (hidden,), "mlp.fc2.weight": (width, hidden), "mlp.fc2.bias": (width,),
    }  # fmt: skip
    shapes = {f"blocks.{i}.{name}": shape for i in range(40) for name, shape in block.items()}
    shapes |= {"cls_token": (1, 1, width), "pos_embed": (1, 257, width), "patch_embed.proj.bias": (width,)}
    shapes |= {"patch_embed.proj.weight": (width, 3, 14, 14), "norm.weight": (width,), "norm.bias": (width,)}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def test_the_reference_has_the_official_names(theirs):
    """What parity is measured against is called as the published file, but for the numbers of layers."""

    def plain(names):
        return {re.sub(r"\.\d+\.", ".#.", name) for name in names}

    assert plain(theirs.checkpoint(image=False)) == plain(official("blip2_stage1"))
