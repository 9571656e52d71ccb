"""Samples: their captions, their identities, the account of what is left out."""

from __future__ import annotations

import json

import pytest

from vlm.data.samples import Problems, caption_id, stable_id, with_captions


def test_caption_ids_are_fixed_and_blind_to_case() -> None:
    assert caption_id(" A  Dog. ") == caption_id("a dog") != caption_id("a dot")
    assert stable_id("a dog") == 9151722581430185315
    assert 0 <= stable_id("\ud800") < 2**63


def test_with_captions_takes_other_names() -> None:
    assert with_captions({"text": "t", "x": 1}) == {"text": "t", "x": 1, "captions": ["t"]}
    assert with_captions({"captions": [], "title": ["a", 3, "b "]})["captions"] == ["a", "b"]
    for bad in ([], None, {"captions": [1]}, {}):
        with pytest.raises(ValueError, match=r"no caption|not an object"):
            with_captions(bad)


def test_problems_keep_counts_and_first_places() -> None:
    problems = Problems(keep=2)
    for i in range(5):
        problems.add("broken", f"p{i}")
    other = Problems()
    other.add("broken", "q")
    other.add("gone", "r", 3)
    other.merge(problems)
    assert other.counts == {"broken": 6, "gone": 3} and other.total == 9
    assert other.examples["broken"] == ["q", "p0", "p1"]
    assert other.summary() == "6 x broken: q, p0, p1, ...\n3 x gone: r, ..."
    assert Problems.from_dict(json.loads(json.dumps(other.as_dict()))).counts == other.counts
