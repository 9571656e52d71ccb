"""Sources: every form that data come in, joined ones, the repository's own sets, and bad input."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.made import picture, write
from vlm.data.shards import ShardSource
from vlm.data.sources import BUILT_IN, FileSource, Joined, Label, data_dir, labels_table, open_source
from vlm.errors import DataError


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache and a working folder of the test's own."""
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VLM_DATA", raising=False)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def put(folder: Path, files: dict[str, bytes | str]) -> Path:
    """Write files below a folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return folder


def test_folder_with_texts_beside_the_pictures(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "b.png": picture(1), "b.txt": "\ufeffa bird\n\nthe bird\n",
        "deep/er/a.JPG": picture(2), "deep/er/a.txt": "an ant",
        "none.png": picture(3), "empty.png": picture(4), "empty.txt": " \n",
        "bad.png": picture(5), "bad.txt": b"\xff\xfe\xff", "alone.txt": "no picture",
        ".hidden/x.png": picture(6), "__MACOSX/._b.png": b"fork",
    }  # fmt: skip
    source = open_source(put(tmp_path / "set", files))
    assert source.keys == ["b.png", "deep/er/a.JPG"] and source.concepts == [f"sample:{key}" for key in source.keys]
    assert source.meta(0) == {"captions": ["a bird", "the bird"]} and source.lengths.tolist() == [7, 6]
    assert source[1].image == picture(2) and source[1].key == "deep/er/a.JPG"
    assert source.problems.counts == {
        "picture without a .txt file beside it": 1, "no caption": 1, "text that can't be read": 1,
    }  # fmt: skip


def test_class_folders(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "polar_bear/1.png": picture(1), "polar_bear/more/2.png": picture(2),
        "cat/1.png": picture(3), "x.png": picture(4),
    }  # fmt: skip
    source = open_source(str(put(tmp_path / "set", files)))
    assert source.keys == ["cat/1.png", "polar_bear/1.png", "polar_bear/more/2.png"]
    assert source.concepts == ["cat", "polar bear", "polar bear"]
    assert source.meta(2)["captions"] == ["polar bear"]
    assert source.problems.counts == {"picture without a .txt file beside it": 1}


def pictures(tmp_path: Path) -> Path:
    """A folder with three pictures for tables."""
    return put(tmp_path / "set", {"a.png": picture(1), "sub/b.png": picture(2), "c,d.png": picture(3)})


def test_csv(tmp_path: Path) -> None:
    rows = [
        "FilePath, Title ,concept,tags",
        "a.png,first,cat,\"x, y\"",
        "./a.png,second,cat,",
        "sub/b.png,\"with, comma\nand line\",dog,",
        '"c,d.png",three,,',
        "missing.png,gone,,",
        ",nameless,,",
        "a.png,,,",
        "a.png,first,,",
        "",
    ]  # fmt: skip
    table = pictures(tmp_path) / "t.csv"
    table.write_text("\ufeff" + "\r\n".join(rows), "utf-8", newline="")
    source = open_source(table)
    assert source.keys == ["a.png", "sub/b.png", "c,d.png"] and source.concepts == ["cat", "dog", "sample:c,d.png"]
    assert source.meta(0)["captions"] == ["first", "second"] and source.meta(0)["tags"] == ["x", "y"]
    assert source.meta(1)["captions"] == ["with, comma\nand line"] and source[2].image == picture(3)
    assert source.problems.counts == {
        "picture isn't there": 2, "no caption": 1, "same caption twice for one picture, kept once": 1,
    }  # fmt: skip
    assert source.problems.examples["picture isn't there"] == ["t.csv, row 7: missing.png", "t.csv, row 8: no name"]


@pytest.mark.parametrize(("name", "mark"), [("t.tsv", "\t"), ("t.csv", ";"), ("t.csv", "\t"), ("T.CSV", ",")])
def test_delimiters(tmp_path: Path, name: str, mark: str) -> None:
    table = pictures(tmp_path) / name
    table.write_text(f"image{mark}caption\na.png{mark}one\nsub/b.png{mark}two\n", "utf-8")
    assert [open_source(table).meta(i)["captions"] for i in (0, 1)] == [["one"], ["two"]]


def test_absolute_paths_in_a_table(tmp_path: Path) -> None:
    folder = pictures(tmp_path)
    table = put(tmp_path / "else", {"t.csv": f"image,caption\n{folder / 'a.png'},one\n"}) / "t.csv"
    assert open_source(table)[0].image == picture(1)


BAD_TABLES: list[tuple[str, bytes, str]] = [
    ("t.csv", b"", "found no columns"),
    ("t.csv", b"picture,caption\na.png,x\n", r"a column named image or filepath .*found picture, caption"),
    ("t.csv", b"image,words\na.png,x\n", r"a column named caption .*found image, words"),
    ("t.csv", b"url,caption\nhttp://x/a.png,x\n", "addresses aren't fetched"),
    ("t.csv", b"image,caption\na.png,\xff\xfe\n", "not UTF-8 text"),
    ("t.csv", b"image,caption\ngone.png,x\n", r"no usable picture there \(1 x picture isn't there: t\.csv, row 2"),
    ("t.csv", b"image,caption\n" + b"n" * 5000 + b".png,x\n", "picture isn't there"),
    ("t.csv", b'image,caption\na.png,"' + b"x" * 200_000 + b'"\n', "not a table after row 0"),
    ("t.csv", b'image,caption\na.png,x\na.png,"y\na.png,z\n', r't\.csv, row 3: a quote \("\) is opened and never'),
    ("t.csv", b'image,caption\na.png,x\na.png,"y', r't\.csv, row 3: a quote \("\) is opened and never'),
    ("t.csv", b'"image,caption\na.png,x\n', "a quote|a column named image"),
    ("t.jsonl", b"", "no usable picture"),
    ("t.jsonl", b"{}\n", "found no columns|no usable picture"),
    ("t.jsonl", b'{"url": "x", "caption": "x"}\n', "addresses aren't fetched"),
    ("t.jsonl", b'{"image": "a.png", "words": "x"}\n', "a column named caption .*found image, words"),
    ("t.jsonl", b'{"image": "a.png"', "1 x not a JSON object: t.jsonl, row 1"),
    ("missing.csv", b"", "No such file"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_TABLES)
def test_bad_tables(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    folder = pictures(tmp_path)
    if name != "missing.csv":
        (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        open_source(folder / name)
    assert name in str(raised.value)


def test_json_lines(tmp_path: Path) -> None:
    lines = [
        {"image": "a.png", "captions": ["one", "two"], "concept": "x"},
        {"file_name": "sub/b.png", "text": "three", "tags": ["t"]},
        {"image": "gone.png", "caption": "x"},
        {"image": ["a.png"], "caption": "x"},
        {"image": "a.png", "caption": "four"},
    ]
    broken = "\n\n[1, 2]\n{\n" + "[" * 100_000 + "\n"
    table = pictures(tmp_path) / "t.jsonl"
    table.write_text("\n".join(map(json.dumps, lines)) + broken, "utf-8")
    source = open_source(table)
    assert source.keys == ["a.png", "sub/b.png"] and source.concepts == ["x", "sample:sub/b.png"]
    assert source.meta(0)["captions"] == ["one", "two", "four"] and source.meta(1)["tags"] == ["t"]
    assert source.problems.counts == {"picture isn't there": 2, "not a JSON object": 3}
    assert source.problems.examples["not a JSON object"] == [f"t.jsonl, row {i}" for i in (7, 8, 9)]


def test_shards_in_every_form(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    shards = [str(path) for path in write(folder / "a-{:05d}.tar.gz", 5)]
    forms: list[str | list[str]] = [
        shards, ",".join(shards), str(folder), str(folder / "*.tar.gz"), str(folder / "a-{00000..00002}.tar.gz"),
        str(folder / "a-0000[0-2].tar.gz"),
    ]  # fmt: skip
    for form in forms:
        source = open_source(form)
        assert source.keys == [f"k{i}" for i in range(5)], form
        assert source[4].image == picture(4)
    assert open_source(shards[0]).keys == ["k0", "k1"]
    assert open_source(f"pipe:cat {shards[1]}").keys == ["k2", "k3"]


def test_joined(tmp_path: Path) -> None:
    shards = write(tmp_path / "a-{}.tar", 3, 9)
    table = pictures(tmp_path) / "t.csv"
    table.write_text("image,caption\na.png,one\ngone.png,x\nsub/b.png,two\n", "utf-8")
    source = open_source(f"{table}, {shards[0]}")
    assert isinstance(source, Joined) and len(source) == 5
    assert source.keys == ["a.png", "sub/b.png", "k0", "k1", "k2"]
    assert source.concepts == ["sample:0:a.png", "sample:0:sub/b.png", "c0", "c1", "c0"]
    assert source.lengths.tolist() == [3, 3, 7, 7, 7]
    assert [source.meta(i)["captions"][0] for i in range(5)] == ["one", "two", "thing 0", "thing 1", "thing 2"]
    assert [source[i].key for i in range(5)] == source.keys and source[4].image == picture(2)
    assert source.problems.total == 1
    for outside in (5, -1):
        with pytest.raises(IndexError):
            source[outside]
    turned = open_source([shards[0], table])
    assert turned.fingerprint() != source.fingerprint() == open_source([table, shards[0]]).fingerprint()


def test_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    table = pictures(tmp_path) / "t.csv"
    table.write_text("image,caption\na.png,one\nsub/b.png,two\n", "utf-8")
    first = open_source(table).fingerprint()
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    assert open_source(tmp_path / "copy" / "t.csv").fingerprint() == first
    changes: list[Callable[[], object]] = [
        lambda: table.write_text("image,caption\na.png,one\nsub/b.png,owt\n", "utf-8"),
        lambda: (tmp_path / "set" / "a.png").write_bytes(picture() + b"longer"),
    ]
    for change in changes:
        change()
        assert open_source(table).fingerprint() != first


def test_a_picture_that_goes_later(tmp_path: Path) -> None:
    table = pictures(tmp_path) / "t.csv"
    table.write_text("image,caption\na.png,one\n", "utf-8")
    source = open_source(table)
    (tmp_path / "set" / "a.png").unlink()
    with pytest.raises(DataError, match=r"a\.png: no such file"):
        source[0]
    with pytest.raises(DataError, match=r"t\.csv: .*a\.png"):
        source.fingerprint()


def test_sources_travel_to_other_processes(tmp_path: Path) -> None:
    shards = write(tmp_path / "a-{}.tar", 2, 9)
    table = pictures(tmp_path) / "t.csv"
    table.write_text("image,caption\na.png,one\n", "utf-8")
    source = pickle.loads(pickle.dumps(open_source([shards[0], table])))
    assert source[0].image == picture(0) and source[2].image == picture(1)


@pytest.mark.parametrize("spec", ["", " , ", []])
def test_nothing_named(spec: str | list[str]) -> None:
    with pytest.raises(DataError, match="no data was named; expected a folder of pictures"):
        open_source(spec)


def test_paths_that_are_nothing(tmp_path: Path) -> None:
    put(tmp_path, {"empty/readme.md": "x", "notes.docx": "x", "one.png": picture()})
    cases = {
        "nowhere": "no such file or folder; expected a folder of pictures",
        "human-trian": r"no such file or folder \(did you mean 'human-train'\?\)",
        "builtin:web-tain": r"no such set \(did you mean 'web-train'\?\), there are human-train",
        "nowhere.tar": "no such shard",
        "nowhere-{0..}.tar": "no such shard|braces can't be read",
        "nothing*.tar": "no shards",
        str(tmp_path / "empty"): "no usable picture there; expected",
        str(tmp_path / "notes.docx"): "not a kind of data that is known; expected",
        str(tmp_path / "one.png"): "not a kind of data that is known; expected",
    }
    for spec, message in cases.items():
        with pytest.raises(DataError, match=message):
            open_source(spec)


def repository(folder: Path) -> Path:
    """A data folder as the builder leaves it."""
    write(folder / "human-train-{:05d}.tar.gz", 3)
    write(folder / "openmoji" / "unseen-artist-{:05d}.tar.gz", 1)
    rows = 'concept\tname\tgroup\tflag\n1f600\tgrinning face\tsmileys\t0\n1f1e6\tquote " in it\tsymbols\t1\n'
    return put(folder, {"manifest.json": "{}", "labels.tsv": rows})


def test_built_in_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = repository(tmp_path / "there")
    monkeypatch.setenv("VLM_DATA", str(folder))
    assert data_dir() == folder
    source = open_source("human-train")
    assert isinstance(source, ShardSource) and len(source) == 3 and source.name == "human-train"
    assert open_source("builtin:human-train").fingerprint() == source.fingerprint()
    assert len(open_source("human-train,unseen-artist")) == 4
    with pytest.raises(DataError, match=r"no shards web-val-\*\.tar\* there; build them with `vlm data build`"):
        open_source("web-val")
    assert labels_table() == [
        Label("1f600", "grinning face", "smileys", False), Label("1f1e6", 'quote " in it', "symbols", True),
    ]  # fmt: skip


def test_where_the_built_in_sets_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = repository(Path.cwd() / "data")
    assert data_dir().resolve() == here
    put(Path.cwd() / "human-train", {"a_b/x.png": picture()})
    assert isinstance(open_source("./human-train"), FileSource)
    monkeypatch.setenv("VLM_DATA", str(tmp_path / "nowhere"))
    for call in (data_dir, labels_table, lambda: open_source("web-train")):
        with pytest.raises(DataError, match=r"isn't in .*nowhere: .*VLM_DATA.*vlm data build"):
            call()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (b"", "row 1: expected the columns concept, name, group, flag, found an empty file"),
        (b"concept,name\n", "row 1: expected the columns"),
        (b"concept\tname\tgroup\tflag\na\tb\tc\n", "row 2: expected concept"),
        (b"concept\tname\tgroup\tflag\na\tb\tc\tyes\n", "row 2: expected concept"),
        (b"\xff\xfe", "can't be read"),
    ],
)
def test_bad_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: bytes, message: str) -> None:
    monkeypatch.setenv("VLM_DATA", str(put(tmp_path / "d", {"manifest.json": "{}", "labels.tsv": rows})))
    with pytest.raises(DataError, match=message):
        labels_table()


def test_every_built_in_name_is_offered() -> None:
    with pytest.raises(DataError) as raised:
        open_source("nowhere")
    assert all(name in str(raised.value) for name in BUILT_IN)


def test_equal_file_names_of_two_folders_are_two_concepts(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(picture(1))
        (tmp_path / name / "1.txt").write_text(f"thing of {name}")
    source = open_source([tmp_path / "one", tmp_path / "two"])
    assert source.keys == ["1.png", "1.png"] and len(set(source.concepts)) == 2


def test_equal_shards_of_two_folders_are_told_apart(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        with tarfile.open(tmp_path / name / "00000.tar", "w") as tar:
            for member, content in (("000.png", picture(1)), ("000.txt", f"thing of {name}".encode())):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    joined = open_source([tmp_path / "one", tmp_path / "two"])
    assert joined.keys == ["000", "000"] and len(set(joined.concepts)) == 2
    together = open_source(str(tmp_path / "*" / "00000.tar"))
    assert together.keys == ["000", "000"] and len(set(together.concepts)) == 2
