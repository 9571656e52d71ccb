"""Files and folders appear whole, or what stood there stays."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import pytest

from vlm.errors import DataError, TrainingError
from vlm.files import write_file, write_folder, write_text


def full(file: BinaryIO) -> None:
    file.write(b"half")
    raise OSError(28, "No space left on device")


def test_a_full_disk_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    assert write_file(path, lambda file: file.write(b"whole")) == 5
    with pytest.raises(DataError, match=r"file: can't be written \(No space left on device\); do this"):
        write_file(path, full, advice="; do this")
    assert path.read_bytes() == b"whole" and list(path.parent.iterdir()) == [path]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_a_pipe_is_written_into(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_text(pipe, "through")
        assert os.read(reading, 100) == b"through"
    finally:
        os.close(reading)
    assert pipe.is_fifo()


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="this system has no /dev/full")
def test_a_device_that_is_full() -> None:
    with pytest.raises(DataError, match=r"/dev/full: can't be written \(No space left on device\)"):
        write_text(Path("/dev/full"), "x")
    assert Path("/dev/full").is_char_device()


def test_a_text_of_any_characters(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "d\udcffog")
    assert (tmp_path / "a").read_text("utf-8") == "d\\udcffog"
    with pytest.raises(TrainingError, match="can't be written"):
        write_text(tmp_path / "a" / "b", "x", error=TrainingError)


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    write_folder(target, lambda new: (new / "first").write_text("1") and None)
    write_folder(target, lambda new: (new / "second").write_text("2") and None)
    assert [path.name for path in target.iterdir()] == ["second"]

    def broken(new: Path) -> None:
        (new / "third").write_text("3")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_folder(target, broken)
    assert [path.name for path in target.iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
