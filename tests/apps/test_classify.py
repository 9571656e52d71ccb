"""`vlm classify`: what it prints is what the classifier says; bad pictures and options are answered."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import pytest

import vlm
from tests.apps.conftest import Run

LABELS = ["red", "green", "blue sky"]


def expected(model: str, path: Path, templates: str = "none", top_k: int = 5) -> list[tuple[str, float]]:
    found = vlm.ZeroShotClassifier(vlm.load(model, device="cpu"), LABELS, templates).predict(path, top_k=top_k)
    return [(prediction.label, round(prediction.score, 6)) for prediction in found]


def lines_of(text: str) -> list[tuple[str, list[tuple[str, float]]]]:
    rows = [json.loads(line) for line in text.splitlines()]
    return [(row["path"], [(p["label"], p["score"]) for p in row["predictions"]]) for row in rows]


@pytest.fixture
def classify(run: Run, model: str) -> Run:
    return lambda *rest: run("classify", *rest, "--model", model, "--device", "cpu")


def test_jsonl(classify: Run, model: str, pictures: Path) -> None:
    done = classify(pictures, "-l", "red, green,blue sky", "-f", "jsonl", "--batch-size", 2)
    assert done.code == 0 and not done.err
    found = lines_of(done.out)
    assert [path for path, _ in found] == [str(path) for path in sorted(pictures.iterdir())]
    for path, predictions in found:
        assert [label for label, _ in predictions] == [label for label, _ in expected(model, Path(path))]
        assert dict(predictions) == pytest.approx(dict(expected(model, Path(path))), abs=1e-5)


def test_csv(classify: Run, model: str, pictures: Path) -> None:
    done = classify(pictures / "red.png", pictures / "blue.png", "-l", ",".join(LABELS), "-f", "csv", "-k", 2)
    rows = list(csv.reader(io.StringIO(done.out)))
    assert rows[0] == ["path", "rank", "label", "score"] and len(rows) == 5
    first = expected(model, pictures / "red.png", top_k=2)
    assert rows[1][:3] == [str(pictures / "red.png"), "1", first[0][0]]
    assert float(rows[1][3]) == pytest.approx(first[0][1], abs=1e-5)
    assert [row[1] for row in rows[1:]] == ["1", "2", "1", "2"]


def test_table(classify: Run, model: str, pictures: Path) -> None:
    done = classify(pictures / "red.png", "-l", ",".join(LABELS))
    label, score = expected(model, pictures / "red.png")[0]
    lines = done.out.splitlines()
    assert lines[0] == str(pictures / "red.png")
    assert lines[1].split("  ")[1].strip() == label and f"{100 * score:.1f} %" in lines[1]
    assert len(lines) == 4


def test_a_file_of_labels_and_of_templates(classify: Run, model: str, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("\ufeffred\n\n green \nblue sky\n", encoding="utf-8")
    (tmp_path / "sentences").write_text("a drawing of {}\n", encoding="utf-8")
    where = (pictures / "red.png", "--labels-file", tmp_path / "labels.txt", "-f", "jsonl")
    by_file = classify(*where, "--templates", tmp_path / "sentences")
    by_name = classify(*where, "--templates", "drawing")
    by_sentence = classify(*where, "--templates", "a drawing of {label}")
    assert by_file.out == by_name.out == by_sentence.out
    found = dict(lines_of(by_file.out)[0][1])
    assert found == pytest.approx(dict(expected(model, pictures / "red.png", "drawing")), abs=1e-5)
    assert found != pytest.approx(dict(expected(model, pictures / "red.png")), abs=1e-3)


def test_a_set_wins_over_a_file_of_its_name(
    classify: Run, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "drawings").write_text("no placeholder\n", encoding="utf-8")
    assert classify(pictures / "red.png", "-l", "red", "--templates", "drawings").code == 0


def test_globs_lists_and_folders_name_each_picture_once(
    classify: Run, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pictures / "deep").mkdir()
    (pictures / "red.png").rename(pictures / "deep" / "RED.PNG")
    (pictures / "notes.txt").write_text("not a picture")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{pictures / 'blue.png'}\n\n"))
    done = classify("-", pictures / "*.png", pictures, "-l", "a,b", "-f", "jsonl")
    assert done.code == 0, done.err
    names = [Path(path).name for path, _ in lines_of(done.out)]
    assert names == ["blue.png", "green.png", "purple.png", "yellow.png", "RED.PNG"]


def test_output_appears_whole(classify: Run, pictures: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "found.jsonl"
    done = classify(pictures, "-l", "a,b", "-f", "jsonl", "-o", file)
    assert (done.code, done.out) == (0, "")
    assert len(lines_of(file.read_text("utf-8"))) == 5
    assert [path.name for path in file.parent.iterdir()] == ["found.jsonl"]


def test_some_unreadable(classify: Run, pictures: Path) -> None:
    (pictures / "cut.png").write_bytes((pictures / "red.png").read_bytes()[:40])
    (pictures / "text.png").write_text("hello")
    done = classify(pictures, pictures / "gone.png", "-l", "a,b", "-f", "jsonl", "--batch-size", 2)
    assert done.code == 1
    assert len(lines_of(done.out)) == 5
    skipped = [line for line in done.err.splitlines() if line.startswith("skipped: ")]
    assert [name in line for name, line in zip(["cut.png", "text.png", "gone.png"], skipped, strict=True)] == [True] * 3
    assert "3 of 8 pictures" in done.err


def test_none_readable(classify: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"")
    file = tmp_path / "out.csv"
    done = classify(tmp_path / "bad.png", tmp_path / "gone.png", "-l", "a,b", "-f", "csv", "-o", file)
    assert done.code == 2 and "no picture could be read" in done.err and not done.out
    assert not file.exists()


@pytest.mark.skipif(os.name != "posix", reason="names of bytes are POSIX's")
def test_a_name_of_odd_bytes(classify: Run, pictures: Path, tmp_path: Path) -> None:
    odd = os.fsencode(pictures) + b"/r\xffd.png"
    try:
        os.rename(os.fsencode(pictures / "red.png"), odd)
    except OSError:
        pytest.skip("the file system takes no such name")
    file = tmp_path / "out.jsonl"
    assert classify(pictures, "-l", "a,b", "-f", "jsonl", "-o", file).code == 0
    assert any(path == os.fsdecode(odd) for path, _ in lines_of(file.read_text("utf-8")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-l", ""), "none were given"),
        ((), "none were given"),
        (("-l", "a,,b"), "number 2 is blank"),
        (("-l", "a,b,a"), "more than once: a"),
        (("-l", "a", "--labels-file", "x"), "both were given"),
        (("--labels-file", "gone.txt"), "gone.txt: the labels can't be read"),
        (("--labels-file", "empty.txt"), "holds no labels"),
        (("--labels-file", "binary.txt"), "UTF-8"),
        (("--labels-file", "."), "can't be read"),
        (("-l", "a", "-f", "tabel"), "did you mean 'table'"),
        (("-l", "a", "-k", "0"), "--top-k"),
        (("-l", "a", "--batch-size", "0"), "--batch-size"),
        (("-l", "a", "--templates", "imagnet"), "did you mean 'imagenet'"),
        (("-l", "a", "--templates", "{} {}"), "{} once"),
        (("-l", "a", "--templates", "binary.txt"), "UTF-8"),
        (("-l", "a", "-o", "."), "is a folder"),
        (("-l", "a", "-o", "empty.txt/x"), "empty.txt is no folder that you may write in"),
        (("", "-l", "a"), "path is empty"),
    ],
)
def test_bad_options(
    classify: Run, pictures: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(pictures)
    (pictures / "empty.txt").write_text("\n \n")
    (pictures / "binary.txt").write_bytes(b"\xff\xfe\x00cat\x80")
    done = classify("red.png", *options)
    assert done.code == 2 and message in done.err, done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("place", "message"),
    [("empty", "no pictures in this folder"), ("*.jpg", "no file matches"), ("-", "standard input")],
)
def test_nowhere(classify: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    done = classify(place, "-l", "a,b")
    assert done.code == 2 and message in done.err


def test_no_such_model(run: Run, pictures: Path) -> None:
    done = run("classify", pictures, "-l", "a,b", "--model", "tiny-klip")
    assert done.code == 2 and "tiny-klip" in done.err and "open_clip:ARCH/TAG" in done.err


@pytest.mark.parametrize(
    ("device", "message"),
    [("gpu9", "expected auto, cpu, cuda or cuda:N"), ("meta", "can't compute on it here"), ("cuda:99", "GPU")],
)
def test_no_such_device(run: Run, model: str, pictures: Path, device: str, message: str) -> None:
    done = run("classify", pictures, "-l", "a,b", "--model", model, "--device", device)
    assert done.code == 2 and f"device '{device}'" in done.err and message in done.err


def test_a_result_never_replaces_a_picture(run: Run, model: str, pictures: Path) -> None:
    before = (pictures / "red.png").read_bytes()
    done = run("classify", pictures, "-l", "red,blue", "-m", model, "-o", pictures / "red.png")
    assert done.code == 2 and "is one of the inputs" in done.err
    assert (pictures / "red.png").read_bytes() == before
