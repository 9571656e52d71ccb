"""The lineage by its commands: CLIP, then ViLT and ALBEF from it; what is drawn, shuffled and taken over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from typer.testing import CliRunner

import vlm
from tests.train.small import ALONE, forget_last, spawn
from tests.weights import albef_reference, blip_reference
from tests.weights.albef_reference import QUEUE, reference
from vlm.apps.cli import app
from vlm.data.plan import shuffled_texts
from vlm.errors import ConfigError, WeightsError
from vlm.train.config import load_config, named_config
from vlm.train.metrics import read_metrics
from vlm.train.run import RunConfig, begun_network, make_tokenizer, read_run_config, run_kind, train_stage
from vlm.weights.llm import weights_hash
from vlm.weights.official import read_official

IMAGE = "model.image={image_size: 32, patch_size: 16, width: 32, layers: 2, heads: 2, mlp_width: 64}"
TEXT = "vocab_size: 30522, context_length: 32, width: 32, heads: 2, mlp_width: 64, token_types: 2"
COMMON = [
    IMAGE, "loader.batch_size=8", "loader.workers=0", "train.steps=6", "train.log_every=1", "train.save_every=2",
    "train.optim.freeze=[]", "train.optim.lr_scale={}", "train.optim.warmup=2", "masking.share=0.4",
]  # fmt: skip
STAGES = {
    "clip": ["model.embed_dim=16", f"model.text={{{TEXT}, layers: 2}}", "start=[]"],
    "vilt": ["model.context_length=32"],
    "albef": [
        "model.embed_dim=16", f"model.text={{{TEXT}, layers: 3, cross_layers: [2], cross_width: 32}}",
        "train.teacher.queue=20",
    ],
    "blip": [
        "model.embed_dim=16",
        f"model.text={{{TEXT.replace('30522', '30524')}, layers: 2, cross_layers: [0, 1], cross_width: 32}}",
        "train.teacher.queue=20",
    ],
    "blip2": [
        "model.embed_dim=16",
        f"model.qformer.text={{{TEXT.replace('30522', '30523')}, layers: 2, cross_layers: [0], cross_width: 32}}",
    ],
}  # fmt: skip


def settings(stage: str, folder: Path, start: Path | None = None, *more: str):
    listed = [*STAGES[stage], *COMMON, f"data={json.dumps([str(folder)])}", "validation=[]"]
    listed += [f"start={json.dumps([str(start)] if start else [])}", *more]
    return load_config(run_kind(stage), named_config(stage, "tiny"), listed)


def curve(run: Path, name: str = "loss") -> dict[int, float]:
    return {line["step"]: line[name] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"}


@pytest.fixture
def clip(folder: Path, tmp_path: Path) -> Path:
    """A run of the first stage, from which the others start."""
    train_stage(settings("clip", folder), tmp_path / "clip", ALONE, progress=False)
    return tmp_path / "clip"


@pytest.mark.parametrize("stage", ["vilt", "albef", "blip", "blip2"])
def test_command_trains_the_stage_from_clip(folder: Path, clip: Path, tmp_path: Path, stage: str) -> None:
    run = tmp_path / stage
    more = [*STAGES[stage], *COMMON, "train.optim.lr=0", f"validation={json.dumps([str(folder)])}"]
    options = ["--data", str(folder), "--out", str(run), "--device", "cpu", "--start", str(clip)]
    result = CliRunner().invoke(app, ["train", stage, *options, *more])
    assert result.exit_code == 0, result.output + str(result.exception)
    taught = {"itc", "itm", "alpha", "teacher_distance"}
    parts = {"vilt": {"itm", "mlm", "wpa"}, "albef": taught | {"mlm"}, "blip": taught | {"lm"}}
    parts["blip2"] = {"itc", "itm", "itg", "itg_accuracy", "scale"}
    lines = read_metrics(run / "metrics.jsonl")
    assert parts[stage] <= {name for line in lines for name in line}
    figures = next(line for line in lines if line["kind"] == "evaluate")
    assert "match_order" in figures and ("recall" in figures) == (stage != "vilt")
    assert ("lm_loss" in figures) == (stage in ("blip", "blip2"))
    model, first = vlm.load(run, device="cpu"), vlm.load(clip, device="cpu")
    assert model.family == stage
    for name, value in first.network.image.state_dict().items():  # with a rate of 0 the start shows
        assert torch.equal(model.network.image.state_dict()[name], value), name
    logits = model.match(model.pixels(folder / "00.png"), model.tokens("a red box"))
    assert logits.shape == (1, 2) and logits.isfinite().all()


@pytest.mark.parametrize("stage", ["vilt", "albef", "blip", "blip2"])
def test_masks_and_partners_dont_depend_on_workers_or_a_break(folder: Path, tmp_path: Path, stage: str) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for run in (whole, cut):
        train_stage(settings(stage, folder, None, "train.save_every=3"), run, ALONE, progress=False)
    forget_last(cut, 6)
    train_stage(read_run_config(stage, cut, ["loader.workers=2"]), cut, ALONE, resume=True, progress=False)
    for name in ("loss", "itm", "itm_accuracy"):
        assert curve(cut, name) == curve(whole, name) and len(curve(cut, name)) == 6


def test_a_q_former_s_images_stay_as_they_were(folder: Path, clip: Path, tmp_path: Path) -> None:
    """By the engine, also after a break: the same hash, no slot in the optimiser's state; all else moves."""
    run, hashes = tmp_path / "run", []

    def look(network: Any) -> dict[str, float]:
        hashes.append((weights_hash(network.image), weights_hash(network.qformer)))
        return {}

    config = settings("blip2", folder, clip, "train.save_every=3", "train.best=''")
    train_stage(config, run, ALONE, evaluate=look, progress=False)
    forget_last(run, 6)
    train_stage(read_run_config("blip2", run), run, ALONE, resume=True, evaluate=look, progress=False)
    before: Any = vlm.load(clip, device="cpu").network
    assert {image for image, _ in hashes} == {weights_hash(before.image)} and len(hashes) == 2
    assert {moved for _, moved in hashes} == {hashes[0][1]} != {weights_hash(begun_network(config).qformer)}  # type: ignore[arg-type]
    state = dcp.FileSystemReader(run / "checkpoints" / "step-00000006" / "state").read_metadata().state_dict_metadata
    assert not [name for name in state if ".image." in name] and [name for name in state if ".qformer." in name]


def two(here, stage: str, folder: str, run: str) -> None:
    train_stage(settings(stage, Path(folder)), Path(run), here, progress=False)


@pytest.mark.parametrize("stage", ["vilt", "albef", "blip", "blip2"])
def test_two_ranks_equal_one(folder: Path, tmp_path: Path, stage: str) -> None:
    train_stage(settings(stage, folder), tmp_path / "one", ALONE, progress=False)
    spawn(two, stage, str(folder), str(tmp_path / "two"))
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), abs=2e-4)


def test_captioner_and_filter_go_on_from_one_blip(folder: Path, tmp_path: Path) -> None:
    """Each with its own losses; the captioner needs no teacher, and is refused one."""
    train_stage(settings("blip", folder), tmp_path / "blip", ALONE, progress=False)
    heads = {"captioner": "[lm]", "filter": "[itc, itm]"}
    for name, listed in heads.items():
        more = [f"model.heads={listed}", "model.prompt_ids=[1037, 3861, 1997]"]
        more += ["train.teacher.decay=0"] if name == "captioner" else []
        train_stage(settings("blip", folder, tmp_path / "blip", *more), tmp_path / name, ALONE, progress=False)
        model = vlm.load(tmp_path / name, device="cpu")
        assert model.can("lm_logits") is (name == "captioner") and model.can("match") is (name == "filter")
    assert {"lm", "lm_accuracy"} <= read_metrics(tmp_path / "captioner" / "metrics.jsonl")[0].keys()
    assert {"itm", "itc", "alpha"} <= read_metrics(tmp_path / "filter" / "metrics.jsonl")[0].keys()
    with pytest.raises(ConfigError, match="blip has no loss with a teacher; set it to 0"):
        train_stage(settings("blip", folder, None, "model.heads=[lm]"), tmp_path / "taught", ALONE, progress=False)


def test_start_tokens_and_prompts_have_their_room(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.dec_id 102 is a word of wordpiece; choose ids from 30522 on"):
        train_stage(settings("blip", folder, None, "model.dec_id=102"), tmp_path / "run", ALONE, progress=False)
    config = settings("blip", folder, None, "model.prompt_ids=[1037, 3861, 1997]", "loader.max_length=0")
    assert make_tokenizer(config).max_length == 29  # of 32


@pytest.mark.parametrize(("stage", "made"), [("albef", albef_reference), ("blip", blip_reference)])
def test_pre_training_goes_on_from_an_official_checkpoint(folder: Path, tmp_path: Path, stage: str, made: Any) -> None:
    """Student, teacher, queue and pointer come along; with a rate of 0 they show in the first checkpoint."""
    path = tmp_path / "official.pth"
    torch.save({"model": made.reference().checkpoint()}, path)
    official = read_official(path, training=True)
    changes = [
        *COMMON[1:], f"data={json.dumps([str(folder)])}", f"start={json.dumps([str(path)])}", "validation=[]",
        "train.optim.lr=0", "train.steps=1", f"train.teacher.queue={QUEUE + 3}",
    ]  # fmt: skip
    recipe = load_config(run_kind(stage), named_config(stage, "tiny"), changes)
    config = RunConfig(**{**vars(recipe), "model": official.config})
    with pytest.raises(ConfigError, match=f"train.teacher.queue is {QUEUE + 3}"):
        train_stage(config, tmp_path / "run", ALONE, progress=False)
    fitting = load_config(run_kind(stage), named_config(stage, "tiny"), [*changes, f"train.teacher.queue={QUEUE}"])
    train_stage(RunConfig(**{**vars(fitting), "model": official.config}), tmp_path / "run", ALONE, progress=False)
    student = vlm.load(tmp_path / "run", device="cpu").network.state_dict()
    assert all(torch.equal(student[name], value) for name, value in official.network.items())
    queue = {"image": torch.zeros_like(official.training.image_queue), "pointer": torch.zeros(1, dtype=torch.int64)}
    name = next(iter(official.training.teacher))
    held = {"queue": queue, "teacher": {name: torch.zeros_like(official.training.teacher[name])}}
    dcp.load(held, checkpoint_id=tmp_path / "run" / "checkpoints" / "step-00000001" / "state", no_dist=True)
    # A batch of 8 overwrites all of a queue of 6; where it ends follows from the official pointer.
    assert int(queue["pointer"]) == (official.training.pointer + 8) % QUEUE and queue["image"].any()
    moved = official.training.teacher[name].lerp(official.network[name], 1 - fitting.train.teacher.decay)
    torch.testing.assert_close(held["teacher"][name], moved)


def going_on(here, path: str, folder: str, run: str) -> None:
    """A step at rate 0 from an official checkpoint; the teacher is a hundredth nearer to the student after it."""
    official = read_official(Path(path))
    changes = [
        *COMMON[1:], f"data={json.dumps([folder])}", f"start={json.dumps([path])}", "validation=[]", "train.optim.lr=0",
        "train.steps=1", f"train.teacher.queue={QUEUE}", "train.parallel=fsdp",
    ]  # fmt: skip
    fitting = load_config(run_kind("albef"), named_config("albef", "tiny"), changes)
    train_stage(RunConfig(**{**vars(fitting), "model": official.config}), Path(run), here, progress=False)


def test_a_sharded_teacher_goes_on_from_an_official_checkpoint(folder: Path, tmp_path: Path) -> None:
    path, run = tmp_path / "ALBEF.pth", tmp_path / "run"
    torch.save({"model": reference().checkpoint()}, path)
    official = read_official(path, training=True)
    spawn(going_on, str(path), str(folder), str(run))
    held = {"teacher": {name: torch.zeros_like(value) for name, value in official.training.teacher.items()}}
    dcp.load(held, checkpoint_id=run / "checkpoints" / "step-00000001" / "state", no_dist=True)
    for name, value in official.training.teacher.items():
        moved = value.lerp(official.network[name], 1 - 0.995)
        torch.testing.assert_close(held["teacher"][name], moved, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("vilt", ["train.teacher.decay=0.9"], "vilt has no loss with a teacher"),
        ("clip", ["train.teacher.decay=0.9"], "clip has no loss with a teacher"),
        ("vilt", ["model.itm_weight=0", "model.mlm_weight=0", "model.wpa_weight=0"], "nothing to learn"),
        ("vilt", ["model.heads=[rank]"], "losses and their weights are none"),
        ("vilt", ["model.itm_weight=-1"], "must be at least 0"),
        ("vilt", ["model.context_length=0"], "context_length 0: a text has at least 2 tokens"),
        ("albef", ["model.embed_dim=0"], "embed_dim must be at least 1"),
        ("albef", ["tokenizer=clip_bpe", "model.text.vocab_size=49408"], r"needs a tokenizer with \[MASK\]"),
    ],
)
def test_runs_that_would_learn_nothing_of_it_are_refused(
    folder: Path, tmp_path: Path, stage: str, changes: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train_stage(settings(stage, folder, None, *changes), tmp_path / "run", ALONE, progress=False)
    assert not (tmp_path / "run").exists()


def test_frozen_parts_that_no_start_gives_weights_are_refused(
    folder: Path, clip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    frozen = "train.optim.freeze=[text.layers.0., image.]"
    train_stage(settings("vilt", folder, clip), tmp_path / "vilt", ALONE, progress=False)
    for start in (tmp_path / "vilt", None):
        with pytest.raises(WeightsError, match=r"\d+ matrices are frozen .*train\.optim\.freeze=\[\]") as refused:
            train_stage(settings("albef", folder, start, frozen), tmp_path / "albef", ALONE, progress=False)
        assert str(refused.value).startswith(f"start {start or '(none)'}: ")
        first = str(refused.value).split("weights, ")[1].split(",")[0]
        assert first.startswith("image." if start is None else "text.layers.0.")
    assert not (tmp_path / "albef").exists()
    both = f"start={json.dumps([str(clip), str(tmp_path / 'vilt')])}"
    train_stage(settings("albef", folder, clip, frozen, both), tmp_path / "albef", ALONE, progress=False)
    caplog.clear()
    train_stage(settings("blip2", folder, None, "train.steps=1"), tmp_path / "blip2", ALONE, progress=False)
    assert "would stay random" in caplog.text  # what the stage itself freezes, with no start at all


def test_a_run_that_starts_from_nothing_says_so(folder: Path, tmp_path: Path) -> None:
    data = ["--data", str(folder), "--device", "cpu"]
    for stage, told in (("albef", True), ("clip", False)):
        more = [*STAGES[stage], *COMMON, "start=[]", "validation=[]", "train.steps=1"]
        result = CliRunner().invoke(app, ["train", stage, "--out", str(tmp_path / stage), *data, *more])
        assert result.exit_code == 0, result.output + str(result.exception)
        assert ("nothing to start from: all that is trained begins as random numbers" in result.stderr) == told
        assert ("--start takes a CLIP's" in result.stderr) == told


def test_a_loss_alone_trains(folder: Path, tmp_path: Path) -> None:
    """ViLT by MLM alone; ALBEF without MLM, whose tokenizer then needs no [MASK]."""
    alone = settings("vilt", folder, None, "model.heads=[mlm]", "model.mlm_weight=0.1")
    train_stage(alone, tmp_path / "vilt", ALONE, progress=False)
    assert len(curve(tmp_path / "vilt", "mlm")) == 6
    line = read_metrics(tmp_path / "vilt" / "metrics.jsonl")[0]
    assert not {"itm", "wpa"} & set(line) and line["loss"] == pytest.approx(0.1 * line["mlm"])
    text = "model.text.vocab_size=49408"
    without = settings("albef", folder, None, "model.mlm_weight=0", "tokenizer=clip_bpe", text)
    train_stage(without, tmp_path / "albef", ALONE, progress=False)
    assert "mlm" not in read_metrics(tmp_path / "albef" / "metrics.jsonl")[0]


def test_a_run_of_another_stage_is_not_resumed(folder: Path, tmp_path: Path) -> None:
    train_stage(settings("vilt", folder), tmp_path / "vilt", ALONE, progress=False)
    with pytest.raises(ConfigError, match="a run of vilt, not of albef"):
        read_run_config("albef", tmp_path / "vilt")
    with pytest.raises(ConfigError, match="unknown key rate"):
        read_run_config("vilt", tmp_path / "vilt", ["train.rate=1"])


def test_shuffled_texts_are_a_share_and_foreign() -> None:
    found = shuffled_texts(1000, 0.2, seed=3)
    assert len(found) == 200 and sorted(found) == sorted(found.values())
    assert all(number != other for number, other in found.items())
    assert found == shuffled_texts(1000, 0.2, seed=3) != shuffled_texts(1000, 0.2, seed=4)
    assert shuffled_texts(1000, 0.0, seed=3) == {}


def test_a_share_that_is_none_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"loader\.shuffled"):
        settings("albef", folder, None, "loader.shuffled=1.0")
