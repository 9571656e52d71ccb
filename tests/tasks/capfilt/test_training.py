"""CapFilt's trainings: what each learns, from what it starts, and that a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import vlm
from tests.tasks.capfilt.small import ALONE, HERE, content, med, settings
from vlm.errors import ConfigError
from vlm.tasks.capfilt.run import run_capfilt
from vlm.tasks.capfilt.training import pretraining, train_once, tuning
from vlm.train.metrics import read_metrics


def losses(run: Path) -> set[str]:
    return {name for line in read_metrics(run / "metrics.jsonl") for name in line} & {"itc", "itm", "lm"}


def test_both_begin_as_the_same_model_and_learn_their_own_losses(tmp_path: Path) -> None:
    med().save(tmp_path / "med")
    given: dict[str, Any] = {"captioner": "", "judge": "", "model": str(tmp_path / "med")}
    config = settings(tmp_path, **given, tune=("train.steps=1", "train.optim.lr=0", "train.teacher.decay=0.9"))
    result = run_capfilt(config, tmp_path / "out", ALONE, how=HERE)
    first = vlm.load(tmp_path / "med", device="cpu").network.state_dict()
    for part, learnt in (("captioner", {"lm"}), ("filter", {"itc", "itm"})):
        state = vlm.load(tmp_path / "out" / part, device="cpu").network.state_dict()
        assert all(torch.equal(state[name], value) for name, value in first.items())  # with a rate of 0 the start shows
        assert losses(tmp_path / "out" / part) == learnt
    assert result.model == tmp_path / "out" / "pretrained" / "model"
    assert losses(tmp_path / "out" / "pretrained") == {"itc", "itm", "lm"}
    new = vlm.load(result.model, device="cpu").network.state_dict()
    assert not torch.equal(new["text.tokens.weight"], first["text.tokens.weight"])
    before = content(tmp_path / "out")
    again = run_capfilt(config, tmp_path / "out", ALONE, how=HERE)  # everything is there
    assert again == result and content(tmp_path / "out") == before
    with pytest.raises(ConfigError, match=r"the new model .*\n  training\.train\.steps: 2 before, 3 now"):
        changed = settings(tmp_path, **given, tune=config.tune, pretrain=("train.steps=3",))
        run_capfilt(changed, tmp_path / "out", ALONE, how=HERE)
    with pytest.raises(ConfigError, match=r"  training\.captioner\.train\.steps: 1 before, 2 now"):
        changed = settings(tmp_path, **given, tune=("train.steps=2", *config.tune[1:]))
        run_capfilt(changed, tmp_path / "out", ALONE, how=HERE)
    med(5).save(tmp_path / "med")
    with pytest.raises(ConfigError, match="  model: "):
        run_capfilt(config, tmp_path / "out", ALONE, how=HERE)


def test_weights_of_the_losses_are_the_configurations(tmp_path: Path) -> None:
    config = settings(tmp_path, tune=("model.lm_weight=0.7", "model.itm_weight=2", "train.teacher.decay=0.9"))
    captioner, judge = (tuning(config, part, med(), tmp_path / "start") for part in ("captioner", "filter"))  # type: ignore[arg-type]
    assert (captioner.model.itc_weight, captioner.model.itm_weight, captioner.model.lm_weight) == (0, 0, 0.7)
    assert (judge.model.itc_weight, judge.model.itm_weight, judge.model.lm_weight) == (1, 2, 0)
    assert captioner.train.teacher.decay == 0 and judge.train.teacher.decay == 0.9
    assert captioner.data == judge.data == config.human
    with pytest.raises(ConfigError, match=r"the filter is trained with model\.itc_weight, model\.itm_weight"):
        tuning(settings(tmp_path, tune=("model.itm_weight=0",)), "filter", med(), tmp_path / "start")


def test_a_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    config = pretraining(settings(tmp_path), tmp_path / "human")
    longer = pretraining(settings(tmp_path, pretrain=("train.steps=3",)), tmp_path / "human")
    train_once(config, tmp_path / "cut", ALONE)
    (tmp_path / "cut" / "model").rename(tmp_path / "gone")
    train_once(longer, tmp_path / "cut", ALONE)
    steps = [line["step"] for line in read_metrics(tmp_path / "cut" / "metrics.jsonl") if line["kind"] == "train"]
    assert steps == [1, 2, 3]
