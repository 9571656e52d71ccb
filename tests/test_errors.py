"""What messages are made of."""

from __future__ import annotations

import pytest

from vlm.errors import counted, reason, with_article


def test_one_and_several() -> None:
    assert [counted(n, "picture") for n in (0, 1, 2)] == ["0 pictures", "1 picture", "2 pictures"]
    assert [counted(n, "query", "queries") for n in (1, 1944)] == ["1 query", "1,944 queries"]
    assert [with_article(word) for word in ("albef", "Albef", "blip")] == ["an albef", "an Albef", "a blip"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyError("x"), "'x' is missing"),
        (OSError(28, "No space left on device", "a.txt"), "No space left on device"),
        (ValueError("first\n  second"), "first second"),
        (EOFError(), "EOFError"),
    ],
)
def test_reasons_are_words_on_one_line(error: Exception, words: str) -> None:
    assert reason(error) == words
