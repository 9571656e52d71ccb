"""Official ALBEF checkpoints: the same numbers as a reference of other libraries' parts, both ways, and refusals."""

import re
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch

import vlm
from tests.weights.albef_reference import POSITIONS, SIZES, Reference, reference
from tests.weights.facts import official
from vlm.data.tokenizers import wordpiece
from vlm.errors import WeightsError
from vlm.models.albef import Albef, AlbefConfig
from vlm.models.clip import Clip, ClipConfig
from vlm.weights.albef import ALBEF, infer_config
from vlm.weights.files import assign, read_tensors
from vlm.weights.keymaps.albef import albef_rules, teacher_rules, tied
from vlm.weights.loaded import VisionLanguageModel
from vlm.weights.official import export_official, layout_of, load_official, read_official
from vlm.weights.rules import to_ours

TEXTS = ["a cat", "two dogs in a wood, late at night", "a red [MASK]"]
QUERY = "text_encoder.bert.encoder.layer.0.attention.self.query.weight"


@pytest.fixture(scope="module")
def theirs() -> Reference:
    return reference()


@pytest.fixture(scope="module")
def path(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("albef") / "ALBEF.pth"
    torch.save({"model": theirs.checkpoint()}, path)
    return path


def inputs():
    pixels = torch.randn(3, 3, SIZES["image_size"], SIZES["image_size"], generator=torch.Generator().manual_seed(1))
    return pixels, wordpiece(max_length=POSITIONS)(TEXTS)


@torch.no_grad()
def ours_and_theirs(network, theirs, end=""):
    pixels, tokens = inputs()
    expected = theirs.parts(pixels, tokens.input_ids, tokens.attention_mask, end)
    image, text = network.image_states(pixels), network.text_states(tokens)
    fused = network.fuse(text.states, text.mask, network.image_keys_values(image.states))
    found = {
        "image": image.features, "text": text.features, "image_states": image.states, "text_states": text.states,
        "fused": fused, "itm": network.match(pixels, tokens), "mlm": network.mlm_logits(pixels, tokens),
    }  # fmt: skip
    return found, expected, tokens.attention_mask


def check(found, expected, mask):
    assert set(found) == set(expected)
    for name, value in found.items():
        wanted = expected[name]
        if name in ("text_states", "fused", "mlm"):
            value, wanted = value[mask], wanted[mask]
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        assert (wanted[0] - wanted[-1]).abs().max() > 1e-2, name  # rows are told apart


def test_an_official_checkpoint_gives_the_same_numbers(theirs, path):
    model = load_official(path)
    model.network.eval()
    check(*ours_and_theirs(model.network, theirs))
    torch.testing.assert_close(model.logit_scale, torch.tensor([20.0]))
    assert (model.family, model.name) == ("albef", "ALBEF")
    transform = model.transform
    assert (transform.size, transform.resize, transform.interpolation) == (32, "squash", "bicubic")
    assert transform.mean == (0.48145466, 0.4578275, 0.40821073) and transform.std[2] == 0.27577711
    tokens = model.tokens(TEXTS)
    assert torch.equal(tokens.input_ids, inputs()[1].input_ids)


def test_the_teacher_and_the_queue_come_along(theirs, path):
    found = read_official(path, training=True)
    teacher = Albef(found.config).eval()
    teacher.load_state_dict(found.training.teacher)
    ours, expected, mask = ours_and_theirs(teacher, theirs, "_m")
    check(ours, expected, mask)
    student = Albef(found.config).eval()
    student.load_state_dict(found.network)
    check(*ours_and_theirs(student, theirs))
    stored = theirs.checkpoint()
    assert (
        torch.equal(found.training.image_queue, stored["image_queue"].T) and found.training.image_queue.is_contiguous()
    )
    assert torch.equal(found.training.text_queue, stored["text_queue"].T) and found.training.pointer == 4
    assert found.training.image_queue.norm(dim=1).allclose(torch.ones(6))


def test_export_gives_the_file_back(theirs, path, tmp_path):
    model, training = load_official(path), read_official(path, training=True).training
    again = read_tensors(export_official(model, tmp_path / "again.pth", training=training))
    before = read_tensors(path)
    assert set(again) == set(before)
    for name, value in before.items():
        assert again[name].dtype == value.dtype and again[name].shape == value.shape, name
        torch.testing.assert_close(again[name], value, rtol=1e-6, atol=0)
    alone = read_tensors(export_official(model, tmp_path / "alone.pth"))
    assert set(alone) == {name for name in before if "_m." not in name and "queue" not in name}
    check(*ours_and_theirs(load_official(tmp_path / "alone.pth").network.eval(), theirs))


def test_a_checkpoint_without_its_teacher_is_for_use_only(path, tmp_path):
    student = {name: value for name, value in read_tensors(path).items() if "_m." not in name and "queue" not in name}
    torch.save({"model": student}, tmp_path / "student.pth")
    load_official(tmp_path / "student.pth")
    assert read_official(tmp_path / "student.pth", training=True).training is None
    pointer = {"queue_ptr": torch.tensor([4])}
    torch.save({"model": student | pointer}, tmp_path / "student.pth")
    with pytest.raises(WeightsError, match="2 missing: image_queue, text_queue"):
        read_official(tmp_path / "student.pth", training=True)
    queue = {name: value for name, value in read_tensors(path).items() if "queue" in name}
    torch.save({"model": student | queue}, tmp_path / "student.pth")
    with pytest.raises(WeightsError, match=r"missing: visual_encoder_m\.cls_token"):
        read_official(tmp_path / "student.pth", training=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"itm_head.bias": None}, "1 missing: itm_head.bias"),
        ({"extra.weight": torch.ones(2)}, "1 unexpected: extra.weight"),
        (
            {"itm_head.bias": None, QUERY: torch.ones(3, 5)},
            rf"1 missing: itm_head\.bias\n  1 of the wrong shape: {QUERY} \(3, 5\)",
        ),
        ({"vision_proj.bias": torch.ones(3)}, r"image_projection.bias \(3,\), expected \(40,\)"),
        ({"temp": None}, "1 missing: temp"),
        ({"text_encoder.cls.predictions.decoder.bias": torch.ones(30522)}, r"decoder\.bias differs from"),
        ({"visual_encoder.pos_embed": torch.ones(1, 7, 192)}, "7 image positions"),
    ],
)
def test_what_doesn_t_fit_is_named(path, tmp_path, change, message):
    tensors = read_tensors(path) | change
    torch.save({"model": {name: value for name, value in tensors.items() if value is not None}}, tmp_path / "bad.pth")
    with pytest.raises(WeightsError, match=message):
        load_official(tmp_path / "bad.pth")


def test_the_one_door_opens_pre_training_and_names_what_was_fine_tuned(theirs, path, tmp_path):
    model = vlm.load(path, device="cpu")
    assert (model.family, model.name) == ("albef", "ALBEF")
    with torch.no_grad():
        check(*ours_and_theirs(model.network, theirs))
    # As fine-tuning writes them: an encoder without MLM's head, and for VQA a decoder beside it.
    known = {n: v for n, v in read_tensors(path).items() if "_m." not in n and "queue" not in n}
    encoder = {n.replace(".bert.", "."): v for n, v in known.items() if ".cls." not in n}
    decoder = {n.replace("encoder", "decoder"): v for n, v in known.items() if n.startswith("text_encoder")}
    towers = {n: v for n, v in encoder.items() if n.startswith(("visual_encoder", "text_encoder"))}
    entailment = towers | {"cls_head.0.weight": torch.ones(128, 128)}
    for name, tensors in {"retrieval": encoder, "entailment": entailment, "vqa": towers | decoder}.items():
        torch.save({"model": tensors}, tmp_path / f"{name}.pth")
        with pytest.raises(WeightsError, match=rf"{name}\.pth: a fine-tuned ALBEF, .*only the file of pre-training"):
            vlm.load(tmp_path / f"{name}.pth", device="cpu")


def test_a_teacher_with_two_embeddings_is_refused(path, tmp_path):
    name = "text_encoder_m.cls.predictions.decoder.weight"
    torch.save({"model": read_tensors(path) | {name: torch.zeros(30522, 128)}}, tmp_path / "bad.pth")
    load_official(tmp_path / "bad.pth")
    with pytest.raises(WeightsError, match=r"text_encoder_m.*decoder\.weight differs from.*word_embeddings"):
        read_official(tmp_path / "bad.pth", training=True)


def test_queues_of_other_shapes_are_named(path, tmp_path):
    tensors = read_tensors(path) | {"text_queue": torch.ones(40, 5)}
    torch.save({"model": tensors}, tmp_path / "bad.pth")
    with pytest.raises(WeightsError, match=r"image_queue \(40, 6\), text_queue \(40, 5\), expected \(40, Q\) twice"):
        read_official(tmp_path / "bad.pth", training=True)


@pytest.mark.parametrize("place", [[6], [-1], [1, 2]])
def test_a_pointer_beside_the_queue_is_refused(path, tmp_path, place):
    torch.save({"model": read_tensors(path) | {"queue_ptr": torch.tensor(place)}}, tmp_path / "bad.pth")
    with pytest.raises(WeightsError, match=rf"queue_ptr is {re.escape(str(place))}, expected a row of .*, 0 to 5"):
        read_official(tmp_path / "bad.pth", training=True)


def test_networks_that_the_official_code_can_t_hold_are_refused(path, tmp_path):
    model = load_official(path)
    config = replace(model.network.config, image_pool="mean", text_pool="mean", projection_bias=False)
    with torch.device("meta"):
        small = VisionLanguageModel(Albef(config), model.tokenizer, model.transform, name="small", family="albef")
        clip = VisionLanguageModel(Clip(ClipConfig()), model.tokenizer, model.transform, name="c", family="clip")
    with pytest.raises(WeightsError, match=r"mean over patches; its text feature is 'mean'.*have no bias"):
        export_official(small, tmp_path / "small.pth")
    with pytest.raises(WeightsError, match="c is a clip model"):
        export_official(clip, tmp_path / "small.pth")
    assert not (tmp_path / "small.pth").exists()


def test_own_folder_keeps_an_official_model(theirs, path, tmp_path):
    model = load_official(path)
    model.save(tmp_path / "model")
    twin = Albef(model.network.config).eval()
    assign(twin, read_tensors(tmp_path / "model" / "model.safetensors"), where="model")
    check(*ours_and_theirs(twin, theirs))


def test_full_size_names_are_used_once_and_fit():
    """The published file has 844 tensors; ours of the same size take each of them once."""
    facts = official("albef")
    assert len(facts) == 844
    tensors = {
        name: torch.empty(shape, dtype=getattr(torch, kind), device="meta") for name, (kind, shape) in facts.items()
    }
    assert layout_of(tensors) is ALBEF
    config = infer_config(tensors, "facts")
    assert config == AlbefConfig()
    sets = [albef_rules(config), teacher_rules(config)]
    used = [name for rules in sets for rule in rules for name in rule.theirs]
    beside = {"temp", "image_queue", "text_queue", "queue_ptr", *tied(""), *tied("_m")}
    beside |= {f"text_encoder{end}.bert.embeddings.position_ids" for end in ("", "_m")}
    assert len(used) == len(set(used)) and set(used) | beside == set(facts) and not set(used) & beside
    with torch.device("meta"):
        own = {name: value.shape for name, value in Albef(config).state_dict().items()}
    whole = to_ours(tensors, sets[0], where="facts", left_out=[".*"])
    assert {name: value.shape for name, value in whole.items()} | {"log_scale": (1,)} == own
    taught = to_ours(tensors, sets[1], where="facts", left_out=[".*"])
    assert {name: value.shape for name, value in taught.items()} == {
        name: shape for name, shape in own.items() if not name.startswith(("itm_head", "log_scale"))
    }


def test_the_reference_has_the_official_names(theirs):
    """What parity is measured against is called as the published file, but for the numbers of layers."""

    def plain(names: Iterable[str]) -> set[str]:
        return {re.sub(r"\.\d+\.", ".#.", name) for name in names}

    assert plain(theirs.checkpoint()) == plain(official("albef"))
