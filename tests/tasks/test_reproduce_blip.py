"""BLIP's ablation: what its sets, models and figures are; nothing is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tasks.fused import med_model
from vlm.errors import ConfigError
from vlm.tasks.capfilt.run import Result
from vlm.tasks.capfilt.settings import CapfiltConfig
from vlm.tasks.reproduce import blip
from vlm.tasks.reproduce.blip import BOTH, MEASURES, SETS, Sizes, cells, measure, reproduce_blip
from vlm.train.config import load_config, named_config
from vlm.train.run import run_kind


def test_sets_are_what_they_are_called() -> None:
    start = CapfiltConfig(("web",), ("human",), model="med")
    found = {
        one.name: (c.synthetic, c.filtering, c.generation.strategy if c.synthetic else "")
        for one, c in ((one, one.config(start)) for one in SETS)
    }
    assert found == {
        "none": (False, False, ""),
        "filter": (False, True, ""),
        "captioner (beam)": (True, False, "beam"),
        "captioner (nucleus)": (True, False, "nucleus"),
        "captioner (beam) + filter": (True, True, "beam"),
        "captioner (nucleus) + filter": (True, True, "nucleus"),
    }


def test_the_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each seed has one MED, captioner and filter for all sets; each model is trained on its row's set."""
    made: list[tuple[str, CapfiltConfig]] = []
    trained: dict[str, list[str]] = {}
    first: list[Path] = []

    def rewrite(config: CapfiltConfig, out: Path, here: Any, *, how: Any, pretrain: bool) -> Result:
        assert not pretrain
        made.append((out.name, config))
        return Result({}, out / "data", None)

    def train(stage: str, run: Path, settings: list[str], device: str) -> None:
        run.mkdir(parents=True)
        trained[run.name] = settings

    monkeypatch.setattr(blip, "run_capfilt", rewrite)
    monkeypatch.setattr(blip, "train_once", lambda config, run, here: first.append(run))
    monkeypatch.setattr(blip, "measure", lambda run, device: {"cider": 0.5})
    monkeypatch.setattr("vlm.tasks.reproduce.grid._train", train)
    found = reproduce_blip(tmp_path, seeds=[4], sizes=Sizes(30, 20), device="cpu")
    assert len(found) == len(trained) == len(cells()) == 8
    assert {run.relative_to(tmp_path).as_posix() for run in first} == {"seed-4/med"}
    sources = {
        "none": "captioner-nucleus-filter", "filter": "captioner-nucleus-filter",
        "captioner-nucleus": "captioner-nucleus-filter", "captioner-beam": "captioner-beam-filter",
    }  # fmt: skip
    for place, (name, config) in enumerate(made):
        own = name == "captioner-nucleus-filter"
        assert config.seed == 4 and "train.steps=20" in config.tune
        assert Path(config.judged).name == sources.get(name, "")
        assert not config.judged or sources[name] in [before for before, _ in made[:place]]
        assert bool(config.model) is (name not in sources)
        assert bool(config.captioner) is bool(config.judge) is (name == "captioner-beam-filter")
        assert own or not config.captioner or config.captioner.endswith("captioner-nucleus-filter/captioner")
    assert {name for name, _ in made} == {*sources, *sources.values()}
    data = {run: json.loads(settings[-1].removeprefix("data="))[0] for run, settings in trained.items()}
    assert data["none-capfilt-seed-4"].endswith("seed-4/capfilt/none/data")
    assert data["filter-capfilt-seed-4"].endswith("capfilt/filter/data")
    shared = {run: where for run, where in data.items() if run.startswith("shared")}
    assert len(shared) == 2 and all(place.endswith("captioner-nucleus-filter/data") for place in shared.values())
    for settings in trained.values():  # settings that there are
        config: Any = load_config(run_kind("blip"), named_config("blip", "tiny"), settings)
        assert config.train.steps == 30 and config.train.seed == 4
    assert all(not any(part.startswith("data=") for part in one["settings"]) for one in found)


@pytest.mark.parametrize("wrong", [{"seeds": []}, {"sizes": Sizes(0, 1)}, {"sizes": Sizes(1, 0)}])
def test_nothing_to_train_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="at least one seed and one step"):
        reproduce_blip(tmp_path, **wrong)
    assert not list(tmp_path.iterdir())


def test_measured_is_what_the_table_shows(tmp_path: Path) -> None:
    med_model().save(tmp_path / "model")
    found = measure(tmp_path / "model", "cpu")
    assert set(MEASURES) <= set(found)
    assert found["itm_text_to_image_r1"] < 0.2 and 0 <= found["cider"] < 0.5  # of random weights
    assert BOTH.name in {cell.column for cell in cells()}
