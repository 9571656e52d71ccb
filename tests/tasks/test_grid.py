"""A grid of runs: what is finished stays, what was broken off goes on, other settings are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.tasks.fused import fused_model
from vlm.data.augment import Augment
from vlm.data.captions import CaptionVariation
from vlm.errors import ConfigError, DataError
from vlm.tasks.reproduce import albef, blip, blip2, grid
from vlm.tasks.reproduce.albef import MEASURES, VARIANTS, cells_of, reproduce_albef
from vlm.tasks.reproduce.albef import measure as measure_albef
from vlm.tasks.reproduce.grid import (
    PLACE,
    REFERENCE,
    RESULT,
    WHOLE,
    Cell,
    as_table,
    read_results,
    run_grid,
    table_values,
)
from vlm.tasks.reproduce.recipe import recipe_values
from vlm.train.config import load_config, named_config
from vlm.train.run import run_kind

CELLS = [Cell("plain", "0% shuffled", ()), Cell("+ MoD", "0% shuffled", ("train.teacher.alpha=0",))]
RECIPE = ("train.steps=3",)


class Cut(Exception):
    """Ends a grid in the middle."""


class Trained:
    """In place of training: notes the runs and leaves checkpoints behind."""

    def __init__(self, stop_at: int = -1) -> None:
        self.runs: list[str] = []
        self.stop_at = stop_at

    def __call__(self, stage: str, run: Path, settings: list[str], device: str) -> None:
        if len(self.runs) == self.stop_at:
            raise Cut
        (run / "checkpoints" / "step-00000003").mkdir(parents=True)
        self.runs.append(run.name)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trained]:
    def put(**settings: int) -> Trained:
        made = Trained(**settings)
        monkeypatch.setattr(grid, "_train", made)
        return made

    return put


def measure(run: Path) -> dict[str, float]:
    return {"recall": 0.5 if "mod" in run.name else 0.1 * (1 + int(run.name[-1]))}


def call(out: Path, **more: Any) -> list[dict[str, Any]]:
    given: dict[str, Any] = {"seeds": [0, 1], "recipe": RECIPE, "out": out, "measure": measure}
    return run_grid("albef", CELLS, **given | more)


def test_every_cell_with_every_seed_and_a_table_after_each(trained: Callable[..., Trained], tmp_path: Path) -> None:
    runs, counts = trained(), []
    found = call(tmp_path, after=lambda results: counts.append(len(results)))
    names = ["plain-0-shuffled-seed-0", "mod-0-shuffled-seed-0", "plain-0-shuffled-seed-1", "mod-0-shuffled-seed-1"]
    assert runs.runs == names and counts == [1, 2, 3, 4]  # seed by seed
    assert [json.loads((tmp_path / name / RESULT).read_text("utf-8")) for name in names] == found
    assert not list(tmp_path.glob("*/checkpoints"))
    assert found[1]["settings"] == ["train.steps=3", "train.teacher.alpha=0", "train.seed=0"]


def test_a_broken_grid_goes_on_and_makes_nothing_twice(trained: Callable[..., Trained], tmp_path: Path) -> None:
    first = trained(stop_at=3)
    with pytest.raises(Cut):
        call(tmp_path)
    second = trained()
    found = call(tmp_path, seeds=[0, 1, 1])
    assert len(first.runs) == 3 and second.runs == ["mod-0-shuffled-seed-1"]
    assert [(one["row"], one["seed"]) for one in found] == [("plain", 0), ("+ MoD", 0), ("plain", 1), ("+ MoD", 1)]


def test_known_results_count_as_finished_and_stay(trained: Callable[..., Trained], tmp_path: Path) -> None:
    trained()
    known = call(tmp_path / "elsewhere", seeds=[0, 7])
    again, written = trained(), []
    found = call(tmp_path / "here", known=known, after=written.append)
    assert again.runs == ["plain-0-shuffled-seed-1", "mod-0-shuffled-seed-1"]
    assert len(found) == 4 and found[:2] == known[:2]
    assert [one["seed"] for one in written[0]] == [0, 0, 7, 7]  # no known result is lost, none is told twice
    assert [one["seed"] for one in written[-1]] == [0, 0, 1, 1, 7, 7]


def test_a_known_result_stands_for_its_own_cell_alone(trained: Callable[..., Trained], tmp_path: Path) -> None:
    """Cells that were prepared otherwise may have the same settings."""
    cells = [Cell(row, "prepared", ()) for row in ("one", "two")]
    more = {"seeds": [0], "recipe": RECIPE, "measure": measure}
    trained()
    known = run_grid("albef", cells[:1], out=tmp_path / "there", **more)  # type: ignore[arg-type]
    again = trained()
    found = run_grid("albef", cells, out=tmp_path / "here", known=known, **more)  # type: ignore[arg-type]
    assert again.runs == ["two-prepared-seed-0"] and [one["row"] for one in found] == ["one", "two"]


def test_each_result_says_where_it_was_made(
    trained: Callable[..., Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained()
    first, second = ({"python": "3", "machine": {"system": name}} for name in ("Linux", "Darwin"))
    monkeypatch.setattr(grid, "surroundings", lambda: first)
    known = call(tmp_path / "there", seeds=[0])
    monkeypatch.setattr(grid, "surroundings", lambda: second)
    unplaced = {name: value for name, value in call(tmp_path / "before", seeds=[7])[0].items() if name != PLACE}
    found = call(tmp_path / "here", known=known)
    assert [one[PLACE] for one in found] == [first, first, second, second]
    values = table_values([*found, unplaced])
    assert values[PLACE] == [first, second] and values[WHOLE] == [recipe_values("albef", RECIPE, {})]
    assert [one.get(PLACE) for one in values["results"]] == [0, 0, 1, 1, None]
    (tmp_path / "table.json").write_text(json.dumps(values))
    assert read_results(tmp_path / "table.json") == [*found, unplaced]


def test_a_table_from_before_results_had_places(tmp_path: Path) -> None:
    """Its own place is that of all its results; what stands in the repository is still known, every run of it."""
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "reproduce-albef.json"
    values = json.loads(path.read_text("utf-8"))
    found = read_results(path)
    assert len(found) == len(values["results"]) and all(one[PLACE]["machine"]["cores"] for one in found)
    place = {name: values.get(name, found[0][PLACE][name]) for name in ("packages", "python", "machine")}
    rows = [{name: value for name, value in one.items() if name not in (PLACE, WHOLE)} for one in found]
    (tmp_path / "old.json").write_text(json.dumps({"command": "vlm", **place, "results": rows}))
    assert read_results(tmp_path / "old.json") == [one | {PLACE: place} for one in rows]


@pytest.mark.parametrize("what", [PLACE, WHOLE])
@pytest.mark.parametrize("place", [3, "here", None])
def test_a_place_or_a_recipe_that_isn_t_listed_is_refused(tmp_path: Path, what: str, place: Any) -> None:
    one = {"row": "a", "column": "b", "seed": 0, "settings": [], "figures": {}, what: place}
    (tmp_path / "table.json").write_text(json.dumps({what: [{}], "results": [one]}))
    with pytest.raises(DataError, match="no results of runs"):
        read_results(tmp_path / "table.json")


@pytest.mark.parametrize("change", [{"recipe": ("train.steps=4",)}, {"cells": ("model.mlm_weight=0",)}])
def test_results_of_other_settings_are_refused(
    trained: Callable[..., Trained], tmp_path: Path, change: dict[str, tuple[str, ...]]
) -> None:
    trained()
    known = call(tmp_path, seeds=[0])
    cells = [Cell(cell.row, cell.column, change.get("cells", cell.changes)) for cell in CELLS]
    more = {"seeds": [1], "recipe": change.get("recipe", RECIPE), "measure": measure}
    with pytest.raises(ConfigError, match=r"'plain', '0% shuffled', seed 0 was made with other settings .*--table"):
        run_grid("albef", cells, out=tmp_path / "other", known=known, **more)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="plain-0-shuffled-seed-0: was made with other settings"):
        run_grid("albef", cells, out=tmp_path, **more | {"seeds": [0]})  # type: ignore[arg-type]


def test_results_of_another_tiny_recipe_are_refused(trained: Callable[..., Trained], tmp_path: Path) -> None:
    """The same options mean something else once the file behind them has changed; the setting is named."""
    trained()
    before = recipe_values("albef", RECIPE, {}) | {"train.optim.lr": 3e-3}
    known = [one | {WHOLE: before} for one in call(tmp_path, seeds=[0])]
    with pytest.raises(ConfigError, match=r"other settings \(train\.optim\.lr was 0\.003 and is 0\.001\)"):
        call(tmp_path / "other", known=known)
    (tmp_path / "plain-0-shuffled-seed-0" / RESULT).write_text(json.dumps(known[0]))
    with pytest.raises(ConfigError, match=r"other settings \(train\.optim\.lr was 0\.003 and is 0\.001\)"):
        call(tmp_path, seeds=[0])


def test_what_was_prepared_otherwise_is_refused(trained: Callable[..., Trained], tmp_path: Path) -> None:
    trained()
    known = call(tmp_path / "there", seeds=[0], prepared={"tuning": ["train.steps=5"]})
    with pytest.raises(ConfigError, match=r"prepared\.tuning was \['train.steps=5'\] and is \['train.steps=6'\]"):
        call(tmp_path / "here", known=known, prepared={"tuning": ["train.steps=6"]})


def test_settings_that_have_come_since_are_no_other_recipe(trained: Callable[..., Trained], tmp_path: Path) -> None:
    trained()
    known = call(tmp_path / "there", seeds=[0])
    for one in known:
        one[WHOLE] = {name: value for name, value in one[WHOLE].items() if name != "model.image.final_norm_eps"}
    again = trained()
    assert call(tmp_path / "here", known=known, seeds=[0]) == known and not again.runs


@pytest.mark.parametrize("name", ["albef", "blip", "blip2"])
def test_the_repositorys_tables_can_be_gone_on_with(
    trained: Callable[..., Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """With the precision that they were made in; no run of theirs is made again."""
    known = read_results(Path(__file__).parents[2] / "benchmarks" / "results" / f"reproduce-{name}.json")
    again, stage = trained(), {"albef": albef, "blip": blip, "blip2": blip2}[name]
    for ways in ("measure", "_prepare"):
        monkeypatch.setattr(stage, ways, lambda *given: {} if len(given) < 4 else [], raising=False)
    made = {(one["row"], one["column"], one["seed"]) for one in known}
    assert all(len(one[WHOLE]) > 90 for one in known if not one.get(REFERENCE))
    second = partial(blip2.reproduce_blip2, sizes=blip2.Sizes(100, 100, 48, 16, 100))
    run: Any = {"albef": reproduce_albef, "blip": blip.reproduce_blip, "blip2": second}[name]
    found = run(tmp_path, precision="bf16" if name == "albef" else "fp32", known=known)
    assert len(again.runs) == len(found) - len(made) and len(found) >= len(made)


def test_a_run_that_was_begun_with_other_settings_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "plain-0-shuffled-seed-0"
    run.mkdir()
    from vlm.train.config import load_config, named_config, to_yaml
    from vlm.train.run import run_kind

    begun = load_config(run_kind("albef"), named_config("albef", "tiny"), ["train.steps=9"])
    (run / "config.yaml").write_text(to_yaml(begun))
    with pytest.raises(ConfigError, match="was begun with other settings"):
        call(tmp_path)


@pytest.mark.parametrize("text", ["[]", "no json", '{"results": [{"row": "a"}]}', '{"results": 3}', '{"a": 1}'])
def test_files_of_something_else_are_named(trained: Callable[..., Trained], tmp_path: Path, text: str) -> None:
    trained()
    run = tmp_path / "plain-0-shuffled-seed-0"
    run.mkdir()
    (run / RESULT).write_text(text)
    with pytest.raises(DataError, match=r"result\.json: no results of runs"):
        call(tmp_path)


def test_a_value_of_another_kind_is_named(tmp_path: Path) -> None:
    one = {"row": "a", "column": "b", "seed": 0, "settings": "none", "figures": {}}
    (tmp_path / "table.json").write_text(json.dumps({"results": [one]}))
    with pytest.raises(DataError, match="settings of a result isn't a list"):
        read_results(tmp_path / "table.json")


def test_a_recipe_of_another_kind_is_named(tmp_path: Path) -> None:
    one = {"row": "a", "column": "b", "seed": 0, "settings": [], "figures": {}, WHOLE: 0}
    (tmp_path / "table.json").write_text(json.dumps({WHOLE: ["f00a15dae2c79003"], "results": [one]}))
    with pytest.raises(DataError, match="recipe of a result isn't a dict"):
        read_results(tmp_path / "table.json")


def test_the_table_by_hand() -> None:
    def result(row: str, seed: int, **figures: float) -> dict[str, Any]:
        return {"row": row, "column": "clean", "seed": seed, "settings": [], "figures": figures}

    results = [result("a", 0, r=0.1), result("b", 0, r=0.4, s=0.25), result("a", 1, r=0.2), result("a", 2, r=0.3)]
    table = as_table(results, {"r": "R@1", "s": "S"}).splitlines()
    assert table[0] == "| setting | data | seeds | R@1 | S |"
    # 10, 20, 30: mean 20, standard error 10 / sqrt(3), times 4.303.
    assert table[2] == "| a | clean | 3 | 20.0 [-4.8, 44.8] | - |"
    assert table[3] == "| b | clean | 1 | 40.0 | 25.0 |"
    results = [result("a", 0, r=0.1, n=2_460_000.0), result("c", 0, r=0.5) | {REFERENCE: True}]
    table = as_table(results, {"r": "R@1"}, column="of", counts={"n": "n, M"}).splitlines()
    assert [table[0], *table[2:]] == [
        "| setting | of | seeds | R@1 | n, M |", "| a | clean | 1 | 10.0 | 2.5 |", "| c | clean | - | 50.0 | - |",
    ]  # fmt: skip


def test_albefs_grid(trained: Callable[..., Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = trained()
    monkeypatch.setattr("vlm.tasks.reproduce.albef.measure", lambda run, device: {"match_order": 0.5})
    found = reproduce_albef(tmp_path, seeds=[3], noise=[0.0, 0.2, 0.2], steps=20)
    assert len(runs.runs) == len(found) == 2 * len(VARIANTS)
    assert {one["column"] for one in found} == {"0% shuffled", "20% shuffled"}
    assert all("loader.shuffled=0.2" in one["settings"] for one in found if one["column"].startswith("20"))
    for wrong in ({"seeds": []}, {"noise": []}, {"noise": [1.0]}, {"noise": [-0.1]}):
        with pytest.raises(ConfigError, match="at least one seed, and at least one share"):
            reproduce_albef(tmp_path, **wrong)  # type: ignore[arg-type]
    config: Any = load_config(run_kind("albef"), named_config("albef", "tiny"), found[0]["settings"])
    recipe: Any = load_config(run_kind("albef"), named_config("albef", "tiny"), [])
    assert config.train.optim.freeze == ("image.", *recipe.train.optim.freeze)
    assert config.train.steps == 20 and config.train.seed == 3 and config.validation == ()
    assert config.loader.captions == CaptionVariation() and config.loader.augment == Augment()


def test_variants_are_what_they_are_called() -> None:
    configs: dict[str, Any] = {
        cell.row: load_config(run_kind("albef"), named_config("albef", "tiny"), list(cell.changes))
        for cell in cells_of([0.4])
    }
    found = {
        row: (c.model.itc_weight, c.model.negatives, c.train.teacher.decay > 0, c.train.teacher.alpha > 0)
        for row, c in configs.items()
    }
    assert found == {
        "ITM + MLM": (0.0, "random", False, True),  # alpha of a teacher that isn't there
        "+ ITC": (1.0, "random", True, False),
        "+ hard negatives": (1.0, "hard", True, False),
        "+ MoD": (1.0, "hard", True, True),
    }
    assert {(c.model.itm_weight, c.model.mlm_weight, c.loader.shuffled) for c in configs.values()} == {(1.0, 0.1, 0.4)}


def test_measured_is_what_the_table_shows(tmp_path: Path) -> None:
    fused_model().save(tmp_path / "model")
    found = measure_albef(tmp_path / "model", "cpu")
    assert set(MEASURES) <= set(found) and all(0 <= value <= 1 for value in found.values())
    assert found["itm_text_to_image_r1"] < 0.2  # of random weights among 50
