"""Shards: what is written is read back, and what is broken is skipped, counted and reported."""

from __future__ import annotations

import gzip
import io
import json
import logging
import multiprocessing
import os
import signal
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import webdataset
from PIL import Image

from tests.data.made import picture, said, tar, write
from vlm.data.shards import ShardSource, ShardWriter, find_shards, shard_pictures
from vlm.data.sources import open_source
from vlm.errors import DataError


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("VLM_CACHE", str(folder))
    return folder


@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_what_is_written_is_read(tmp_path: Path, ending: str) -> None:
    shards = write(tmp_path / f"a-{{:05d}}{ending}")
    assert [shard.name for shard in shards] == [f"a-0000{i}{ending}" for i in range(3)]
    source = ShardSource([str(shard) for shard in shards], name="a")
    assert len(source) == 5 and source.keys == ["k0", "k1", "k2", "k3", "k4"]
    assert source.concepts == ["c0", "c1", "c0", "c1", "c0"] and source.lengths.tolist() == [7] * 5
    assert source[3].image == picture(3) and source[3].meta["captions"] == ["thing 3"]
    assert source.meta(4) == {"captions": ["thing 4"], "concept": "c0"} and source.problems.total == 0


def test_bytes_are_the_same_each_time_and_content_decides_the_fingerprint(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one-{}.tar.gz", 4, 9), write(tmp_path / "two-{}.tar.gz", 4, 9)
    time.sleep(1.1)  # a date in seconds would show
    three = write(tmp_path / "three-{}.tar.gz", 4, 9)
    assert one[0].read_bytes() == two[0].read_bytes() == three[0].read_bytes()
    plain = write(tmp_path / "plain-{}.tar", 4, 1)
    marks = {ShardSource([str(p) for p in shards]).fingerprint() for shards in (one, plain)}
    assert len(marks) == 1
    other = write(tmp_path / "other-{}.tar", 3, 9)
    assert ShardSource([str(other[0])]).fingerprint() not in marks


def test_concept_falls_back_to_the_sample(tmp_path: Path) -> None:
    shard = tar(tmp_path / "a.tar", [("x.png", picture()), ("x.json", said("x"))])
    assert ShardSource([str(shard)]).concepts == ["sample:0:a:x"]


def test_a_changed_shard_is_indexed_anew(tmp_path: Path) -> None:
    shard = write(tmp_path / "a-{}.tar", 3, 9)[0]
    before = ShardSource([str(shard)])
    write(tmp_path / "a-{}.tar", 1, 9)
    assert len(ShardSource([str(shard)])) == 1
    shard.write_bytes(b"")
    with pytest.raises(DataError, match=r"a-0\.tar: sample k2 can't be read"):
        before[2]


def test_truncated_tar(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = write(tmp_path / "a-{}.tar", 5, 9)[0]
    whole = shard.read_bytes()
    for cut, kept in ((4 * 1024 + 100, 2), (4 * 1024 + 600, 2), (4 * 1024, 2), (5 * 1024 + 512, 2), (6 * 1024, 3)):
        shard.write_bytes(whole[:cut])
        os.utime(shard, ns=(cut, cut))
        with caplog.at_level(logging.WARNING, "vlm.data"):
            source = ShardSource([str(shard)])
        assert len(source) == kept, cut
        assert source.problems.counts["damaged shard, its readable part is used"] == 1, cut
        assert source[kept - 1].image == picture(kept - 1)
        assert "damaged shard" in caplog.text and "a-0" in caplog.text


def test_damaged_header_in_the_middle(tmp_path: Path) -> None:
    shard = write(tmp_path / "a-{}.tar", 5, 9)[0]
    content = bytearray(shard.read_bytes())
    content[4 * 1024 : 4 * 1024 + 200] = b"\xff" * 200
    shard.write_bytes(content)
    source = ShardSource([str(shard)])
    assert source.keys == ["k0", "k1"] and source.problems.total == 1


def test_truncated_gz(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "a-{}.tar.gz")) as writer:
        for i in range(40):
            writer.write(f"k{i}", picture() + os.urandom(5000), "png", {"captions": [f"{i}"]})
    shard = writer.shards[0]
    shard.write_bytes(shard.read_bytes()[:100_000])
    source = ShardSource([str(shard)])
    assert 10 < len(source) < 40
    assert any("damaged gzip" in place for places in source.problems.examples.values() for place in places)
    source[len(source) - 1]
    assert ShardSource([str(shard)]).problems.counts == source.problems.counts  # remembered with the cached copy


def test_several_gzip_members_in_one_file(tmp_path: Path) -> None:
    content = write(tmp_path / "a-{}.tar", 3, 9)[0].read_bytes()
    shard = tmp_path / "b.tar.gz"
    shard.write_bytes(gzip.compress(content[:1500]) + gzip.compress(content[1500:]))
    source = ShardSource([str(shard)])
    assert len(source) == 3 and not source.problems.total


BROKEN: list[tuple[str, list[tuple[str, bytes]], str]] = [
    ("broken JSON", [("b.png", picture()), ("b.json", b'{"captions": [')], "JSON or text can't be read"),
    ("deep JSON", [("b.png", picture()), ("b.json", b"[" * 200_000)], "JSON or text can't be read"),
    ("not UTF-8", [("b.png", picture()), ("b.txt", b"\xff\xfe\xff")], "JSON or text can't be read"),
    ("JSON list", [("b.png", picture()), ("b.json", b"[1]")], "JSON or text can't be read"),
    ("no picture", [("b.json", said("b"))], "no picture"),
    ("no text", [("b.png", picture())], "picture without JSON or text"),
    ("no caption", [("b.png", picture()), ("b.json", b'{"captions": ["  "]}')], "no caption"),
    ("key twice", [("a.png", picture(9)), ("a.json", said("again"))], "key of an earlier sample, the first is used"),
]


@pytest.mark.parametrize(("members", "reason"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_broken_samples_are_skipped_and_counted(tmp_path: Path, members: list[tuple[str, bytes]], reason: str) -> None:
    good = [("a.png", picture()), ("a.json", said("a"))]
    last = [("c.jpg", picture(3)), ("c.json", said("c"))]
    between = [("m.png", picture(5)), ("m.json", said("m"))]
    source = ShardSource([str(tar(tmp_path / "x.tar", good + between + members + last))])
    assert source.keys == ["a", "m", "c"] and source[2].image == picture(3)
    assert source.meta(0)["captions"] == ["a"]
    assert source.problems.counts == {reason: 1}
    assert source.problems.examples[reason][0].startswith("x/")


def test_member_twice_in_a_sample(tmp_path: Path) -> None:
    members = [
        ("a.png", picture(1)),
        ("a.json", said("a")),
        ("a.png", picture(2)),
        ("b.png", b"x"),
        ("b.json", said("b")),
    ]
    source = ShardSource([str(tar(tmp_path / "x.tar", members))])
    assert source.keys == ["a", "b"] and source[0].image == picture(1)
    assert source.problems.counts == {"member twice in one sample, the first is used": 1}


def test_caption_faults_are_counted_and_the_rest_kept(tmp_path: Path) -> None:
    meta = json.dumps({"captions": ["a dog", " ", "a dog", "half \ud83d pair"]}).encode()
    source = ShardSource([str(tar(tmp_path / "x.tar", [("a.png", picture()), ("a.json", meta)]))])
    assert source.meta(0)["captions"] == ["a dog", "half ? pair"]
    assert source.problems.counts == {
        "empty caption beside others, left out": 1,
        "same caption twice for one picture, kept once": 1,
    }


def test_text_members_nested_names_and_odd_members(tmp_path: Path) -> None:
    members = [
        ("dir.v1/a.jpg", picture()), ("dir.v1/a.txt", b"\xef\xbb\xbfa cat\n\nthe cat\n"),
        ("__meta__.json", b"{}"), ("b.PNG", picture(1)), ("b.JSON", said("b")), ("b.seg.png", b"mask"),
    ]  # fmt: skip
    source = ShardSource([str(tar(tmp_path / "x.tar", members))])
    assert source.keys == ["dir.v1/a", "b"] and source.meta(0)["captions"] == ["a cat", "the cat"]
    assert source[1].image == picture(1)


@pytest.mark.parametrize("content", [b"just text, no archive " * 100, b"\x1f\x8bnonsense"])
def test_what_is_no_tar(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.tar: not a tar archive"):
        ShardSource([str(path)])


def test_shards_without_samples_say_why(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", [("a.png", picture())])
    with pytest.raises(DataError, match=r"no samples in these shards .*1 x picture without JSON or text: x/a"):
        ShardSource([str(path)])


def test_a_damaged_shard_beside_a_good_one_isn_t_passed_over_as_empty(tmp_path: Path) -> None:
    good = tar(tmp_path / "x-0.tar", [("a.png", picture()), ("a.txt", b"a cat")])
    (tmp_path / "x-1.tar").write_bytes(good.read_bytes()[:700])
    with pytest.raises(DataError, match=r"x-1\.tar: no samples in these shards"):
        open_source([str(good), str(tmp_path / "x-1.tar")])


@pytest.mark.parametrize("content", [b"", bytes(10240), gzip.compress(b"")], ids=["no bytes", "no members", "gzip"])
def test_an_empty_shard_among_others_is_told(tmp_path: Path, content: bytes) -> None:
    full, hollow = write(tmp_path / "x-{}.tar", 1)[0], tmp_path / "x-1.tar"
    hollow.write_bytes(content)
    for spec in (str(tmp_path), str(tmp_path / "x-{0..1}.tar"), [str(full), str(hollow)], [str(hollow), str(full)]):
        source = open_source(spec)
        assert len(source) == 1 and source.problems.counts == {"shard without samples": 1}
        assert source.fingerprint() == open_source(full).fingerprint() and not source.problems.unread
    for lost in (str(hollow), [str(hollow), str(hollow)]):
        with pytest.raises(DataError, match=r"x-1\.tar: no samples in these shards .*shard without samples: x-1"):
            open_source(lost)


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"s-0000{i}.tar" for i in range(3)]
    for name in names:
        tar(tmp_path / name, [("a.png", picture()), ("a.json", said("a"))])
    (tmp_path / "notes.txt").write_text("not a shard")
    monkeypatch.chdir(tmp_path)
    here = [str(tmp_path / name) for name in names]
    assert find_shards(str(tmp_path)) == here
    assert find_shards(str(tmp_path / "s-*.tar")) == here
    assert find_shards("s-{00000..00002}.tar") == names
    assert find_shards("s-0000{0,2}.tar") == [names[0], names[2]]
    assert find_shards("s-00001.tar") == [names[1]]
    assert find_shards("pipe:cat s-00001.tar") == ["pipe:cat s-00001.tar"]
    assert find_shards("https://example.org/s-{0..1}.tar") == [f"https://example.org/s-{i}.tar" for i in (0, 1)]
    with pytest.raises(DataError, match=r"s-00003\.tar: no such shard"):
        find_shards("s-{00002..00003}.tar")
    with pytest.raises(DataError, match="no shards"):
        find_shards("t-*.tar")


def test_webdataset_reads_ours(tmp_path: Path) -> None:
    shards = write(tmp_path / "a-{}.tar", 4, 2) + write(tmp_path / "b-{}.tar.gz", 1, 2)
    for number, shard in enumerate(shards):
        read = list(webdataset.WebDataset(str(shard), shardshuffle=False).decode("pil"))
        assert read[0]["json"]["captions"] == [f"thing {number % 2 * 2}"]
        assert read[0]["png"].size == (5, 4)


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_we_read_webdatasets(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"w.{ending}"
    with webdataset.TarWriter(str(path)) as sink:
        for i in range(3):
            sink.write({"__key__": f"w{i}", "png": Image.new("RGB", (3, 2), (i, 0, 0)), "json": {"caption": f"w {i}"}})
        sink.write({"__key__": "w3", "jpg": picture(3), "txt": "in text"})
    source = ShardSource([str(path)])
    assert source.keys == ["w0", "w1", "w2", "w3"] and not source.problems.total
    assert source.meta(1)["captions"] == ["w 1"] and source.meta(3)["captions"] == ["in text"]
    with Image.open(io.BytesIO(source[2].image)) as image:
        assert image.getpixel((0, 0)) == (2, 0, 0)


def _write_and_hang(pattern: str, ready: Any) -> None:
    with ShardWriter(pattern, samples=2) as writer:
        for i in range(3):
            writer.write(f"k{i}", picture(i), "png", {"captions": ["x"]})
        ready.set()
        time.sleep(60)


def test_a_killed_writer_leaves_only_whole_shards(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=_write_and_hang, args=(str(tmp_path / "a-{}.tar"), ready))
    worker.start()
    assert ready.wait(30) and worker.pid
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    assert find_shards(str(tmp_path)) == [str(tmp_path / "a-0.tar")]
    assert len(ShardSource([str(tmp_path / "a-0.tar")])) == 2


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(RuntimeError), ShardWriter(str(folder / "a-{}.tar")) as writer:
        writer.write("k", picture(), "png", {"captions": ["x"]})
        raise RuntimeError("stop")
    assert not folder.exists()


BAD_WRITES: list[tuple[str, str, Any, str]] = [
    ("a.b", "png", {"captions": ["x"]}, "name without dots"),
    ("__a", "png", {"captions": ["x"]}, "name without dots"),
    ("a", "exe", {"captions": ["x"]}, "not a picture's ending"),
    ("a", "png", {"captions": []}, "no caption"),
    ("a", "png", {"captions": ["x"], "tags": {1, 2}}, "not JSON serializable"),
    ("k", "png", {"captions": ["x"]}, "in the shard already"),
]


@pytest.mark.parametrize(("key", "suffix", "meta", "message"), BAD_WRITES)
def test_the_writer_refuses_what_could_not_be_read(
    tmp_path: Path, key: str, suffix: str, meta: dict[str, Any], message: str
) -> None:
    with ShardWriter(str(tmp_path / "a-{}.tar")) as writer:
        writer.write("k", picture(), "png", {"captions": ["x"]})
        with pytest.raises(DataError, match=message):
            writer.write(key, picture(), suffix, meta)
    assert len(ShardSource([str(tmp_path / "a-0.tar")])) == 1


@pytest.mark.parametrize("pattern", ["a.tar", "a-{}.zip", "a-{name}.tar", "a-{:q}.tar"])
def test_the_writer_needs_a_numbered_name(pattern: str) -> None:
    with pytest.raises(DataError, match="expected a shard name with a number"):
        ShardWriter(pattern)


def test_pictures_without_texts_are_found(tmp_path: Path) -> None:
    path = tmp_path / "web.tar"
    pieces = {"a.png": b"first", "deep/b.JPG": b"second picture", "b.txt": b"a text", "c.json": b"{}"}
    with tarfile.open(path, "w") as tar:
        for name, content in pieces.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    found = shard_pictures(str(path))
    assert [one.name for one in found] == [f"{path}:a.png", f"{path}:deep/b.JPG"]
    assert [one.read() for one in found] == [b"first", b"second picture"]
    assert found[1].read(6) == b"second" and found[0].read(100) == b"first"
    packed = tmp_path / "web.tar.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert [one.read() for one in shard_pictures(str(packed))] == [b"first", b"second picture"]
    path.write_bytes(b"no tar at all" * 100)
    with pytest.raises(DataError, match=r"web\.tar: not a tar archive"):
        shard_pictures(str(path))


def test_numbers_go_on_from_the_first(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "a-{:05d}.tar"), samples=1, first=7) as writer:
        for key in ("x", "y"):
            writer.write(key, picture(), "png", {"captions": ["one"]})
    assert [path.name for path in writer.shards] == ["a-00007.tar", "a-00008.tar"]
