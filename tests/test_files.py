"""Files and folders appear whole, or what stood there stays."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from typing import BinaryIO

import pytest

from vlm.errors import DataError, TrainingError
from vlm.files import make_once, write_file, write_folder, write_text


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


def _make(target: Path, marks: Path) -> None:
    def fill(folder: Path) -> None:
        (marks / str(os.getpid())).touch()
        time.sleep(0.3)
        (folder / "a").write_text("whole")

    make_once(target, fill)
    if (target / "a").read_text() != "whole":
        raise SystemExit(1)


def test_one_process_makes_a_folder_that_others_wait_for(tmp_path: Path) -> None:
    target, marks = tmp_path / "deep" / "made", tmp_path / "marks"
    marks.mkdir()
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=_make, args=(target, marks)) for _ in range(4)]
    for one in others:
        one.start()
    for one in others:
        one.join(30)
    assert [one.exitcode for one in others] == [0] * 4
    assert len(list(marks.iterdir())) == 1
    assert [path.name for path in target.parent.iterdir() if not path.name.startswith(".lock")] == ["made"]


def test_what_fails_leaves_no_folder(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyError("half-way")

    with pytest.raises(KeyError, match="half-way"):
        make_once(tmp_path / "made", fill)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".lock")] == []
