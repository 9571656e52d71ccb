"""The filter measured on exchanged texts, against a judge whose verdicts are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.tasks.capfilt.small import med, noise
from vlm.data.shards import ShardWriter
from vlm.data.sources import Source, open_source
from vlm.tasks.capfilt.check import score_exchanged
from vlm.tasks.capfilt.judge import Verdict

COUNT = 20


class Knowing:
    """Knows which picture each text belongs to, by its pixels; wrong about the texts in `wrong`."""

    def __init__(self, source: Source, wrong: Sequence[str] = ()) -> None:
        self.model, self.wrong = med(), wrong
        self.own: dict[bytes, str] = {}
        for number in range(len(source)):
            sample = source[number]
            self.own[self.model.pixels([sample.image])[0].numpy().tobytes()] = sample.meta["captions"][0]
        self.asked: dict[str, str] = {}

    def verdicts(self, pixels: Tensor, texts: Sequence[Sequence[str]]) -> list[list[Verdict]]:
        out = []
        for picture, (text,) in zip(pixels, texts, strict=True):
            own = self.own[picture.numpy().tobytes()]
            self.asked[own] = text
            out.append([Verdict(0.9 if (own == text) != (text in self.wrong) else 0.1, 0.0)])
        return out


def source(folder: Path, concept: str = "c{}", text: str = "text {}") -> Source:
    with ShardWriter(str(folder / "{:05d}.tar")) as writer:
        for i in range(COUNT):
            meta = {"captions": [text.format(i)], "concept": concept.format(i)}
            writer.write(f"k{i}", noise(i), "png", meta)
    return open_source(str(folder))


def check(judge: Any, data: Source, **changes: Any) -> Any:
    given = {"pictures": COUNT, "seed": 0, "batch_size": 6} | changes
    return score_exchanged(judge, data, **given).at(0.5)


def test_a_filter_that_knows_is_always_right(tmp_path: Path) -> None:
    data = source(tmp_path)
    judge = Knowing(data)
    found = check(judge, data)
    assert (found.precision.value, found.recall.value, found.own_kept.value) == (1, 1, 1)
    assert (found.precision.count, found.recall.count, found.own_kept.count) == (10, 10, 10)
    assert found.precision.chance == found.recall.chance == 0.5 and found.unreadable == 0
    exchanged = {own: text for own, text in judge.asked.items() if own != text}
    assert sorted(exchanged) == sorted(exchanged.values()) and len(exchanged) == 10


def test_its_errors_are_counted(tmp_path: Path) -> None:
    data = source(tmp_path)
    judge = Knowing(data)
    check(judge, data)
    own = [text for text, said in judge.asked.items() if text == said]
    foreign = [said for text, said in judge.asked.items() if text != said]
    # Of ten own texts it drops two, of ten foreign ones it keeps three: seven of nine dropped ones are foreign.
    found = check(Knowing(data, wrong=[*own[:2], *foreign[:3]]), data)
    assert found.precision.value == pytest.approx(7 / 9) and found.precision.count == 9
    assert found.recall.value == pytest.approx(0.7) and found.own_kept.value == pytest.approx(0.8)
    assert found.recall.chance == pytest.approx(9 / 20)


def test_the_seed_fixes_which_texts_are_exchanged(tmp_path: Path) -> None:
    data, asked = source(tmp_path), []
    for seed in (0, 0, 1):
        judge = Knowing(data)
        check(judge, data, seed=seed, pictures=12)
        asked.append(judge.asked)
    assert asked[0] == asked[1] != asked[2]
    assert len(asked[0]) == 12


@pytest.mark.parametrize("alike", [{"concept": "same"}, {"text": "Same. "}])
def test_an_exchange_between_alike_pictures_is_no_mismatch(tmp_path: Path, alike: dict[str, str]) -> None:
    data = source(tmp_path, **alike)
    found = check(Knowing(data), data)
    assert found.recall.count == found.precision.count == 0 and found.own_kept.count == 10
