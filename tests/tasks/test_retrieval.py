"""Recall both ways against a slow loop and hand-made sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tasks.small import COLOURS, colour_model, noise, plain, random_model
from vlm.data.sources import open_source
from vlm.errors import ConfigError, DataError
from vlm.tasks.retrieval import evaluate_retrieval


def captioned(folder: Path, rows: list[tuple[Any, str, str]]) -> Any:
    """A source of (picture, caption, concept)."""
    folder.mkdir(parents=True)
    lines = []
    for number, (picture, caption, concept) in enumerate(rows):
        picture.save(folder / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "captions": [caption], "concept": concept}))
    (folder / "set.jsonl").write_text("\n".join(lines))
    return open_source(folder / "set.jsonl")


def values(report: Any) -> dict[str, list[float]]:
    return {way: [figure.value for figure in at.values()] for way, at in report.recall.items()}


def test_all_found(tmp_path: Path) -> None:
    source = captioned(tmp_path / "a", [(plain(name), name, name) for name in COLOURS])
    report = evaluate_retrieval(colour_model(), source)
    assert values(report) == {"text_to_image": [1, 1, 1], "image_to_text": [1, 1, 1]}
    assert (report.gallery, report.galleries, report.queries) == (5, 1, 5)
    assert [round(f.chance, 6) for f in report.recall["text_to_image"].values()] == [0.2, 1.0, 1.0]


def test_positives_are_the_same_concept_or_the_same_caption(tmp_path: Path) -> None:
    """Captions name the wrong colour; what is found is right only through an equal concept or caption."""
    rows = [(plain("red"), "blue", "x"), (plain("blue"), "red", "x"), (plain("green"), "purple", "y")]
    rows += [(plain("purple"), "green", "z")]
    report = evaluate_retrieval(colour_model(), captioned(tmp_path / "a", rows))
    # Rows 0 and 1 share a concept, so each other's picture is right; rows 2 and 3 find each other, wrongly.
    assert values(report)["text_to_image"][0] == 0.5
    assert values(report)["image_to_text"][0] == 0.5
    same = [(plain("red"), "thing", "p"), (plain("blue"), "thing", "q"), (plain("green"), "other words", "r")]
    report = evaluate_retrieval(colour_model(), captioned(tmp_path / "b", same))
    # Texts without a colour are equally near to everything: a tie with any negative counts against.
    assert values(report)["text_to_image"][0] == 0.0
    assert report.recall["text_to_image"][1].chance == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3)


def test_against_a_slow_loop(tmp_path: Path) -> None:
    model = random_model()
    concepts = ["a", "b", "c", "a", "d", "e", "f", "b", "g", "h", "i", "j"] * 2
    rows = [(p, f"thing {n} of {n % 5}", concepts[n]) for n, p in enumerate(noise(24))]
    source = captioned(tmp_path / "a", rows)
    report = evaluate_retrieval(model, source)
    pictures = torch.cat([model.encode_image(model.pixels(source[n].image)) for n in range(24)])
    texts = torch.cat([model.encode_text(model.tokens(rows[n][1])) for n in range(24)])
    for way, scores in (("text_to_image", texts @ pictures.T), ("image_to_text", pictures @ texts.T)):
        for k in (1, 5, 10):
            hits = 0
            for query in range(24):
                best = scores[query].argsort(descending=True)[:k].tolist()
                hits += any(concepts[found] == concepts[query] for found in best)
            assert report.recall[way][k].value == pytest.approx(hits / 24), (way, k)
    assert report.recall["text_to_image"][5].value > report.recall["text_to_image"][1].value


def test_disjoint_galleries(tmp_path: Path) -> None:
    """Ten rows make two galleries of four; twins in different galleries are not each other's positives."""
    source = captioned(tmp_path / "a", [(plain("red"), "red", f"c{n}") for n in range(10)])
    report = evaluate_retrieval(colour_model(), source, gallery=4)
    assert (report.gallery, report.galleries, report.queries) == (4, 2, 8)
    assert report.recall["text_to_image"][1].value == 1  # one caption: all are positives
    assert report.recall["text_to_image"][1].count == 8


def test_the_seed_draws_the_galleries(tmp_path: Path) -> None:
    rows = [(p, f"thing {n}", f"c{n}") for n, p in enumerate(noise(30))]
    source = captioned(tmp_path / "a", rows)
    model = random_model()
    first, again, other = (evaluate_retrieval(model, source, gallery=10, seed=seed) for seed in (1, 1, 2))
    assert first.as_dict() == again.as_dict()
    assert values(first) != values(other)  # the recalls themselves, not their intervals alone


def test_distractors_are_only_candidates(tmp_path: Path) -> None:
    own = captioned(tmp_path / "a", [(plain("red"), "red", "red"), (plain("blue"), "blue", "blue")])
    far = captioned(tmp_path / "b", [(plain("green"), "green", f"far {n}") for n in range(6)])
    near = captioned(tmp_path / "c", [(plain("red", 9), "a red one", f"near {n}") for n in range(6)])
    report = evaluate_retrieval(colour_model(), own, distractors=far, gallery=5, rounds=3)
    assert (report.gallery, report.galleries, report.queries) == (5, 3, 2)
    assert values(report)["text_to_image"][0] == 1
    assert report.recall["text_to_image"][1].chance == pytest.approx(1 / 5)
    # Three red distractors tie with red's own picture and stand before it; blue is found still.
    report = evaluate_retrieval(colour_model(), own, distractors=near, gallery=5, rounds=3)
    assert values(report)["text_to_image"] == [0.5, 1, 1]


def test_intervals_hold_the_value(tmp_path: Path) -> None:
    rows = [(p, f"thing {n}", f"c{n}") for n, p in enumerate(noise(40))]
    report = evaluate_retrieval(random_model(), captioned(tmp_path / "a", rows))
    for at in report.recall.values():
        for figure in at.values():
            assert figure.low <= figure.value <= figure.high
    figure = report.recall["text_to_image"][10]
    assert 0 < figure.low < figure.high < 1


def test_figures_for_a_log(tmp_path: Path) -> None:
    source = captioned(tmp_path / "a", [(plain(name), name, name) for name in COLOURS])
    figures = evaluate_retrieval(colour_model(), source).figures()
    assert figures["text_to_image_r1"] == 1 and figures["recall"] == 1
    assert len(figures) == 7
    assert json.dumps(evaluate_retrieval(colour_model(), source).as_dict())


def test_a_model_that_gives_no_numbers_finds_nothing(tmp_path: Path) -> None:
    model = colour_model()
    model.network.table.fill_(np.nan)
    source = captioned(tmp_path / "a", [(plain(name), name, name) for name in COLOURS])
    report = evaluate_retrieval(model, source)
    assert values(report)["text_to_image"][0] == 0


@pytest.mark.parametrize("settings", [{"gallery": 1}, {"gallery": 0}, {"rounds": 0}])
def test_bad_settings(tmp_path: Path, settings: dict[str, int]) -> None:
    source = captioned(tmp_path / "a", [(plain("red"), "red", "x"), (plain("blue"), "blue", "y")])
    with pytest.raises(ConfigError, match="at least"):
        evaluate_retrieval(colour_model(), source, **settings)


def test_one_picture_is_too_few(tmp_path: Path) -> None:
    source = captioned(tmp_path / "a", [(plain("red"), "red", "x")])
    with pytest.raises(DataError, match="at least 2"):
        evaluate_retrieval(colour_model(), source)
