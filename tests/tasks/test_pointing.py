"""The pointing game on made heat, and its collages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tasks.fused import fused_model, pair_model
from tests.tasks.small import COLOURS, colour_model, plain, random_model
from tests.tasks.test_retrieval import captioned
from vlm.errors import ConfigError, DataError, MissingVerbError
from vlm.tasks import pointing
from vlm.tasks.explain import Explanation
from vlm.tasks.pointing import collage_picture, draw_collages, evaluate_pointing, point, random_weights

PERFECT = np.array([[1.0, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])


@pytest.fixture
def source(tmp_path: Path) -> Any:
    return captioned(tmp_path / "set", [(plain(name, 16), name, name) for name in COLOURS] * 2)


def test_made_heat() -> None:
    assert point(PERFECT, 0) == (True, 1.0)
    assert [point(PERFECT, other) for other in (1, 2, 3)] == [(False, 0.0)] * 3
    assert point(PERFECT[::-1], 2) == (True, 1.0) and point(PERFECT[:, ::-1], 1) == (True, 1.0)
    hit, part = point(1 - PERFECT, 0)
    assert not hit and part == pytest.approx(1.5 / 13.5)


def test_ties_count_against() -> None:
    assert point(np.ones((4, 4)), 2) == (False, 0.25)
    assert point(np.zeros((4, 4)), 2) == (False, 0.0)
    assert point(np.full((4, 4), np.nan), 2) == (False, 0.0)
    twice = PERFECT.copy()
    twice[3, 3] = 1.0
    assert not point(twice, 0)[0] and not point(twice, 3)[0]


def test_an_odd_grid_is_cut_through_its_middle() -> None:
    middle = np.zeros((3, 3))
    middle[1, 1] = 1.0
    assert [point(middle, target) for target in range(4)] == [(False, 0.25)] * 4
    middle[0, 0] = 2.0
    assert point(middle, 0) == (True, pytest.approx((2 + 0.25) / 3))


def test_collages(source: Any) -> None:
    drawn = draw_collages(source, 60, seed=0)
    assert drawn == draw_collages(source, 60, seed=0) != draw_collages(source, 60, seed=1)
    assert {one.target for one in drawn} == {0, 1, 2, 3}
    names = list(COLOURS) * 2
    for one in drawn:
        assert len({names[row] for row in one.rows}) == 4
        assert one.text == names[one.rows[one.target]]
    page = np.asarray(collage_picture(random_model(), source, drawn[0]))
    corners = [page[4, 4], page[4, 12], page[12, 4], page[12, 12]]
    assert [tuple(corner.tolist()) for corner in corners] == [COLOURS[names[row]] for row in drawn[0].rows]


@pytest.mark.parametrize(("right", "hits", "part"), [(True, 1.0, 1.0), (False, 0.0, 0.0)])
def test_figures_of_perfect_and_inverted_heat(
    source: Any, monkeypatch: pytest.MonkeyPatch, right: bool, hits: float, part: float
) -> None:
    """Heat on the named colour's quadrant, or on all the others."""

    def seen(model: Any, picture: Any, text: str, **_: Any) -> Explanation:
        page = np.asarray(picture).reshape(2, 8, 2, 8, 3)[:, 4, :, 4]  # (2, 2, 3)
        whole = (page == COLOURS[text]).all(axis=-1).astype(float)
        return Explanation(text, "relevance", whole if right else 1 - whole, [], np.zeros((0, 2, 2)))

    monkeypatch.setattr(pointing, "explain", seen)
    report = evaluate_pointing(random_model(), source, count=40)
    assert (report.trained.hits.value, report.trained.heat.value) == (hits, part)
    assert report.trained.hits.low <= hits <= report.trained.hits.high and report.trained.hits.chance == 0.25
    values = report.as_dict()
    assert values["collages"] == 40 and values["method"] == "relevance"
    assert values["random weights"]["hits"]["value"] == hits


@pytest.mark.parametrize("make", [fused_model, pair_model, random_model])
def test_a_few_real_collages(source: Any, make: Any) -> None:
    report = evaluate_pointing(make(), source, count=8, seed=3)
    assert report == evaluate_pointing(make(), source, count=8, seed=3)
    assert report.trained.hits.count == 8 and 0 < report.trained.heat.value < 1
    assert report.control is not None and report.control.heat != report.trained.heat
    assert evaluate_pointing(make(), source, count=2, control=False).control is None


def test_control_has_other_weights() -> None:
    model = random_model()
    other = random_weights(model, seed=0)
    assert other.network.config == model.network.config
    assert not other.network.image_projection.weight.equal(model.network.image_projection.weight)
    assert random_weights(model, 0).network.image_projection.weight.equal(other.network.image_projection.weight)


def test_what_cannot_be_played(source: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="collages must be at least 1"):
        evaluate_pointing(random_model(), source, count=0)
    with pytest.raises(MissingVerbError, match="colours"):
        evaluate_pointing(colour_model(), source)
    few = captioned(tmp_path / "few", [(plain(name), name, name) for name in ("red", "blue", "green")])
    with pytest.raises(DataError, match="3 different concepts, a collage needs 4"):
        evaluate_pointing(random_model(), few)
