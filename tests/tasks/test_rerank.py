"""Re-ranking: scores are those of whole pairs, everything shared is computed once, and the order is as promised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tasks.fused import (
    fused_model,
    judging_colours,
    med_model,
    pair_model,
    qformer_model,
    whole_fused_model,
)
from tests.tasks.small import COLOURS, noise, plain, random_model
from tests.tasks.test_retrieval import captioned, values
from vlm.data.transforms import ImageTransform
from vlm.errors import ConfigError, MissingVerbError
from vlm.tasks import rerank
from vlm.tasks.metrics import ranks_of_best
from vlm.tasks.rerank import Texts, make_scorer, nearest_candidates, pair_scores, reranked, source_rows
from vlm.tasks.retrieval import evaluate_retrieval

COUNT = 12


@pytest.fixture
def source(tmp_path: Path) -> Any:
    words = ["thing", "a very long story about one thing", "two things and more"]
    rows = [(p, f"{words[n % 3]} {n}", f"c{n % 9}") for n, p in enumerate(noise(COUNT))]
    return captioned(tmp_path / "set", rows)


def all_pairs(model: Any, source: Any) -> np.ndarray:
    """(images, texts) matched logits, each pair whole and alone."""
    found = np.zeros((len(source), len(source)))
    for i in range(len(source)):
        for j in range(len(source)):
            tokens = model.tokens(source.meta(j)["captions"][0])
            found[i, j] = model.match(model.pixels(source[i].image), tokens)[0, 1].item()
    return found


MAKERS = [fused_model, med_model, qformer_model, pair_model]


@pytest.mark.parametrize("make", MAKERS, ids=["states", "ids", "queries", "whole"])
@pytest.mark.parametrize("at_once", [1, 5, 128])
def test_scores_are_those_of_whole_pairs(make: Any, source: Any, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    monkeypatch.setattr(rerank, "TEXTS_AT_ONCE", at_once)
    with torch.inference_mode():
        expected = all_pairs(model, source)
    assert expected.std() > 0.1 and expected.std(axis=0).min() > 0.01  # the picture counts
    scorer = make_scorer(model, source_rows(model, source, batch_size=5)[1])
    pairs = np.array([(i, j) for j in range(COUNT) for i in (3, 0, 11, 3)])
    np.testing.assert_allclose(pair_scores(scorer, pairs), expected[pairs[:, 0], pairs[:, 1]], atol=1e-5)


def test_pictures_of_their_own_shape(tmp_path: Path) -> None:
    """ViLT's pictures of different size are padded in a batch; alone, as pairs are run, they aren't."""
    keep = ImageTransform(16, resize="fit", multiple=8)
    model, sides = pair_model(transform=keep), [(16, 16), (24, 16), (16, 24), (40, 24)]
    rows = [(plain("red").resize(side), f"thing {n}", f"c{n}") for n, side in enumerate(sides)]
    source = captioned(tmp_path / "shapes", rows)
    found = source_rows(model, source, batch_size=4)[1]
    assert len({one.shape for one in found.pictures}) > 2
    pairs = np.array([(i, j) for i in range(4) for j in range(4)])
    with torch.inference_mode():
        expected = np.zeros((4, 4))
        for i, j in pairs:
            expected[i, j] = model.match(model.pixels(source[i].image), model.tokens(f"thing {j}"))[0, 1].item()
    np.testing.assert_allclose(pair_scores(make_scorer(model, found), pairs).reshape(4, 4), expected, atol=1e-5)


def test_each_row_is_encoded_once(source: Any) -> None:
    model = fused_model()
    report = evaluate_retrieval(model, source, rerank=4)
    asked = model.network.asked
    assert (asked["images"], asked["texts"]) == (COUNT, COUNT)
    assert asked["keys and values"] <= COUNT
    assert report.reranked is not None
    assert asked["pairs"] == report.reranked.pairs < 2 * 4 * COUNT


def test_rows_of_several_galleries_are_encoded_once(source: Any, tmp_path: Path) -> None:
    """With distractors, a gallery is drawn ten times: its pairs are run once all the same."""
    model, pictures = fused_model(), noise(6, seed=7)
    own = captioned(tmp_path / "own", [(p, f"own {n}", f"o{n}") for n, p in enumerate(pictures)])
    report = evaluate_retrieval(model, own, distractors=source, gallery=10, rerank=10)
    assert (report.galleries, report.gallery) == (10, 10)
    asked = model.network.asked
    assert asked["images"] == asked["texts"] == COUNT + 6 and asked["keys and values"] <= COUNT + 6
    # Six queries with all 18 texts and pictures at most, the 36 pairs of queries shared by both ways.
    assert report.reranked is not None and asked["pairs"] == report.reranked.pairs <= 6 * 18 * 2 - 36


@pytest.mark.parametrize("k", [COUNT, COUNT + 50])
def test_a_depth_of_the_whole_gallery_is_the_cross_encoders_own_ranking(source: Any, k: int) -> None:
    model = fused_model()
    with torch.inference_mode():
        scores = all_pairs(model, source)
    concepts = np.arange(COUNT) % 9
    positives = concepts[:, None] == concepts
    report = evaluate_retrieval(model, source, rerank=k)
    assert report.reranked is not None and report.reranked.k == COUNT and report.reranked.pairs == COUNT**2
    for way, here in (("text_to_image", scores.T), ("image_to_text", scores)):
        for depth, figure in report.reranked.recall[way].items():
            assert figure.value == pytest.approx((ranks_of_best(here, positives) < depth).mean())
    # A model that only judges pairs gives the same, as its first and only ranking.
    whole = evaluate_retrieval(whole_fused_model(), source)
    assert whole.recall == report.reranked.recall
    assert (whole.score, whole.pairs, whole.reranked) == ("itm", COUNT**2, None)


def test_the_order_behind_the_candidates_stays() -> None:
    rng = np.random.default_rng(0)
    scores = rng.uniform(-1, 1, (7, 20)).astype(np.float32)
    nothing = np.zeros(scores.shape, dtype=bool)
    candidates = nearest_candidates(scores, nothing, 6)
    found = rng.normal(0, 30, candidates.shape)
    final = reranked(scores, candidates, found)
    before, after = np.argsort(-scores, axis=1), np.argsort(-final, axis=1)
    np.testing.assert_array_equal(before[:, 6:], after[:, 6:])
    np.testing.assert_array_equal(np.sort(before[:, :6]), np.sort(after[:, :6]))
    np.testing.assert_array_equal(np.take_along_axis(candidates, np.argsort(-found, axis=1), axis=1), after[:, :6])


def test_ties_count_against() -> None:
    scores = np.array([[0.5, 0.5, 0.5, 0.1]])
    positives = np.array([[True, False, False, False]])
    candidates = nearest_candidates(scores, positives, 2)
    assert 0 not in candidates  # the negatives that tie take the places
    assert 0 in nearest_candidates(scores, positives, 3)
    final = reranked(scores, np.array([[0, 1, 2]]), np.array([[7.0, 7.0, 3.0]]))
    assert ranks_of_best(final, positives).tolist() == [1]
    worst = reranked(scores, np.array([[0, 1, 2]]), np.array([[np.nan, 7.0, 3.0]]))
    assert ranks_of_best(worst, positives).tolist() == [3]


def test_re_ranking_mends_what_features_cannot_tell(tmp_path: Path) -> None:
    source = captioned(tmp_path / "a", [(plain(name), name, name) for name in COLOURS])
    report = evaluate_retrieval(judging_colours(blind=True), source, rerank=5)
    assert values(report)["text_to_image"][0] == 0  # all tie
    assert report.reranked is not None
    assert values(report.reranked) == {"text_to_image": [1, 1, 1], "image_to_text": [1, 1, 1]}


def test_positives_are_by_concept_or_caption(tmp_path: Path) -> None:
    """Captions name the wrong colour; what the pairs find is right only through an equal concept."""
    rows = [(plain("red"), "blue", "x"), (plain("blue"), "red", "x"), (plain("green"), "purple", "y")]
    rows += [(plain("purple"), "green", "z")]
    report = evaluate_retrieval(judging_colours(blind=False), captioned(tmp_path / "a", rows), rerank=2)
    assert report.reranked is not None
    assert values(report.reranked)["text_to_image"][0] == values(report.reranked)["image_to_text"][0] == 0.5


def test_the_sum_of_both_scores(source: Any) -> None:
    model = fused_model()
    with torch.inference_mode():
        scores = all_pairs(model, source)
        images = torch.cat([model.encode_image(model.pixels(source[n].image)) for n in range(COUNT)])
        texts = torch.cat([model.encode_text(model.tokens(source.meta(n)["captions"][0])) for n in range(COUNT)])
    joined = scores + (images @ texts.T).numpy()
    concepts = np.arange(COUNT) % 9
    report = evaluate_retrieval(model, source, rerank=COUNT, score="itm+itc")
    assert report.reranked is not None and report.as_dict()["rerank"]["score"] == "itm+itc"
    ranks = ranks_of_best(joined, concepts[:, None] == concepts)
    for depth, figure in report.reranked.recall["image_to_text"].items():
        assert figure.value == pytest.approx((ranks < depth).mean())


def test_padded_rows_come_back() -> None:
    rows, mask = torch.randn(4, 5, 3), torch.arange(5) < torch.tensor([[5], [1], [3], [2]])
    joined = Texts.joined([Texts.of(rows[:2], mask[:2]), Texts.of(rows[2:], mask[2:])])
    found, real = joined.padded(np.array([3, 1, 2]))
    assert found.shape == (3, 3, 3) and torch.equal(real, mask[[3, 1, 2], :3])
    assert torch.equal(found, rows[[3, 1, 2], :3] * real[..., None])


def test_galleries_are_bounded(source: Any) -> None:
    model = pair_model()
    told: list[tuple[int, int, int]] = []
    report = evaluate_retrieval(
        model, source, gallery=4, galleries=2,
        progress=lambda done, total: told.append((done, total, model.network.asked["whole pairs"])),
    )  # fmt: skip
    assert told == [(done, 32, done) for done in range(0, 33, 4)]  # before the first pair, then after each picture
    assert (report.galleries, report.queries, model.network.asked["whole pairs"]) == (2, 8, 32)
    assert report.as_dict()["score"] == "itm" and report.as_dict()["pairs"] == 32


def test_what_cannot_be_asked_for(source: Any) -> None:
    with pytest.raises(MissingVerbError, match="random is a clip model and has no match; ViLT, ALBEF"):
        evaluate_retrieval(random_model(), source, rerank=4)
    with pytest.raises(ConfigError, match="without features to choose candidates"):
        evaluate_retrieval(pair_model(), source, rerank=4)
    with pytest.raises(ConfigError, match="rerank must be 0"):
        evaluate_retrieval(fused_model(), source, rerank=-1)
    with pytest.raises(ConfigError, match="expected one of itm, itm"):
        evaluate_retrieval(fused_model(), source, rerank=2, score="mean")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="rerank is 0"):
        evaluate_retrieval(fused_model(), source, score="itm+itc")
