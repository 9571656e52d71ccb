"""BLEU, ROUGE-L and CIDEr-D: equal to pycocoevalcap's on random captions, and right on ones done by hand."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from vlm.errors import DataError
from vlm.tasks.caption_metrics import bleu, bleu_counts, cider_d, rouge_l

WORDS = ["a", "the", "red", "blue", "cat", "dog", "sits", "on", "mat", "grass", "with", "two", "of", "and", "big"]


def some_captions(seed, pictures=40, empty=True):
    rng = random.Random(seed)

    def text(least):
        return [rng.choice(WORDS) for _ in range(rng.randint(least, 12))]

    captions = [text(0 if empty and rng.random() < 0.1 else 1) for _ in range(pictures)]
    references = [[text(1) for _ in range(rng.choice([1, 1, 2, 5]))] for _ in range(pictures)]
    for number in range(0, pictures, 3):  # near ones, so that long n-grams match
        references[number][0] = [*captions[number][:6], *references[number][0][:2]]
    return captions, references


def theirs(captions, references):
    own = {number: [" ".join(words)] for number, words in enumerate(captions)}
    wanted = {number: [" ".join(words) for words in texts] for number, texts in enumerate(references)}
    bleus, bleu_rows = Bleu(4).compute_score(wanted, own, verbose=0)
    return bleus, bleu_rows, Rouge().compute_score(wanted, own)[1], Cider().compute_score(wanted, own)[1]


@pytest.mark.parametrize("seed", range(5))
def test_equal_to_pycocoevalcap(seed):
    captions, references = some_captions(seed)
    bleus, bleu_rows, rouges, ciders = theirs(captions, references)
    counts = bleu_counts(captions, references)
    np.testing.assert_allclose(bleu(counts.sum(axis=0)), bleus, rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.stack([bleu(row) for row in counts]).T, bleu_rows, rtol=0, atol=1e-6)
    np.testing.assert_allclose(rouge_l(captions, references), rouges, rtol=0, atol=1e-6)
    np.testing.assert_allclose(cider_d(captions, references), ciders, rtol=0, atol=1e-6)
    assert bleus[3] > 0.05 and np.ptp(rouges) > 0.3 and np.ptp(ciders) > 1  # figures that tell captions apart


@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from("abc"), max_size=6),
            st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=6), min_size=1, max_size=3),
        ),
        min_size=2,
        max_size=6,
    )
)
@settings(max_examples=60, deadline=None)
def test_equal_to_pycocoevalcap_on_anything(rows):
    captions, references = [list(part) for part in zip(*rows, strict=True)]
    bleus, _, rouges, ciders = theirs(captions, references)
    np.testing.assert_allclose(bleu(bleu_counts(captions, references).sum(axis=0)), bleus, rtol=0, atol=1e-6)
    np.testing.assert_allclose(rouge_l(captions, references), rouges, rtol=0, atol=1e-6)
    np.testing.assert_allclose(cider_d(captions, references), ciders, rtol=0, atol=1e-6)


def test_by_hand():
    captions = [["a", "red", "cat"], ["a", "dog"]]
    references = [[["a", "cat"], ["the", "red", "cat", "sits"]], [["a", "dog", "runs"]]]
    counts = bleu_counts(captions, references)
    # a, red, cat are all there; "red cat" is, "a red" isn't; of the lengths 2 and 4 the shorter is as near to 3.
    assert counts[0].tolist() == [3, 1, 0, 0, 3, 2, 1, 0, 3, 2]
    assert counts[1].tolist() == [2, 1, 0, 0, 2, 1, 0, 0, 2, 3]
    assert bleu(counts[1])[0] == pytest.approx(math.exp(1 - 3 / 2))
    assert bleu(counts.sum(axis=0))[1] == pytest.approx(math.sqrt(5 / 5 * 2 / 3))
    # "a cat": precision 2/3 and recall 1; "red cat": precision 2/3, recall 1/2. The best of each.
    precision, recall = 2 / 3, 1.0
    assert rouge_l(captions, references)[0] == pytest.approx(2.44 * precision * recall / (recall + 1.44 * precision))
    exact = cider_d([["a", "dog"], ["a", "cat"]], [[["a", "dog"]], [["a", "cat"]]])
    assert exact == pytest.approx([5.0, 5.0])  # orders 1 and 2 are the same, 3 and 4 aren't there


def test_a_caption_without_words_scores_nothing():
    captions, references = [[], ["a", "cat"]], [[["a", "dog"]], [["a", "cat"]]]
    assert bleu(bleu_counts(captions, references)[0]).max() < 1e-9
    assert rouge_l(captions, references)[0] == 0 and cider_d(captions, references)[0] == 0


def test_cider_of_one_picture_is_refused():
    with pytest.raises(DataError, match="at least 2"):
        cider_d([["a", "cat"]], [[["a", "cat"]]])
