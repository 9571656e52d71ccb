"""Pictures that came without a text: left out, unless they are asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.made import picture, said, tar
from vlm.data.sources import open_source
from vlm.errors import DataError


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own."""
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))


def shard(folder: Path) -> Path:
    """A sample with a caption, three without, and one whose JSON is broken."""
    folder.mkdir()
    members = [("a.png", picture()), ("a.json", said("a")), ("b.png", picture(1)), ("c.png", picture(2))]
    members += [("c.json", json.dumps({"captions": [" "], "web": "IMG 3"}).encode()), ("d.png", picture(3))]
    members += [("d.txt", b"\n"), ("e.png", picture(4)), ("e.json", b"{")]
    return tar(folder / "x.tar", members)


def test_shards(tmp_path: Path) -> None:
    place = shard(tmp_path / "set")
    for _ in range(2):  # made, and from the cache: each way has its own index
        assert open_source(place).keys == ["a"]
        source = open_source(place, textless=True)
        assert source.keys == ["a", "b", "c", "d"] and source.lengths.tolist() == [1, 0, 0, 0]
        assert source.problems.counts == {"JSON or text can't be read": 1}
    assert [source.meta(number)["captions"] for number in range(4)] == [["a"], [], [], []]
    assert source[1].image == picture(1) and source[2].meta["web"] == "IMG 3"


def test_folders(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png", "d.png"):
        (tmp_path / name).write_bytes(picture())
    with pytest.raises(DataError, match="no usable picture"):
        open_source(tmp_path)
    assert len(open_source(tmp_path, textless=True)) == 4
    for name, text in (("a.txt", b"an ant"), ("b.txt", b" \n"), ("c.txt", b"\xff\xfe\xff")):
        (tmp_path / name).write_bytes(text)
    source = open_source(tmp_path, textless=True)
    assert source.keys == ["a.png", "b.png", "d.png"]
    assert [source.meta(number)["captions"] for number in range(3)] == [["an ant"], [], []]
    assert source.problems.counts == {"text that can't be read": 1}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", "image,web\na.png,IMG 1\nb.png,\n"),
        ("t.jsonl", '{"image": "a.png", "web": "IMG 1"}\n{"image": "b.png", "web": null}\n'),
    ],
)
def test_tables(tmp_path: Path, name: str, content: str) -> None:
    for key in ("a.png", "b.png"):
        (tmp_path / key).write_bytes(picture())
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match="a column named caption"):
        open_source(tmp_path / name)
    source = open_source(tmp_path / name, textless=True)
    assert source.keys == ["a.png", "b.png"] and not source.problems.total
    assert source.meta(0)["web"] == "IMG 1" and source.meta(1)["captions"] == []
