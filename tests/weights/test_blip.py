"""Official BLIP checkpoints: the same numbers as a reference of other libraries' parts, both ways, and refusals."""

import re
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import vlm
from tests.weights.blip_reference import DEC, ENC, POSITIONS, SIZES, Reference, reference
from tests.weights.facts import official
from vlm.apps.cli import app
from vlm.data.tokenizers import wordpiece
from vlm.errors import MissingVerbError, WeightsError
from vlm.models.blip import Blip, BlipConfig
from vlm.weights.blip import BLIP, PROMPT, infer_config
from vlm.weights.files import read_tensors
from vlm.weights.keymaps.blip import blip_rules, teacher_rules, tied
from vlm.weights.loaded import VisionLanguageModel
from vlm.weights.official import export_official, layout_of, load_official, read_official
from vlm.weights.rules import to_ours
from vlm.weights.start import start_from

TEXTS = ["a cat", "two dogs in a wood, late at night", "a red house"]


@pytest.fixture(scope="module")
def theirs() -> Reference:
    return reference()


@pytest.fixture(scope="module")
def path(theirs, tmp_path_factory):
    return saved(theirs.checkpoint(), tmp_path_factory.mktemp("blip") / "model_base.pth")


def saved(tensors, path):
    torch.save({"model": tensors}, path)
    return path


def only(tensors, *parts):
    """Those of a file that hold these parts, as fine-tuned files do."""
    return {name: value for name, value in tensors.items() if name.split(".")[0] in parts}


CAPTION = ("visual_encoder", "text_decoder")
MATCH = ("visual_encoder", "text_encoder", "vision_proj", "text_proj", "itm_head")


def inputs():
    pixels = torch.randn(3, 3, SIZES["image_size"], SIZES["image_size"], generator=torch.Generator().manual_seed(1))
    return pixels, wordpiece(max_length=POSITIONS)(TEXTS)


@torch.no_grad()
def check(network, theirs, end=""):
    """Every verb that the network's heads give, against the reference."""
    pixels, tokens = inputs()
    expected = theirs.parts(pixels, tokens.input_ids, tokens.attention_mask, end)
    image = network.image_states(pixels)
    found = {"image_states": image.states}
    if "itc" in network.config.heads:
        found |= {"image": image.features, "text": network.encode_text(tokens)}
    if "itm" in network.config.heads and not end:
        found["itm"] = network.match(pixels, tokens)
    if "lm" in network.config.heads and not end:
        found["lm"] = network.lm_logits(pixels, tokens)
    mask = tokens.attention_mask.bool()
    for name, value in found.items():
        wanted = expected[name]
        if name == "lm":
            value, wanted = value[mask], wanted[mask]
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        assert (wanted[0] - wanted[-1]).abs().max() > 1e-2, name  # rows are told apart
    return set(found)


def test_an_official_checkpoint_gives_the_same_numbers(theirs, path):
    model = vlm.load(path, device="cpu")
    assert check(model.network, theirs) == {"image_states", "image", "text", "itm", "lm"}
    torch.testing.assert_close(model.logit_scale, torch.tensor([20.0]))
    config = model.network.config
    assert (model.family, model.name, config.sharing) == ("blip", "model_base", "all_but_self_attention")
    assert (config.dec_id, config.enc_id, config.prompt_ids) == (DEC, ENC, ())
    transform = model.transform
    assert (transform.size, transform.resize, transform.interpolation) == (32, "squash", "bicubic")
    assert transform.mean == (0.48145466, 0.4578275, 0.40821073) and transform.std[2] == 0.27577711
    assert torch.equal(model.tokens(TEXTS).input_ids, inputs()[1].input_ids)


@pytest.mark.parametrize("sharing", ["none", "all"])
def test_sharing_shows_in_the_tensors(sharing, tmp_path):
    theirs = reference(1, sharing)
    path = saved(theirs.checkpoint(), tmp_path / "shared.pth")
    model = load_official(path)
    assert model.network.config.sharing == sharing
    check(model.network.eval(), theirs)
    again = read_tensors(export_official(model, tmp_path / "again.pth"))
    before = {name: value for name, value in read_tensors(path).items() if "_m." not in name and "queue" not in name}
    assert set(again) == set(before)
    assert all(torch.equal(again[name], value) for name, value in before.items() if name != "temp")


def test_the_teacher_and_the_queue_come_along(theirs, path):
    found = read_official(path, training=True)
    teacher = Blip(found.config).eval()
    teacher.load_state_dict(found.training.teacher)
    check(teacher, theirs, "_m")
    assert torch.equal(teacher.itm_head.weight, theirs.itm_head.weight)
    student = Blip(found.config).eval()
    student.load_state_dict(found.network)
    check(student, theirs)
    stored = theirs.checkpoint()
    assert torch.equal(found.training.image_queue, stored["image_queue"].T)
    assert torch.equal(found.training.text_queue, stored["text_queue"].T) and found.training.pointer == 4


def test_export_gives_the_file_back(path, tmp_path):
    training = read_official(path, training=True).training
    again = read_tensors(export_official(load_official(path), tmp_path / "again.pth", training=training))
    before = read_tensors(path)
    assert set(again) == set(before)
    for name, value in before.items():
        assert again[name].dtype == value.dtype and again[name].shape == value.shape, name
        torch.testing.assert_close(again[name], value, rtol=1e-6, atol=0)


def test_export_by_the_command(path, tmp_path):
    out = tmp_path / "again.pth"
    run = CliRunner().invoke(app, ["export", "--model", str(path), "--to", "official", "--out", str(out)])
    assert run.exit_code == 0, run.output
    before, again = read_tensors(path), read_tensors(out)
    assert set(again) == {name for name in before if "_m." not in name and "queue" not in name}
    assert all(torch.equal(value, before[name]) for name, value in again.items() if name != "temp")


def test_fine_tuned_files_have_the_heads_that_they_hold(theirs, path, tmp_path):
    """A captioner's decoder alone, and matching's encoder alone; each refuses what it has no head for by name."""
    pixels, tokens = inputs()
    captioner = vlm.load(saved(only(read_tensors(path), *CAPTION), tmp_path / "caption.pth"), device="cpu")
    assert check(captioner.network, theirs) == {"image_states", "lm"}
    assert captioner.network.config.heads == ("lm",) and captioner.network.config.prompt_ids == PROMPT
    assert captioner.tokenizer.decode(PROMPT) == "a picture of"
    with pytest.raises(MissingVerbError, match=r"no itm head \(it has: lm\)"):
        captioner.network.match(pixels, tokens)
    with pytest.raises(MissingVerbError, match="no itc head"):
        captioner.encode_image(pixels)
    matcher = vlm.load(saved(only(read_tensors(path), *MATCH), tmp_path / "match.pth"), device="cpu")
    assert check(matcher.network, theirs) == {"image_states", "image", "text", "itm"}
    with pytest.raises(MissingVerbError, match=r"no lm head \(it has: itc, itm\)"):
        matcher.network.lm_logits(pixels, tokens)
    for model, parts in ((captioner, CAPTION), (matcher, MATCH)):
        again = read_tensors(export_official(model, tmp_path / "again.pth"))
        stored = only(read_tensors(path), *parts)
        assert set(again) - {"temp"} == set(stored)
        assert all(torch.equal(again[name], value) for name, value in stored.items())


@torch.no_grad()
def test_question_answering_has_a_decoder_of_its_own(tmp_path):
    """The official names: encoder and decoder side by side, without a space for features; both ways."""
    theirs = reference(3, "none", source=SIZES["text"])
    tensors = only(theirs.checkpoint(), "visual_encoder", "text_encoder", "text_decoder")
    model = vlm.load(saved(tensors, tmp_path / "vqa.pth"), device="cpu")
    assert (model.family, model.network.config.enc_id, model.network.config.dec_id) == ("vqa", ENC, DEC)
    pixels, tokens = inputs()
    answers = wordpiece(max_length=POSITIONS)(["yes", "two of them", "red"])
    found = model.network.answer_logits(*model.network.question_states(pixels, tokens), answers)
    wanted = theirs.answers(pixels, tokens, answers)
    real = answers.attention_mask.bool()
    torch.testing.assert_close(found[real], wanted[real], rtol=0, atol=1e-4)
    assert (wanted[0, 0] - wanted[1, 0]).abs().max() > 1e-2
    with pytest.raises(WeightsError, match="image and text are 192 and 128 wide"):
        export_official(model, tmp_path / "again.pth")
    with pytest.raises(WeightsError, match=r"no vqa head, no tensor text_decoder\.cls"):
        left = {name: value for name, value in tensors.items() if "cls" not in name}
        vlm.load(saved(left, tmp_path / "headless.pth"))


def test_retrieval_files_also_hold_the_numbers_of_pictures(theirs, path, tmp_path):
    tensors = read_tensors(path)
    tensors["ptr_queue"] = tensors.pop("queue_ptr")
    tensors["idx_queue"] = torch.full((1, 6), -100.0)
    found = read_official(saved(tensors, tmp_path / "retrieval.pth"), training=True)
    assert found.training.pointer == 4
    check(load_official(tmp_path / "retrieval.pth").network.eval(), theirs)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            ("visual_encoder", "text_encoder", "itm_head"),
            "text_encoder without the itc head, no tensor vision_proj.wei",
        ),
        (("visual_encoder", "text_encoder"), "text_encoder without the itc head"),
        (("visual_encoder", "text_decoder", "itm_head"), "an itm head without the itc head"),
    ],
)
def test_heads_that_are_missing_are_named(path, tmp_path, parts, message):
    with pytest.raises(WeightsError, match=message):
        vlm.load(saved(only(read_tensors(path), *parts), tmp_path / "bad.pth"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"itm_head.bias": None}, "1 missing: itm_head.bias"),
        ({"text_decoder.cls.predictions.bias": None}, "text_decoder.bert without the lm head"),
        ({"text_decoder.cls.predictions.transform.dense.bias": None}, "1 missing: text_decoder.cls"),
        ({"extra.weight": torch.ones(2)}, "1 unexpected: extra.weight"),
        ({"vision_proj.bias": torch.ones(3)}, r"image_projection.bias \(3,\), expected \(40,\)"),
        ({"text_decoder.cls.predictions.decoder.bias": torch.ones(30524)}, r"decoder\.bias differs from"),
        ({"visual_encoder.pos_embed": torch.ones(1, 7, 192)}, "7 image positions"),
    ],
)
def test_what_doesn_t_fit_is_named(path, tmp_path, change, message):
    tensors = read_tensors(path) | change
    with pytest.raises(WeightsError, match=message):
        load_official(saved({n: v for n, v in tensors.items() if v is not None}, tmp_path / "bad.pth"))


def test_networks_that_the_official_code_can_t_hold_are_refused(path, tmp_path):
    model = load_official(path)
    config = model.network.config
    text = replace(config.text, cross_layers=(2,), token_types=2)
    with torch.device("meta"):
        odd = Blip(replace(config, text=text, dec_id=1))
    named = VisionLanguageModel(odd, model.tokenizer, model.transform, name="odd", family="blip")
    with pytest.raises(
        WeightsError, match=r"odd can't.*it has token types; not every text layer.*\[DEC\] and \[ENC\] are 1 and 30523"
    ):
        export_official(named, tmp_path / "odd.pth")
    assert not (tmp_path / "odd.pth").exists()


def test_own_folder_keeps_an_official_model(theirs, path, tmp_path):
    load_official(path).save(tmp_path / "model")
    check(vlm.load(tmp_path / "model", device="cpu").network, theirs)


def test_training_goes_on_from_a_checkpoint(theirs, path):
    """Student, teacher and queue; the parts of a smaller network are taken out of them."""
    config = read_official(path).config
    network = Blip(config).eval()
    training = start_from(network, str(path), training=True)
    check(network, theirs)
    teacher = Blip(config).eval()
    teacher.load_state_dict(training.teacher)
    check(teacher, theirs, "_m")
    assert start_from(network, str(path)) is None
    retrieval = Blip(replace(config, heads=("itc", "itm"))).eval()
    training = start_from(retrieval, str(path), training=True)
    assert set(training.teacher) == set(retrieval.state_dict())
    assert check(retrieval, theirs) == {"image_states", "image", "text", "itm"}


@pytest.mark.parametrize(("name", "count", "heads"), [
    ("blip_pretrain", 1272, ("itc", "itm", "lm")), ("blip_caption", 474, ("lm",)), ("blip_itm", 473, ("itc", "itm")),
])  # fmt: skip
def test_full_size_names_are_used_once_and_fit(name, count, heads):
    """The published files' tensors; ours of the same size take each of them once."""
    facts = official(name)
    assert len(facts) == count
    numbers = {key: torch.tensor(float(place)).expand(shape) for place, (key, (_, shape)) in enumerate(facts.items())}
    for key in list(numbers):  # what is shared is the same
        other = key.replace("text_decoder.bert", "text_encoder")
        if other in numbers and not re.search(r"layer\.\d+\.attention", key):
            numbers[key] = numbers[other]
    assert layout_of(facts) is BLIP
    config = infer_config(numbers, "facts")
    size = 224 if name == "blip_pretrain" else 384
    default = BlipConfig(heads=heads, prompt_ids=PROMPT if heads == ("lm",) else ())
    assert config == replace(default, image=replace(default.image, image_size=size))
    student = [key for rule in blip_rules(config) for key in rule.theirs]
    teacher = [key for rule in teacher_rules(config) for key in rule.theirs] if name == "blip_pretrain" else []
    used, twins = student + teacher, tied(config)
    towers = {"text_encoder": "itc", "text_encoder_m": "teacher", "text_decoder.bert": "lm"}
    beside = {f"{tower}.embeddings.position_ids" for tower, head in towers.items() if head in heads}
    if teacher:
        beside |= {"temp", "image_queue", "text_queue", "queue_ptr", "text_encoder_m.embeddings.position_ids"}
    assert len(used) == len(set(used)) and set(used) | beside | set(twins) == set(facts)
    assert not set(used) & (beside | set(twins))
    meta = {key: torch.empty(shape, dtype=getattr(torch, kind), device="meta") for key, (kind, shape) in facts.items()}
    with torch.device("meta"):
        own = {key: value.shape for key, value in Blip(config).state_dict().items()}
    whole = to_ours(meta, blip_rules(config), where="facts", left_out=[".*"])
    temperature = {"log_scale": (1,)} if "itc" in heads else {}
    assert {key: value.shape for key, value in whole.items()} | temperature == own


def test_the_reference_has_the_official_names(theirs):
    """What parity is measured against is called as the published file, but for the numbers of layers."""

    def plain(names: Iterable[str]) -> set[str]:
        return {re.sub(r"\.\d+\.", ".#.", name) for name in names}

    assert plain(theirs.checkpoint()) == plain(official("blip_pretrain"))
