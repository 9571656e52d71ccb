"""The cache of shards: unpacked or fetched once, whole or not at all."""

from __future__ import annotations

import gzip
import io
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from tests.data.made import picture, write
from vlm.data import cache
from vlm.data.shards import ShardSource
from vlm.errors import DataError


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("VLM_CACHE", str(folder))
    return folder


def test_gz_is_unpacked_once(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = str(write(tmp_path / "a-{}.tar.gz", 3, 9)[0])
    ShardSource([shard])
    unpacked = list((store / "shards").glob("*.tar"))
    assert len(unpacked) == 1
    monkeypatch.setattr(cache, "_gunzip", lambda *_: pytest.fail("unpacked again"))
    assert len(ShardSource([shard])) == 3


def test_a_cached_copy_that_was_cut_is_made_again(tmp_path: Path, store: Path) -> None:
    shard = str(write(tmp_path / "a-{}.tar.gz", 3, 9)[0])
    ShardSource([shard])
    (copy,) = (store / "shards").glob("*.tar")
    copy.write_bytes(copy.read_bytes()[:700])
    assert ShardSource([shard])[2].image == picture(2)


def test_a_broken_index_is_made_again(tmp_path: Path, store: Path) -> None:
    shard = str(write(tmp_path / "a-{}.tar", 3, 9)[0])
    ShardSource([shard])
    (index,) = (store / "index").iterdir()
    index.write_text("{")
    assert len(ShardSource([shard])) == 3


def test_zeros_that_unpack_to_much_are_written_in_pieces() -> None:
    packed = gzip.compress(b"\0" * (40 << 20))
    pieces = list(cache._blocks(io.BytesIO(packed)))
    assert sum(map(len, pieces)) == 40 << 20 and max(map(len, pieces)) <= 4 << 20


def _unpack(place: str, folder: str, queue: Any) -> None:
    os.environ["VLM_CACHE"] = folder
    source = ShardSource([place])
    queue.put([len(source), source[len(source) - 1].key])


def test_unpacking_at_once_is_safe(tmp_path: Path, store: Path) -> None:
    shard = str(write(tmp_path / "a-{}.tar.gz", 50, 99)[0])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_unpack, args=(shard, str(store), queue)) for _ in range(6)]
    for worker in workers:
        worker.start()
    assert [queue.get(timeout=30) for _ in workers] == [[50, "k49"]] * 6
    for worker in workers:
        worker.join()
    assert len(list((store / "shards").iterdir())) == 2  # the tar and its note


def test_an_unwritable_cache_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "file"))
    packed = write(tmp_path / "a-{}.tar.gz", 1, 9)[0]
    with pytest.raises(DataError, match="VLM_CACHE=/some/folder"):
        ShardSource([str(packed)])
    plain = write(tmp_path / "a-{}.tar", 1, 9)[0]
    assert len(ShardSource([str(plain)])) == 1  # only its index isn't kept


def test_fetched_shards(tmp_path: Path) -> None:
    for ending in ("tar", "tar.gz"):
        shard = write(tmp_path / f"a-{{}}.{ending}", 3, 9)[0]
        place = f"pipe:cat {shard}"
        assert len(ShardSource([place])) == 3
        shard.unlink()
        assert ShardSource([place])[2].image == picture(2)  # from the cache
        with pytest.raises(DataError, match=r"can't be fetched|nothing came back"):
            ShardSource([f"pipe:cat {shard} 2>&-"])


def test_an_error_page_is_not_kept(tmp_path: Path, store: Path) -> None:
    page = tmp_path / "page"
    page.write_text("<html>not found</html>" * 100)
    with pytest.raises(DataError, match="not a tar archive"):
        ShardSource([f"pipe:cat {page}"])
    assert list((store / "shards").iterdir()) == []


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("VLM_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_dir() == tmp_path / "xdg" / "vlm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_dir() == Path.home() / ".cache" / "vlm"
