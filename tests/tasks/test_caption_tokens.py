"""Words of a caption: as PTBTokenizer and the COCO evaluation split them, from a file that they wrote."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm.tasks.caption_tokens import caption_words

STORED = json.loads((Path(__file__).parent / "facts" / "ptb_words.json").read_text("utf-8"))


@pytest.mark.parametrize("text", STORED["words"])
def test_as_ptbtokenizer(text):
    assert caption_words(text) == STORED["words"][text].split()


@pytest.mark.parametrize("text", STORED["different"])
def test_what_is_known_to_differ(text):
    """Listed so that the docstring stays true."""
    assert caption_words(text) != STORED["different"][text].split()


@given(st.text())
def test_any_text_gives_words_without_spaces(text):
    assert all(word and not any(letter.isspace() for letter in word) for word in caption_words(text))


def test_punctuation_alone_is_no_word():
    assert caption_words(' . , ... -- "?!" ') == []
