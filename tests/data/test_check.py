"""`check_source` finds what was planted: hostile pictures, twins, shared captions, and counts the rest."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.data.made import picture
from vlm.data import check
from vlm.data.check import Report, Spread, check_source
from vlm.data.samples import Problems
from vlm.errors import DataError


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder of the test's own."""
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """A picture's file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def bomb() -> bytes:
    """A PNG whose header claims 20,000 x 20,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def noise(width: int, height: int) -> Image.Image:
    """A picture that doesn't compress."""
    return Image.frombytes("RGB", (width, height), os.urandom(width * height * 3))


def hostile(folder: Path) -> Path:
    """Whole and broken pictures, a row each."""
    frames = [noise(9, 9).convert("L") for _ in range(3)]
    jpeg = encoded(noise(64, 48), "JPEG")
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=50)
    files: dict[str, bytes] = {
        "whole.png": encoded(noise(30, 20), "PNG"),
        "dot.png": encoded(Image.new("RGB", (1, 1)), "PNG"),
        "cmyk.jpg": encoded(Image.new("CMYK", (12, 8), (9, 8, 7, 6)), "JPEG"),
        "moves.gif": gif,
        "cut-later.gif": gif[: len(gif) // 2],
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "bomb.png": bomb(),
        "empty.png": b"",
        "text.png": b"I am a text, not a picture\n" * 20,
    }
    folder.mkdir()
    lines = []
    for name, content in files.items():
        (folder / name).write_bytes(content)
        lines.append(json.dumps({"image": name, "caption": f"a picture called {name}", "licence": "CC0"}))
    (folder / "set.jsonl").write_text("\n".join(lines), "utf-8")
    return folder / "set.jsonl"


@pytest.mark.parametrize("workers", [0, 2])
def test_hostile_pictures(tmp_path: Path, workers: int) -> None:
    seen: list[tuple[int, int]] = []
    report = check_source(hostile(tmp_path / "set"), workers=workers, progress=lambda *at: seen.append(at))
    assert set(report.unreadable) == {"cut.jpg", "bomb.png", "empty.png", "text.png"}
    for key, word in {"cut.jpg": "truncated", "bomb.png": "limit", "empty.png": "empty", "text.png": "known"}.items():
        assert key in report.unreadable[key] and word in report.unreadable[key]
    assert report.samples == 9 and not report.ok and report.licences == {"CC0": 9}
    assert report.modes["CMYK"] == 1 and report.formats == {"PNG": 2, "GIF": 2, "JPEG": 1}
    assert report.animated == 2
    assert report.widths == Spread(1, 9, 26.4, 30) and (report.heights.min, report.heights.max) == (1, 20)
    assert seen == [(i, 9) for i in range(1, 10)]
    text = report.text()
    assert "not whole" in text and "bomb.png: more pixels than the limit" in text and "CC0 9" in text


def table(folder: Path, rows: list[tuple[bytes, list[str]]]) -> Path:
    """A JSON-lines set."""
    folder.mkdir()
    lines = []
    for number, (content, captions) in enumerate(rows):
        (folder / f"{number}.png").write_bytes(content)
        lines.append(json.dumps({"image": f"{number}.png", "captions": captions, "concept": f"c{number % 2}"}))
    (folder / "t.jsonl").write_text("\n".join(lines), "utf-8")
    return folder / "t.jsonl"


def test_texts_twins_and_counts(tmp_path: Path) -> None:
    long = "unbelievable " * 100
    rows = [
        (picture(1), ["a dog"]), (picture(2), ["A dog.", "a cat"]), (picture(1), ["bird", "bird"]),
        (picture(3), ["a cat", long]), (picture(1), ["bird"]),
    ]  # fmt: skip
    report = check_source(table(tmp_path / "set", rows), workers=0)
    assert report.samples == 5 and report.concepts == 2 and report.captions == 7
    assert report.captions_per_picture == Spread(1, 1, 2, 2)
    assert report.characters.min == 4 and report.characters.median == 5 and report.characters.max == len(long.strip())
    assert report.tokens.min == 3 and report.tokens.median == 4
    assert report.tokens.max == 102  # "unbelievable" is one token; far over the tokenizer's usual 64
    assert report.identical == [["0.png", "2.png", "4.png"]]
    assert report.shared_captions == {"A dog.": 2, "a cat": 2, "bird": 2}
    assert report.problems.counts == {"same caption twice for one picture, kept once": 1}
    assert not report.ok and report.licences == {"not given": 5}
    assert report.bytes == sum(len(content) for content, _ in rows)
    assert "2 more than once (0.png = 2.png = 4.png)" in report.text()


def test_a_whole_set_is_ok_and_its_report_is_json(tmp_path: Path) -> None:
    report = check_source(table(tmp_path / "set", [(picture(i), [f"thing {i}"]) for i in range(200)]), workers=2)
    assert report.ok and report.text().splitlines()[0].endswith(": whole")
    read = json.loads(json.dumps(report.as_dict()))
    assert (
        read["ok"] is True and read["samples"] == 200 and read["widths"] == {"min": 5, "median": 5, "p95": 5, "max": 5}
    )
    assert read["problems"] == {"total": 0, "counts": {}, "examples": {}} and len(read["fingerprint"]) == 64
    assert read["unreadable"] == {} and read["identical"] == [] and read["modes"] == {"RGB": 200}


def test_the_worker_count_changes_nothing(tmp_path: Path) -> None:
    spec = hostile(tmp_path / "set")
    other = table(tmp_path / "other", [(picture(i % 70), [f"thing {i}"]) for i in range(150)])
    one, two = (check_source([spec, other], workers=n).as_dict() for n in (0, 2))
    assert one == two and len(one["identical"]) == 70


def test_what_a_source_left_out_makes_it_not_ok(tmp_path: Path) -> None:
    path = table(tmp_path / "set", [(picture(i), [f"thing {i}"]) for i in range(3)])
    (path.parent / "1.png").unlink()
    report = check_source(path, workers=0)
    assert report.samples == 2 and not report.ok and not report.unreadable
    assert "1 x picture isn't there: t.jsonl, row 2: 1.png" in report.text()


def test_same_key_in_two_parts(tmp_path: Path) -> None:
    parts = [table(tmp_path / name, [(b"broken", ["x"]), (picture(), ["y"])]) for name in ("one", "two")]
    report = check_source(parts, workers=0)
    assert sorted(report.unreadable) == ["0.png", "0.png (sample 2)"]


def test_all_unreadable(tmp_path: Path) -> None:
    report = check_source(table(tmp_path / "set", [(b"", ["x"])]), workers=0)
    assert list(report.unreadable) == ["0.png"] and report.widths == Spread(0, 0, 0, 0) and not report.ok


def _die(source: Any, number: int) -> None:
    os._exit(3)


def test_a_crashing_decoder_is_an_error_not_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table(tmp_path / "set", [(picture(), ["x"])])
    monkeypatch.setattr(check, "_picture", _die)
    with pytest.raises(DataError, match="a process that decodes pictures was killed or crashed"):
        check_source(path, workers=1)


def test_bad_options(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        check_source(tmp_path / "nowhere")
    with pytest.raises(DataError, match="workers must be at least 0, got -1"):
        check_source(tmp_path, workers=-1)


def test_long_lists_are_cut_in_the_text() -> None:
    report = Report("many", 100, Problems(), unreadable={f"k{i}": f"k{i}: broken" for i in range(100)})
    text = report.text()
    assert "unreadable          100" in text and "k19: broken" in text and "k20" not in text and "..." in text
