"""Training that starts from a published BLIP-2: LAVIS's files and transformers' folders, for both stages."""

from dataclasses import replace

import pytest
import torch

import vlm
from tests.weights.blip2_reference import DEC, Reference, lavis_speaker, speaker_folder
from tests.weights.made import scrambled
from vlm.errors import WeightsError
from vlm.models.blip2 import Blip2, Blip2Config
from vlm.models.blip2_llm import Blip2Llm, Blip2LlmConfig, LlmConfig
from vlm.models.clip import Clip, ClipConfig
from vlm.models.vit import ViTConfig
from vlm.weights.hf_qformer import export_hf_qformer
from vlm.weights.official import read_official
from vlm.weights.start import start_from


@pytest.fixture(scope="module")
def theirs():
    return Reference()


@pytest.fixture(scope="module")
def whole(theirs, tmp_path_factory):
    """The file, and what it holds in our names."""
    path = tmp_path_factory.mktemp("lavis") / "stage1.pth"
    torch.save({"model": theirs.checkpoint()}, path)
    found = read_official(path)
    return path, found.config, found.network


def fresh(config):
    torch.manual_seed(5)
    return Blip2(config) if isinstance(config, Blip2Config) else Blip2Llm(config)


def second(config):
    """Stage 2 upon the parts of a stage 1."""
    qformer = replace(config.qformer, text=replace(config.qformer.text, vocab_size=0), speaks=False)
    return Blip2LlmConfig(image=config.image, qformer=qformer, llm=LlmConfig(width=32))


def same(network, tensors, *parts):
    """Whether these parts are those of a file, each whole."""
    own = {name: value for name, value in network.state_dict().items() if name.startswith(parts)}
    return bool(own) and all(torch.equal(value, tensors[name]) for name, value in own.items())


def test_stage_1_goes_on_from_lavis_s_file(whole):
    path, config, tensors = whole
    network = fresh(config)
    start_from(network, str(path))
    assert all(torch.equal(value, tensors[name]) for name, value in network.state_dict().items())


def test_without_an_image_encoder_the_rest_starts(theirs, whole, tmp_path):
    """LAVIS leaves it out; the norm behind it goes with it."""
    _, config, tensors = whole
    torch.save({"model": theirs.checkpoint(image=False)}, tmp_path / "stage1.pth")
    network = fresh(config)
    before = {name: value.clone() for name, value in network.image.state_dict().items()}
    start_from(network, str(tmp_path / "stage1.pth"))
    assert same(network, tensors, "qformer.", "image_projection.", "itm_head.", "log_scale")
    assert all(torch.equal(value, before[name]) for name, value in network.image.state_dict().items())


def test_stage_2_takes_queries_without_words(whole):
    path, config, tensors = whole
    network = fresh(second(config))
    before = network.projection.weight.clone()
    start_from(network, str(path))
    assert same(network, tensors, "image.", "qformer.") and torch.equal(network.projection.weight, before)


@pytest.mark.parametrize("of", ["transformers", "LAVIS"])
def test_stage_2_goes_on_from_a_stage_2(of, tmp_path):
    theirs = speaker_folder("opt", tmp_path / "hf") if (tmp_path / "hf").mkdir() is None else None
    loaded = vlm.load(tmp_path / "hf", device="cpu").network
    spec, config = str(tmp_path / "hf"), loaded.config
    if of == "LAVIS":
        spec, config = str(tmp_path / "stage2.pth"), replace(config, image=replace(config.image, final_norm_eps=1e-5))
        torch.save({"model": lavis_speaker(theirs)}, spec)
    network = fresh(config)
    start_from(network, spec)
    assert same(network, loaded.state_dict(), "image.", "qformer.", "projection.")
    with pytest.raises(WeightsError, match=r"its Q-Former lacks qformer\.text\.tokens\.weight"):
        text = replace(config.qformer.text, vocab_size=30523)
        start_from(fresh(Blip2Config(config.image, replace(config.qformer, text=text, dec_id=DEC))), spec)


def test_stage_1_starts_from_transformers_matcher(theirs, whole, tmp_path):
    """Which has no head that says words: that begins afresh."""
    theirs.inner.save_pretrained(tmp_path)
    _, config, tensors = whole
    network = fresh(replace(config, image=replace(config.image, final_norm_eps=0.0)))
    head = {name: value.clone() for name, value in network.state_dict().items() if "lm_head" in name}
    start_from(network, str(tmp_path))
    assert same(network, tensors, "image.", "qformer.text.", "qformer.query_tokens", "text_projection.", "itm_head.")
    assert all(torch.equal(network.state_dict()[name], value) for name, value in head.items())
    torch.testing.assert_close(network.logit_scale, torch.tensor([1 / 0.07]))


def test_a_q_former_alone_gives_its_layers(whole, tmp_path):
    _, config, _ = whole
    source = scrambled(Blip2(config))
    export_hf_qformer(source, tmp_path)
    network = fresh(config)
    queries = network.qformer.query_tokens.clone()
    start_from(network, str(tmp_path))
    assert same(network, source.state_dict(), "qformer.text.layers.", "qformer.text.embed_norm.")
    assert torch.equal(network.qformer.query_tokens, queries)


def test_what_shapes_don_t_tell_must_agree(whole):
    path, config, _ = whole
    image = replace(config.image, heads=4, final_norm_eps=0.0)
    text = replace(config.qformer.text, heads=4, norm_eps=1e-5)
    network = fresh(replace(config, image=image, qformer=replace(config.qformer, text=text)))
    with pytest.raises(WeightsError) as error:
        start_from(network, str(path))
    for reason in (
        "model.image.heads is 4, expected 2", "model.image.final_norm_eps is 0.0, expected 1e-05",
        "model.qformer.text.heads is 4, expected 2", "model.qformer.text.norm_eps is 1e-05, expected 1e-12",
    ):  # fmt: skip
        assert reason in str(error.value)
    clip = Clip(ClipConfig(image=ViTConfig(32, 16, 32, 1, 2, 64), embed_dim=8))
    with pytest.raises(WeightsError, match="can't start a Clip, which has no Q-Former"):
        start_from(clip, str(path))


def test_a_repo_id_starts_as_its_folder_does(theirs, whole, tmp_path, monkeypatch):
    """A folder here of that name goes first; a repo that can't be had is told by its name."""
    theirs.inner.save_pretrained(tmp_path / "hub")
    _, config, tensors = whole

    def download(repo, allow_patterns):
        if repo != "owner/blip2":
            raise OSError("no network here")
        return str(tmp_path / "hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    network = fresh(replace(config, image=replace(config.image, final_norm_eps=0.0)))
    start_from(network, "owner/blip2")
    assert same(network, tensors, "image.", "qformer.text.", "itm_head.")
    with pytest.raises(
        WeightsError, match=r"owner/other: no such folder here, and as a Hugging Face repo .*no network"
    ):
        start_from(network, "owner/other")
    (tmp_path / "owner" / "blip2").mkdir(parents=True)
    with pytest.raises(WeightsError, match="owner/blip2: nothing to start from"):
        start_from(network, "owner/blip2")
