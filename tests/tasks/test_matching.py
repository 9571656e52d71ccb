"""Matching against pairs that are run one by one, and a judge whose answers follow from colours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tasks.fused import fused_model, judging_colours, med_model, pair_model
from tests.tasks.small import colour_model, noise, plain
from vlm.data.sources import Source, open_source
from vlm.data.transforms import ImageTransform
from vlm.errors import DataError, MissingVerbError
from vlm.tasks.matching import evaluate_matching
from vlm.weights.loaded import VisionLanguageModel


def coloured(folder: Path, rows: list[tuple[str, str]]) -> Source:
    """Plain pictures of a colour, each with a text."""
    folder.mkdir()
    for number, (colour, text) in enumerate(rows):
        plain(colour).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(text)
    return open_source(folder)


def noisy(folder: Path, count: int) -> Source:
    folder.mkdir()
    for number, picture in enumerate(noise(count)):
        picture.resize((24, 16) if number % 2 else (16, 24)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"thing {number}")
    return open_source(folder)


def test_a_judge_of_colours(tmp_path: Path) -> None:
    """Its logits are -cos and cos: every own text of one colour is called right, foreign ones too only at a cosine
    of 0, and each own text stands before the foreign one."""
    source = coloured(tmp_path / "right", [("red", "red"), ("green", "green"), ("blue", "blue")])
    report = evaluate_matching(judging_colours(blind=False), source)
    assert (report.order.value, report.accuracy.value, report.order.count) == (1.0, 1.0, 3)
    wrong = coloured(tmp_path / "wrong", [("red", "green"), ("green", "red")])
    assert evaluate_matching(judging_colours(blind=False), wrong).figures() == {"match_accuracy": 0, "match_order": 0}
    alike = coloured(tmp_path / "alike", [("red", "grey one"), ("blue", "grey two")])
    assert evaluate_matching(judging_colours(blind=False), alike).order.value == 0.5  # ties count half


@pytest.mark.parametrize("kind", ["fused", "med", "pairs", "fit"])
def test_batched_equals_pair_by_pair(tmp_path: Path, kind: str) -> None:
    """With two rows the foreign text is known: the other one. `fit` pads pictures of different shape."""
    fit = ImageTransform(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "fit", "bicubic", 8)
    made = {"fused": fused_model, "med": med_model, "pairs": pair_model, "fit": lambda: pair_model(transform=fit)}
    model = made[kind]()
    source = noisy(tmp_path / "noise", 2)
    expected = []
    for number in range(2):
        pixels = model.pixels(tmp_path / "noise" / f"{number}.png")
        with torch.no_grad():
            logits = [model.match(pixels, model.tokens(f"thing {text}"))[0] for text in (number, 1 - number)]
        expected.append([float(one[1] - one[0]) for one in logits])
    own, foreign = np.array(expected).T
    report = evaluate_matching(model, source)
    assert report.order.value == (own > foreign).mean()
    assert report.accuracy.value == ((own > 0).mean() + (foreign <= 0).mean()) / 2


def test_a_foreign_text_shares_neither_concept_nor_caption(tmp_path: Path) -> None:
    source = coloured(tmp_path / "a", [("red", "red"), ("red", "red"), ("blue", "blue")])
    seen: list[tuple[list[int], ...]] = []
    model = judging_colours(blind=False)
    match = model.network.match

    def noted(pixels: torch.Tensor, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.append(tuple(tokens["input_ids"].tolist()))
        return match(pixels, tokens)

    model.network.match = noted
    evaluate_matching(model, source)
    own, foreign = seen
    assert all(a != b for a, b in zip(own, foreign, strict=True))


def test_the_seed_draws_the_foreign_texts(tmp_path: Path) -> None:
    source, model = noisy(tmp_path / "a", 12), pair_model()
    reports = [evaluate_matching(model, source, seed=seed) for seed in (1, 1, 2, 3, 4)]
    assert reports[0] == reports[1] and len({report.order.value for report in reports}) > 1
    low, value, high = reports[0].order.low, reports[0].order.value, reports[0].order.high
    assert low <= value <= high and reports[0].as_dict()["order"]["chance"] == 0.5


def test_what_cannot_be_matched(tmp_path: Path) -> None:
    two = coloured(tmp_path / "two", [("red", "red"), ("blue", "blue")])
    same = coloured(tmp_path / "same", [("red", "one"), ("blue", "one")])
    with pytest.raises(DataError, match="no picture has a foreign text"):
        evaluate_matching(fused_model(), same)
    with pytest.raises(MissingVerbError, match="no itm head"):
        evaluate_matching(med_model(heads=("itc", "lm")), two)
    model: VisionLanguageModel = colour_model()
    with pytest.raises(MissingVerbError, match="has no match"):
        evaluate_matching(model, two)
