"""Zero-shot classification against answers worked out by hand."""

from __future__ import annotations

import io
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vlm
from tests.tasks.small import COLOURS, SCALE, ColourNetwork, colour_model, noise, plain, random_model
from vlm.errors import ConfigError, DataError, VlmError
from vlm.tasks.templates import fill, resolve_templates
from vlm.tasks.zero_shot import Prediction, ZeroShotClassifier


def network(classifier: ZeroShotClassifier) -> ColourNetwork:
    assert isinstance(classifier.model.network, ColourNetwork)
    return classifier.model.network


def softmax(*logits: float) -> list[float]:
    powers = [math.exp(logit) for logit in logits]
    return [power / sum(powers) for power in powers]


def test_probabilities_by_hand() -> None:
    classifier = vlm.ZeroShotClassifier(colour_model(), ["green", "yellow", "red"])
    found = classifier.predict(plain("red"))
    red, yellow, green = softmax(SCALE, SCALE / math.sqrt(2), 0.0)
    assert [p.label for p in found] == ["red", "yellow", "green"]
    assert [p.score for p in found] == pytest.approx([red, yellow, green], abs=1e-5)
    assert isinstance(found[0], Prediction)


def test_templates_are_averaged_on_the_sphere() -> None:
    """Unit features of each sentence, their mean, made unit again."""
    classifier = ZeroShotClassifier(colour_model(), ["red", "green"], ["{}", "a {label} and green thing"])
    first, second = np.array([1.0, 0, 0]), np.array([1.0, 1, 0]) / math.sqrt(2)
    mean = (first + second) / np.linalg.norm(first + second)
    np.testing.assert_allclose(classifier.features[0].numpy(), mean, atol=1e-6)
    np.testing.assert_allclose(classifier.features[1].numpy(), [0, 1, 0], atol=1e-6)


def test_label_features_do_not_depend_on_the_batch() -> None:
    model = random_model()
    labels = [f"{'long ' * (i % 7)}label {i}" for i in range(23)]
    sentences = ["{}", "a much longer sentence about a {} that stands there", "an {}!"]
    whole = ZeroShotClassifier(model, labels, sentences, batch_size=1000).features
    parts = ZeroShotClassifier(model, labels, sentences, batch_size=4).features
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=0)
    alone = [model.encode_text(model.tokens(fill(sentence, labels[5]))) for sentence in sentences]
    mean = torch.nn.functional.normalize(torch.cat(alone).mean(dim=0), dim=0)
    torch.testing.assert_close(whole[5], mean, atol=1e-5, rtol=0)


def test_a_warm_call_runs_no_text() -> None:
    classifier = ZeroShotClassifier(colour_model(), list(COLOURS), "drawings")
    cold = sum(network(classifier).text_rows)
    assert cold == len(COLOURS) * len(resolve_templates("drawings"))
    classifier.predict(plain("red"))
    classifier.predict([plain("blue"), plain("green")])
    assert sum(network(classifier).text_rows) == cold
    assert network(classifier).image_rows == [1, 2]


def test_batched_equals_single() -> None:
    classifier = ZeroShotClassifier(random_model(), ["cat", "dog", "house", "red apple"], batch_size=4)
    pictures = noise(10)
    together = classifier.predict(pictures, top_k=4)
    for picture, found in zip(pictures, together, strict=True):
        alone = classifier.predict(picture, top_k=4)
        assert [p.label for p in alone] == [p.label for p in found]
        assert [p.score for p in alone] == pytest.approx([p.score for p in found], abs=1e-5)
    assert len({found[0].score for found in together}) > 5


def test_scores_are_probabilities_over_all_labels() -> None:
    model = random_model()
    classifier = ZeroShotClassifier(model, ["cat", "dog", "house"], batch_size=2)
    scores = classifier.scores(model.pixels(noise(5)))
    assert scores.shape == (5, 3)
    torch.testing.assert_close(scores.sum(dim=1), torch.ones(5))
    assert [p.score for p in classifier.predict(noise(5)[3], top_k=3)] == pytest.approx(
        sorted(scores[3].tolist(), reverse=True), abs=1e-5
    )


def test_every_kind_of_picture(tmp_path: Path) -> None:
    classifier = ZeroShotClassifier(colour_model(), ["blue", "red"])
    file = tmp_path / "red.png"
    plain("red").save(file)
    content = file.read_bytes()
    array = np.asarray(plain("red"))
    for picture in (file, str(file), content, bytearray(content), io.BytesIO(content), plain("red"), array):
        found = classifier.predict(picture, top_k=1)
        assert found[0].label == "red", type(picture)
    with file.open("rb") as opened:
        assert classifier.predict(opened, top_k=1)[0].label == "red"
    for several in ([file], (str(file),), (p for p in [content]), array[None], np.stack([array, array])):
        assert [found[0].label for found in classifier.predict(several)] in (["red"], ["red", "red"])
    assert classifier.predict([]) == []


def test_thousands_of_labels() -> None:
    labels = [*COLOURS, *(f"thing {i}" for i in range(3000))]
    classifier = ZeroShotClassifier(colour_model(), labels, batch_size=256)
    assert max(network(classifier).text_rows) <= 256
    found = classifier.predict(plain("purple"), top_k=5000)
    assert len(found) == len(labels)  # no more than there are
    assert found[0].label == "purple"
    assert sum(p.score for p in found) == pytest.approx(1, abs=1e-4)


def test_a_batch_at_a_time() -> None:
    """A generator of any length: no picture is asked for before the last batch is given out."""
    classifier = ZeroShotClassifier(colour_model(), ["red", "blue"], batch_size=3)
    asked: list[int] = []

    def pictures() -> Any:
        for number in range(8):
            asked.append(number)
            yield plain("red" if number % 2 else "blue")

    stream = classifier.predict_each(pictures(), 1)
    assert next(stream)[1][0].label == "blue"
    assert asked == [0, 1, 2]
    assert [found[0].label for _, found in stream] == ["red", "blue", "red", "blue", "red", "blue", "red"]
    assert network(classifier).image_rows == [3, 3, 2]


def test_unreadable_pictures_are_skipped_when_asked(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    plain("red").save(good)
    bad.write_bytes(b"no picture")
    classifier = ZeroShotClassifier(colour_model(), ["red", "blue"], batch_size=2)
    failed: list[tuple[Any, str]] = []
    listed = [bad, good, tmp_path / "gone.png", good, good]
    rows = list(classifier.predict_each(listed, on_error=lambda path, error: failed.append((path, str(error)))))
    assert [path for path, _ in rows] == [good, good, good]
    assert [path for path, _ in failed] == [bad, tmp_path / "gone.png"]
    assert "bad.png" in failed[0][1]
    with pytest.raises(DataError, match=r"bad\.png"):
        classifier.predict([good, bad])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "none were given"),
        (["cat", " "], "number 2 is blank"),
        (["cat", "dog", "cat "], "more than once: cat"),
        ("cat", "split it"),
        (["cat", 3], "number 2 is 3"),
        (["cat", None], "number 2 is None"),
        (7, "got int"),
    ],
)
def test_bad_labels(labels: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ZeroShotClassifier(colour_model(), labels)


@pytest.mark.parametrize("top_k", [0, -1, 1.5, True, "3"])
def test_bad_top_k(top_k: Any) -> None:
    classifier = ZeroShotClassifier(colour_model(), ["red", "blue"])
    with pytest.raises(ConfigError, match="top_k"):
        classifier.predict(plain("red"), top_k=top_k)
    with pytest.raises(ConfigError, match="top_k"):
        classifier.predict_pixels(torch.zeros(1, 3, 8, 8), top_k=top_k)


@pytest.mark.parametrize("picture", [None, 3, [None], [torch.zeros(3, 8, 8)], np.zeros((2, 3, 4, 5, 6)), b""])
def test_not_a_picture(picture: Any) -> None:
    with pytest.raises(DataError):
        ZeroShotClassifier(colour_model(), ["red", "blue"]).predict(picture)


def test_bad_batch_size_and_model() -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        ZeroShotClassifier(colour_model(), ["red"], batch_size=0)
    with pytest.raises(VlmError, match="no-such-model"):
        ZeroShotClassifier("no-such-model", ["red"])
    lone = colour_model()
    lone.network = torch.nn.Linear(1, 1)
    with pytest.raises(VlmError, match="encode_text"):
        ZeroShotClassifier(lone, ["red"])


def test_bad_labels_are_told_before_a_model_is_loaded() -> None:
    with pytest.raises(ConfigError, match="templates"):
        ZeroShotClassifier("no-such-model", ["red"], "no-such-set")


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ("imagnet", "did you mean 'imagenet'"),
        ([], "empty"),
        (["a photo"], "expected a sentence with"),
        (["{} and {}"], "once"),
        (["{name}"], "expected a sentence"),
        ([3], "expected a sentence"),
    ],
)
def test_bad_templates(templates: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_templates(templates)


def test_named_templates() -> None:
    assert resolve_templates("none") == ("{}",)
    assert resolve_templates("a {label} here") == ("a {label} here",)
    assert len(resolve_templates("imagenet")) == 80
    assert len(resolve_templates("simple")) == 7
    for name in ("single", "drawing", "drawings", "imagenet", "simple"):
        assert all(fill(sentence, "x y").count("x y") == 1 for sentence in resolve_templates(name)), name


def test_the_default_suits_the_model() -> None:
    assert ZeroShotClassifier(colour_model(), ["red"]).templates == ("{}",)
    published = SimpleNamespace(kind="clip")
    assert resolve_templates(None, published) == ("a photo of a {}.",)  # type: ignore[arg-type]
    assert resolve_templates("auto", published) == resolve_templates("single")  # type: ignore[arg-type]


def test_a_label_may_look_like_a_template() -> None:
    assert fill("a {label}.", "{} {label}") == "a {} {label}."


def test_half_precision_scores_are_computed_in_full() -> None:
    model = random_model().to(dtype=torch.bfloat16)
    classifier = ZeroShotClassifier(model, ["cat", "dog"])
    scores = classifier.scores(torch.zeros(2, 3, 16, 16))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.sum(dim=1), torch.ones(2))


def test_one_pixel_is_a_picture() -> None:
    found = ZeroShotClassifier(colour_model(), ["red", "blue"]).predict(Image.new("RGB", (1, 1), (0, 0, 255)))
    assert found[0].label == "blue"
