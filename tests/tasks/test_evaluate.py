"""Whole-source figures against hand-made sets, where the colour model's every answer is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tasks.small import class_folders, colour_model, noise, plain, random_model
from vlm.data.batch import KINDS
from vlm.data.sources import Label, open_source
from vlm.errors import ConfigError, DataError
from vlm.tasks.confusion import attractors, confusion_picture, confusions
from vlm.tasks.evaluate import compare_templates, evaluate_zero_shot, label_numbers
from vlm.tasks.features import source_features


@pytest.fixture
def colours(tmp_path: Path) -> Any:
    """Six pictures in three classes; one "red" picture is yellow, one "green" picture is blue."""
    counts = {"red": ["red", "red", "yellow"], "green": ["green", "blue"], "blue": ["blue"]}
    return open_source(class_folders(tmp_path / "set", counts))


def table(folder: Path, rows: list[dict[str, Any]]) -> Any:
    """A source of JSON lines, each with its colour painted."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, row in enumerate(rows):
        plain(row.pop("colour")).save(folder / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", **row}))
    (folder / "set.jsonl").write_text("\n".join(lines))
    return open_source(folder / "set.jsonl")


def test_by_hand(colours: Any) -> None:
    report = evaluate_zero_shot(colour_model(), colours, ["red", "green", "blue", "yellow"], depths=(1, 2, 5))
    assert report.top[1].value == pytest.approx(4 / 6)
    assert report.top[1].chance == pytest.approx(1 / 4)
    # Yellow is as near to green as to red; the blue "green" has green among its last three, all at 0.
    assert report.top[2].value >= report.top[1].value
    assert report.top[5].value == 1 and report.top[5].chance == 1
    assert report.top[1].low < report.top[1].value < report.top[1].high
    expected = np.zeros((4, 4), dtype=int)
    expected[0, 0], expected[0, 3], expected[1, 1], expected[1, 2], expected[2, 2] = 2, 1, 1, 1, 1
    np.testing.assert_array_equal(report.confusion(), expected)


def test_per_class(colours: Any) -> None:
    report = evaluate_zero_shot(colour_model(), colours, ["red", "green", "blue", "yellow"], depths=(1,))
    rows = {row["label"]: row for row in report.per_class()}
    assert list(rows) == ["red", "green", "blue"]  # no picture of yellow
    assert rows["red"] == {"label": "red", "pictures": 3, "top-1": 0.6667, "most often": "red"}
    assert rows["blue"] == {"label": "blue", "pictures": 1, "top-1": 1.0, "most often": "blue"}


def test_as_dict_is_json(colours: Any) -> None:
    report = evaluate_zero_shot(colour_model(), colours, ["red", "green", "blue"])
    found = json.loads(json.dumps(report.as_dict()))
    assert found["pictures"] == 6 and found["labels"] == 3 and found["model"] == "colours"
    assert set(found["top-1"]) == {"value", "low", "high", "chance", "count"}


def test_against_a_slow_loop(tmp_path: Path) -> None:
    model, labels = random_model(), ["cat", "dog", "red apple", "house", "tree"]
    for number, picture in enumerate(noise(20)):
        folder = tmp_path / labels[number % 5].replace(" ", "_")
        folder.mkdir(exist_ok=True)
        picture.save(folder / f"{number}.png")
    source = open_source(tmp_path)
    report = evaluate_zero_shot(model, source, labels, depths=(1, 2, 3))
    hits = {1: 0, 2: 0, 3: 0}
    for number in range(len(source)):
        picture = model.encode_image(model.pixels(source[number].image))
        cosines = {label: float(picture @ model.encode_text(model.tokens(label)).T) for label in labels}
        order = sorted(labels, key=lambda label: -cosines[label])
        for k in hits:
            hits[k] += source.meta(number)["name"] in order[:k]
    assert {k: round(figure.value * 20) for k, figure in report.top.items()} == hits
    assert 0 < hits[1] < hits[3] < 20


def test_concepts_that_share_a_name_share_a_label(tmp_path: Path) -> None:
    labels = [Label("1", "red", "g", False), Label("2", "red", "g", True), Label("3", "blue", "g", False)]
    source = table(
        tmp_path,
        [
            {"colour": "red", "captions": ["crimson"], "concept": "1"},
            {"colour": "red", "captions": ["scarlet"], "concept": "2"},
            {"colour": "red", "captions": ["navy"], "concept": "3"},
            {"colour": "blue", "captions": [" blue "], "concept": "99"},  # by its caption
            {"colour": "blue", "captions": ["teal"], "concept": "98"},
        ],
    )
    report = evaluate_zero_shot(colour_model(), source, labels)
    assert report.labels == ["red", "blue"]
    assert report.truth.tolist() == [0, 0, 1, 1]
    assert report.predicted.tolist() == [0, 0, 0, 1]
    assert report.left_out == {"unreadable": 0, "no label": 1, "not kept": 0}


def test_a_subset_is_asked_among_all_labels(tmp_path: Path) -> None:
    labels = [Label("1", "red", "g", False), Label("2", "blue", "flags", True)]
    rows = [{"colour": c, "captions": [c], "concept": n} for c, n in (("red", "1"), ("blue", "2"), ("blue", "1"))]
    source = table(tmp_path, rows)
    report = evaluate_zero_shot(colour_model(), source, labels, keep=["1"])
    assert report.truth.tolist() == [0, 0]
    assert report.top[1].value == 0.5 and report.top[1].chance == 0.5
    assert report.left_out["not kept"] == 1


def test_unreadable_pictures_are_counted_and_do_not_shift_labels(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set", {"blue": ["blue", "blue"], "red": ["red", "red"]})
    (root / "blue" / "0.png").write_bytes(b"no picture")
    report = evaluate_zero_shot(colour_model(), open_source(root), ["red", "blue"])
    assert report.left_out["unreadable"] == 1
    assert report.truth.tolist() == [1, 0, 0] and report.top[1].value == 1


def test_joined_sources_may_repeat_keys(tmp_path: Path) -> None:
    """Both hold 0.png, of different colours."""
    first = class_folders(tmp_path / "a", {"x": ["red"]})
    second = class_folders(tmp_path / "b", {"x": ["blue"]})
    rows = [(first, "red"), (second, "blue")]
    for root, caption in rows:
        (root / "x" / "0.txt").write_text(caption)
    report = evaluate_zero_shot(colour_model(), open_source([root for root, _ in rows]), ["red", "blue"])
    assert report.truth.tolist() == [0, 1] and report.top[1].value == 1


def test_given_features_are_used(colours: Any, tmp_path: Path) -> None:
    model = colour_model()
    features = source_features(model, colours, texts=False)
    before = list(model.network.image_rows)
    report = evaluate_zero_shot(model, colours, ["red", "green", "blue", "yellow"], features=features)
    assert model.network.image_rows == before
    assert report.top[1].value == pytest.approx(4 / 6)
    other = open_source(class_folders(tmp_path / "other", {"grass": ["green"]}))
    with pytest.raises(DataError, match="another source"):
        evaluate_zero_shot(model, other, ["grass"], features=features)


@pytest.mark.parametrize(
    ("labels", "settings", "error", "message"),
    [
        ([], {}, ConfigError, "none were given"),
        (["red", "red"], {}, ConfigError, "more than once"),
        (["red", ""], {}, ConfigError, "blank"),
        (["red", Label("1", "blue", "g", False)], {}, ConfigError, "not both"),
        (["red"], {"depths": ()}, ConfigError, "top-k"),
        (["red"], {"depths": (0, 1)}, ConfigError, "top-k"),
        (["red"], {"templates": "nothing"}, ConfigError, "no set of that name"),
        (["cat", "dog"], {}, DataError, "among the 2 labels"),
        (["red"], {"keep": []}, DataError, "among the 1 label"),
    ],
)
def test_bad_input(colours: Any, labels: Any, settings: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        evaluate_zero_shot(colour_model(), colours, labels, **settings)


def test_nothing_readable(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set", {"red": ["red"]})
    (root / "red" / "0.png").write_bytes(b"")
    with pytest.raises(DataError, match="no picture could be read"):
        evaluate_zero_shot(colour_model(), open_source(root), ["red"])


def test_compare_templates(colours: Any) -> None:
    """A sentence that names another colour in each label costs what can be counted."""
    model = colour_model()
    rows = compare_templates(model, colours, ["red", "green", "blue"], ["none", "drawing", "{} blue blue blue"])
    assert [row["templates"] for row in rows] == ["none", "drawing", "{} blue blue blue"]
    assert [row["count"] for row in rows] == [1, 1, 1]
    same = rows[1]["top-1 against none"]
    assert same == {"value": 0.0, "low": 0.0, "high": 0.0}  # no colour in "a drawing of"
    assert rows[1]["top-1"] == rows[0]["top-1"]
    worse = evaluate_zero_shot(model, colours, ["red", "green", "blue"], templates="{} blue blue blue")
    difference = worse.top[1].value - rows[0]["top-1"]["value"]
    assert rows[2]["top-1 against none"]["value"] == pytest.approx(difference, abs=1e-6)
    assert sum(model.network.image_rows) == 2 * len(colours)  # once for all three sets, once for the check
    with pytest.raises(ConfigError, match="none were given"):
        compare_templates(model, colours, ["red"], [])


def test_label_numbers() -> None:
    assert label_numbers(["b", " a "]) == (["b", "a"], {"b": 0, "a": 1})
    assert label_numbers([Label("1", "x", "", False), Label("2", "x", "", False)]) == (
        ["x"],
        {"x": 0, "1": 0, "2": 0},
    )


def test_confusions_and_attractors_by_hand() -> None:
    truth = np.array([0, 0, 0, 0, 1, 1, 2, 3])
    predicted = np.array([1, 1, 2, 0, 2, 1, 2, 2])
    assert confusions(truth, predicted) == [(0, 1, 2, 0.5), (0, 2, 1, 0.25), (1, 2, 1, 0.5), (3, 2, 1, 1.0)]
    assert attractors(truth, predicted) == [(2, 3, 3, 0.6), (1, 2, 1, 0.4)]
    assert confusions(truth, truth) == [] and attractors(truth, truth) == []


def test_the_matrix_shows_shares(tmp_path: Path) -> None:
    truth, predicted = np.array([0, 0, 1]), np.array([0, 1, 1])
    confusion_picture(["a", "b"], truth, predicted, tmp_path / "new" / "few.png")
    pixels = np.asarray(Image.open(tmp_path / "new" / "few.png").convert("RGB")).reshape(-1, 3)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    cells = {tuple(colour): count for colour, count in zip(colours.tolist(), counts.tolist(), strict=True)}
    assert cells[(0, 0, 255)] == 26 * 26  # b as b, always
    assert cells[(128, 128, 255)] == 26 * 26  # a as a, half
    assert cells[(255, 128, 128)] == 26 * 26  # a as b, half
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["few.png"]


def test_many_labels_any_letters(tmp_path: Path) -> None:
    labels = [f"名前 {i}\nsecond line {'long ' * 20}" for i in range(60)]
    truth = np.arange(60)
    confusion_picture(labels, truth, np.roll(truth, 1), tmp_path / "many.png", title="a set")
    assert Image.open(tmp_path / "many.png").size[0] > 500
    confusion_picture(labels, truth, truth, tmp_path / "none.png")  # no mistakes


def test_a_label_only_predicted_is_drawn(tmp_path: Path) -> None:
    confusion_picture(["a", "b"], np.array([0]), np.array([1]), tmp_path / "one.png")
    pixels = np.asarray(Image.open(tmp_path / "one.png").convert("RGB")).reshape(-1, 3)
    assert (pixels == (255, 0, 0)).all(axis=1).sum() == 26 * 26


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="can't be written"):
        confusion_picture(["a"], np.array([0]), np.array([0]), tmp_path / "file" / "x.png")


def test_features_are_unit_and_in_order(colours: Any) -> None:
    model = colour_model()
    found = source_features(model, colours, batch_size=4)
    assert model.network.image_rows == [4, 2]
    assert found.keys == tuple(colours.keys)
    assert found.ids.shape == (6, len(KINDS))
    for number in range(6):
        picture = model.encode_image(model.pixels(colours[number].image))
        caption = model.encode_text(model.tokens(colours.meta(number)["captions"][0]))
        torch.testing.assert_close(found.image[number], picture[0])
        torch.testing.assert_close(found.text[number], caption[0])


def test_inner_spaces_of_a_name_do_not_matter(tmp_path: Path) -> None:
    source = table(tmp_path, [{"colour": "red", "captions": ["plain  red"]}, {"colour": "blue", "captions": ["blue"]}])
    report = evaluate_zero_shot(colour_model(), source, ["plain red", "blue"])
    assert report.truth.tolist() == [0, 1]
