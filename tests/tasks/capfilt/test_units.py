"""Units of work: every picture once, decoded once, in batches of texts that are about as long as each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tasks.capfilt.small import PLAIN, noise
from vlm.data.shards import ShardWriter
from vlm.data.sources import Source, open_source
from vlm.errors import DataError
from vlm.tasks.capfilt import units
from vlm.tasks.capfilt.units import Pictures, Reading, find_units, read_units

COUNT = 23


def reading(folder: Path, *transforms: Any, **changes: Any) -> Reading:
    """Web texts are the longer, the shorter their captions; human pictures have two captions each."""
    for kind, count in (("web", COUNT), ("human", 5)):
        with ShardWriter(str(folder / kind / "{:05d}.tar"), samples=100) as writer:
            for i in range(count):
                size = 1 + 7 * i % count  # 1 to `count`, mixed
                meta: dict[str, Any] = {"captions": ["x" * size]}
                more = {"web": "y" * (100 - size)} if kind == "web" else {"captions": ["x" * size, "y" * 3 * size]}
                writer.write(f"{kind}{i}", noise(i), "png", meta | more)
    sources: dict[str, Source] = {kind: open_source(str(folder / kind)) for kind in ("web", "human")}
    return Reading(sources, transforms or (PLAIN,), **({"batch_size": 4, "web_field": "web"} | changes))


def mean_length(batch: Pictures) -> list[float]:
    return [sum(map(len, row.texts)) / len(row.texts) for row in batch.rows]


@pytest.mark.parametrize("field", ["web", "none"])
def test_a_batch_s_texts_are_about_as_long_as_each_other(tmp_path: Path, field: str) -> None:
    how = reading(tmp_path, web_field=field)
    found = find_units(how.sources, 12)
    assert [unit.name for unit in found] == ["web-00000", "web-00001", "human-00000"]
    batches = list(read_units(how, found))
    for unit in found:
        own = [batch for batch in batches if batch.unit == unit]
        lengths = [mean_length(batch) for batch in own]
        assert [one for some in lengths for one in some] == sorted(one for some in lengths for one in some)
        assert [batch.last for batch in own] == [False] * (len(own) - 1) + [True]
        assert sorted(row.number for batch in own for row in batch.rows) == list(range(unit.start, unit.stop))
    web = [text for batch in batches if batch.unit.kind == "web" for row in batch.rows for text in row.texts]
    assert {text[0] for text in web} == ({"y"} if field == "web" else {"x"})
    assert {len(row.texts) for row in batches[-1].rows} == {2}


def test_a_picture_is_decoded_once_for_both_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, decode = [], units.decode_image
    monkeypatch.setattr(units, "decode_image", lambda image, *, name: (asked.append(name), decode(image, name=name))[1])
    how = reading(tmp_path, PLAIN, replace(PLAIN, size=8))
    for batch in read_units(how, find_units(how.sources, 12)):
        assert [tuple(one.shape[1:]) for one in batch.pixels] == [(3, 16, 16), (3, 8, 8)]
        assert all(len(one) == len(batch.rows) for one in batch.pixels)
    assert len(asked) == len(set(asked)) == COUNT + 5


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_that_goes_away_is_named(tmp_path: Path, workers: int) -> None:
    how = reading(tmp_path, workers=workers)
    found = find_units(how.sources, COUNT)
    (tmp_path / "web" / "00000.tar").unlink()
    with pytest.raises(DataError, match=r"00000\.tar: .*can't be read.*; what was written is whole: mend it and start"):
        list(read_units(how, found))


def test_half_a_character_stops_nothing(tmp_path: Path) -> None:
    """JSON of the web may hold half of an emoji, which no tokenizer takes."""
    with ShardWriter(str(tmp_path / "web-{:05d}.tar")) as writer:
        writer.write("a", noise(1), "png", {"captions": ["a dog"], "web": " dog \ud83d", "by": "\ude00 me"})
    source = open_source(str(tmp_path))
    (batch,) = read_units(Reading({"web": source}, (PLAIN,), 4, "web"), [units.Unit("web", 0, 0, 1)])
    (row,) = batch.rows
    assert row.texts == ("dog ?",)
    with ShardWriter(str(tmp_path / "new-{:05d}.tar")) as writer:  # as what is kept is written
        writer.write("a", row.image, "png", row.meta)
    assert open_source(str(tmp_path / "new-00000.tar"))[0].meta == row.meta
