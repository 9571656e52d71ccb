"""Which text a picture gets: all captions, tags, templates, uploaded text, and their chances."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.data.captions import STYLED, TEMPLATES, CaptionVariation, first_caption, vary
from vlm.errors import ConfigError

DOG = {"captions": ["dog face", "a dog"], "tags": ["pet", "animal", "puppy"], "style": "clip-art", "web": " Dog_01 "}


def drawn(meta: dict[str, Any], config: CaptionVariation, count: int = 2000) -> Counter[str]:
    """How often each text comes."""
    rng = random.Random(0)
    return Counter(vary(meta, rng, config).text for _ in range(count))


def test_captions_are_drawn_evenly() -> None:
    meta = {"captions": [f"caption {i}" for i in range(5)], "tags": ["x"], "web": "y"}
    counts = drawn(meta, CaptionVariation())
    assert set(counts) == set(meta["captions"])
    assert all(330 < count < 470 for count in counts.values())


def test_tags_follow_the_caption() -> None:
    counts = drawn(DOG, CaptionVariation(tags=1, most_tags=2))
    for text in counts:
        caption, *tags = text.split(", ")
        assert caption in DOG["captions"] and 1 <= len(tags) <= 2
        assert set(tags) <= set(DOG["tags"]) and len(set(tags)) == len(tags)
    assert len(counts) == 2 * (3 + 6)  # every ordered choice of one or two of three


def test_tags_alone() -> None:
    counts = drawn(DOG, CaptionVariation(tags_alone=1))
    assert all(set(text.split(", ")) <= set(DOG["tags"]) for text in counts) and len(counts) == 3 + 6 + 6


def test_templates_of_any_and_of_the_own_style() -> None:
    counts = drawn({**DOG, "captions": ["dog"]}, CaptionVariation(template=1))
    own = {template.format("dog") for template in STYLED["clip-art"]}
    assert set(counts) == own | {template.format("dog") for template in TEMPLATES}
    plain = drawn({"captions": ["dog"], "style": "unheard-of"}, CaptionVariation(template=1))
    assert set(plain) == {template.format("dog") for template in TEMPLATES}
    assert sum(counts[text] for text in own) > 1.5 * sum(plain[text] for text in own)


def test_braces_in_a_caption_are_text() -> None:
    assert drawn({"captions": ["set {0} {}"]}, CaptionVariation(template=1), 50).keys() >= {"this is set {0} {}"}


def test_uploaded_text_comes_as_it_is() -> None:
    assert set(drawn(DOG, CaptionVariation(web=1, template=1))) == {"Dog_01"}
    for web in (None, "  ", 5):
        assert set(drawn({**DOG, "web": web}, CaptionVariation(web=1))) == set(DOG["captions"])


def test_chances_add_up() -> None:
    counts = drawn({**DOG, "captions": ["dog"]}, CaptionVariation(tags=0.3, tags_alone=0.2, web=0.1), 10_000)
    joined = sum(n for text, n in counts.items() if text.startswith("dog, "))
    assert counts["Dog_01"] == pytest.approx(1000, abs=150)
    assert joined == pytest.approx(3000, abs=200) and counts["dog"] == pytest.approx(4000, abs=200)


@pytest.mark.parametrize("tags", [None, [], 7, {"a": 1}, "", " , ", [None, 3, ""], ["DOG"]])
def test_tags_that_are_none(tags: Any) -> None:
    meta = {"captions": ["dog"], "tags": tags}
    assert set(drawn(meta, CaptionVariation(tags=0.5, tags_alone=0.5), 50)) == {"dog"}


def test_tags_in_one_text() -> None:
    meta = {"captions": ["dog"], "tags": "pet, dog,animal"}
    assert set(drawn(meta, CaptionVariation(tags_alone=1))) == {"pet", "animal", "pet, animal", "animal, pet"}


def test_same_draws_same_text_and_the_sample_stays() -> None:
    config, before = CaptionVariation(tags=0.5, template=0.5), {key: list(value) for key, value in DOG.items()}
    texts = [[vary(DOG, random.Random(i), config) for i in range(50)] for _ in range(2)]
    assert texts[0] == texts[1] and len(set(texts[0])) > 10
    assert {key: list(value) for key, value in DOG.items()} == before


def test_first_caption() -> None:
    assert first_caption(DOG) == "dog face"


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"tags": 1.2}, r"captions\.tags is a chance"), ({"web": -0.1}, r"captions\.web"),
     ({"template": float("nan")}, r"captions\.template"), ({"most_tags": 0}, r"captions\.most_tags"),
     ({"tags": 0.6, "tags_alone": 0.6}, "add up to 1")],
)  # fmt: skip
def test_bad_settings_are_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        CaptionVariation(**settings)


text = st.text(min_size=1).filter(str.strip)


@settings(max_examples=100, deadline=None)
@given(
    captions=st.lists(text, min_size=1, max_size=4), tags=st.lists(st.text(), max_size=6), web=st.none() | st.text(),
    chances=st.lists(st.floats(0, 0.33), min_size=3, max_size=3), template=st.floats(0, 1), seed=st.integers(0, 999),
)  # fmt: skip
def test_never_empty(
    captions: list[str], tags: list[str], web: str | None, chances: list[float], template: float, seed: int
) -> None:
    config = CaptionVariation(chances[0], chances[1], 3, template, chances[2])
    assert vary({"captions": captions, "tags": tags, "web": web}, random.Random(seed), config).text.strip()
