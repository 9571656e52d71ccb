"""CapFilt's trainings: what each learns, from what it starts, and that a run goes on."""

from __future__ import annotations

from dataclasses import replace
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


def began_as(name: str, first: dict[str, torch.Tensor]) -> str:
    """What a tensor of the captioner, whose one text transformer is a decoder, was called in the MED."""
    whole = name.replace("decoder.", "text.", 1)
    routed = whole.replace(".self_attn.text.", ".self_attn.decoder.").replace(".self_norm.", ".route_norm.decoder.")
    return routed if name.startswith("decoder.") and routed in first else whole


def test_both_begin_as_the_same_model_and_learn_their_own_losses(tmp_path: Path) -> None:
    med().save(tmp_path / "med")
    given: dict[str, Any] = {"captioner": "", "judge": "", "model": str(tmp_path / "med")}
    config = settings(tmp_path, **given, tune=("train.steps=1", "train.optim.lr=0", "train.teacher.decay=0.9"))
    result = run_capfilt(config, tmp_path / "out", ALONE, how=HERE)
    first = vlm.load(tmp_path / "med", device="cpu").network.state_dict()
    for part, learnt in (("captioner", {"lm"}), ("filter", {"itc", "itm"})):
        state = vlm.load(tmp_path / "out" / part, device="cpu").network.state_dict()
        # With a rate of 0 the start shows.
        assert all(torch.equal(value, first[began_as(name, first)]) for name, value in state.items())
        assert losses(tmp_path / "out" / part) == learnt
    assert result.model == tmp_path / "out" / "pretrained" / "model"
    assert losses(tmp_path / "out" / "pretrained") == {"itc", "itm", "lm"}
    new = vlm.load(result.model, device="cpu").network.state_dict()
    assert not torch.equal(new["text.tokens.weight"], first["text.tokens.weight"])
    assert result.report["filter"]["trained_on"]
    assert "which it was fine-tuned on" in (tmp_path / "out" / "report.md").read_text()
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


def test_how_they_learn_is_the_configurations_and_what_they_are_the_models(tmp_path: Path) -> None:
    more = ("model.lm_weight=0.7", "model.itm_weight=2", "train.teacher.decay=0.9", "model.embed_dim=8")
    config = settings(tmp_path, tune=(*more, "train.best=match_order"))
    captioner, judge = (tuning(config, part, med(), tmp_path / "start") for part in ("captioner", "filter"))  # type: ignore[arg-type]
    assert captioner.model.heads == ("lm",) and judge.model.heads == ("itc", "itm")
    assert (captioner.model.lm_weight, judge.model.itc_weight, judge.model.itm_weight) == (0.7, 1, 2)
    assert captioner.train.teacher.decay == 0 and judge.train.teacher.decay == 0.9
    assert captioner.data == judge.data == config.human and judge.model.embed_dim == 16
    assert judge.validation == () and judge.train.best == ""
    measured = tuning(replace(config, check=config.human), "filter", med(), tmp_path / "start")
    assert measured.validation == config.human and measured.train.best == "match_order"
    with pytest.raises(ConfigError, match=r"the filter learns by itc and itm: set model\.itm_weight above 0"):
        tuning(settings(tmp_path, tune=("model.itm_weight=0",)), "filter", med(), tmp_path / "start")


def test_a_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    config = pretraining(settings(tmp_path), tmp_path / "human")
    longer = pretraining(settings(tmp_path, pretrain=("train.steps=3",)), tmp_path / "human")
    train_once(config, tmp_path / "cut", ALONE)
    (tmp_path / "cut" / "model").rename(tmp_path / "gone")
    train_once(longer, tmp_path / "cut", ALONE)
    steps = [line["step"] for line in read_metrics(tmp_path / "cut" / "metrics.jsonl") if line["kind"] == "train"]
    assert steps == [1, 2, 3]
