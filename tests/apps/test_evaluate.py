"""`vlm eval`: files that hold what the tasks say, on folders and on an emoji set."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

import vlm
from tests.apps.conftest import Run
from tests.tasks.fused import fused_model, pair_model
from tests.tasks.small import class_folders, noise, plain
from vlm.data.sources import open_source
from vlm.tasks.evaluate import evaluate_zero_shot
from vlm.tasks.matching import evaluate_matching
from vlm.tasks.retrieval import evaluate_retrieval

COLUMNS = "concept\tname\tgroup\tflag\n"


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    counts = {"red_apple": ["red", "red", "yellow"], "grass": ["green"], "sky": ["blue", "blue"]}
    return class_folders(tmp_path / "classes", counts)


@pytest.fixture
def emoji(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An emoji set of three concepts, one of them a flag, and the repository's table of four labels."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "manifest.json").write_text("{}")
    rows = ["1\tred heart\tx\t0", "2\tgreen frog\tx\t0", "3\tblue flag\tflags\t1", "4\twolf\tx\t0"]
    (data / "labels.tsv").write_text(COLUMNS + "\n".join(rows) + "\n", encoding="utf-8")
    monkeypatch.setenv("VLM_DATA", str(data))
    folder = tmp_path / "emoji"
    folder.mkdir()
    lines = []
    for number, colour in enumerate(["red", "green", "blue", "red"], 1):
        plain(colour).save(folder / f"{number}.png")
        meta = {"captions": ["a name"], "concept": str(number % 4 or 1), "emoji": "x", "name": "a name"}
        lines.append(json.dumps({"image": f"{number}.png", **meta}))
    (folder / "set.jsonl").write_text("\n".join(lines))
    return folder / "set.jsonl"


def test_zero_shot_on_class_folders(run: Run, model: str, classes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("eval", "zero-shot", "-d", classes, "-m", model, "-k", "2,1", "--out", out, "--device", "cpu")
    assert done.code == 0, done.err
    labels = ["grass", "red apple", "sky"]
    report = evaluate_zero_shot(vlm.load(model, device="cpu"), open_source(classes), labels, depths=(1, 2))
    written = json.loads((out / "report.json").read_text("utf-8"))
    assert written == report.as_dict() | {"template_set": "auto", "flags": True}
    assert written["labels"] == 3 and written["pictures"] == 6
    assert f"{100 * report.top[2].value:.1f} [" in done.out and "66.67" in done.out
    rows = list(csv.DictReader((out / "per_class.csv").open(encoding="utf-8")))
    assert [(row["label"], row["pictures"]) for row in rows] == [("grass", "1"), ("red apple", "3"), ("sky", "2")]
    assert Image.open(out / "confusion.png").format == "PNG"
    assert sorted(path.name for path in out.iterdir()) == ["confusion.png", "per_class.csv", "report.json"]


def test_a_file_of_labels(run: Run, model: str, classes: Path, tmp_path: Path) -> None:
    (tmp_path / "labels").write_text("sky\nsea\ngrass\n")
    done = run("eval", "zero-shot", "-d", classes, "-m", model, "--labels-from", tmp_path / "labels")
    assert done.code == 0, done.err
    assert "3 pictures, 3 labels" in done.out and "not counted: 3 (no label)" in done.out


def test_emoji_sets_ask_for_all_names(run: Run, model: str, emoji: Path, tmp_path: Path) -> None:
    whole = run("eval", "zero-shot", "-d", emoji, "-m", model, "--out", tmp_path / "whole")
    assert whole.code == 0, whole.err
    assert "4 pictures, 4 labels" in whole.out
    rows = list(csv.DictReader((tmp_path / "whole" / "per_class.csv").open(encoding="utf-8")))
    counts = {row["label"]: row["pictures"] for row in rows}
    assert counts == {"red heart": "2", "green frog": "1", "blue flag": "1"}
    bare = run("eval", "zero-shot", "-d", emoji, "-m", model, "--no-flags", "--out", tmp_path / "bare")
    assert "3 pictures, 4 labels" in bare.out and "not counted: 1 (not kept)" in bare.out
    assert json.loads((tmp_path / "bare" / "report.json").read_text("utf-8"))["flags"] is False


def test_flags_can_be_left_out_whatever_the_labels(run: Run, model: str, emoji: Path, tmp_path: Path) -> None:
    (tmp_path / "labels").write_text("a name\nanother\n")
    done = run("eval", "zero-shot", "-d", emoji, "-m", model, "--labels-from", tmp_path / "labels", "--no-flags")
    assert "3 pictures, 2 labels" in done.out


def test_no_flags_elsewhere_is_refused(run: Run, model: str, classes: Path) -> None:
    done = run("eval", "zero-shot", "-d", classes, "-m", model, "--no-flags")
    assert done.code == 2 and "--no-flags" in done.err


def test_retrieval(run: Run, model: str, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for number, picture in enumerate(noise(12)):
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"thing {number}")
    where = ("eval", "retrieval", "-d", folder, "-m", model, "--device", "cpu", "--seed", 3)
    done = run(*where, "--gallery", 6, "--out", tmp_path / "out")
    assert done.code == 0 and "2 galleries of 6" in done.out and not done.err
    report = evaluate_retrieval(vlm.load(model, device="cpu"), open_source(folder), gallery=6, seed=3)
    written = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert written == report.as_dict() | {"distractors": "", "seed": 3}
    small = run(*where)
    assert "1 gallery of 12" in small.out and "--distractors" in small.err


def test_retrieval_with_re_ranking(run: Run, classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm.weights.load.load", lambda name, **_: {"fused": fused_model, "pairs": pair_model}[name]())
    where = ("eval", "retrieval", "-d", classes, "--gallery", 3, "--galleries", 1, "--out", tmp_path / "out", "-m")
    done = run(*where, "fused", "--rerank", 2, "--score", "itm+itc")
    assert done.code == 0, done.err
    assert "2 re-ranked by itm+itc, %" in done.out and "1 gallery of 3" in done.out
    written = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert written["score"] == "itc"
    assert (written["rerank"]["k"], written["rerank"]["score"]) == (2, "itm+itc")
    assert f"pairs run: {written['rerank']['pairs']}" in done.out
    whole = run(*where, "pairs")
    assert whole.code == 0 and "pairs run: 9" in whole.out and "by itm, %" in whole.out
    assert "9 pairs of a picture and a text to run, each whole: a smaller --gallery than 3 has fewer" in whole.err
    assert run(*where, "pairs", "--rerank", 2).code == 2
    wrong = run(*where, "fused", "--rerank", 2, "--score", "mean")
    assert wrong.code == 2 and "itm+itc" in wrong.err


def test_matching(run: Run, model: str, classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "has no match" in run("eval", "matching", "-d", classes, "-m", model).err
    monkeypatch.setattr("vlm.weights.load.load", lambda *_, **__: pair_model())
    done = run("eval", "matching", "-d", classes, "-m", "pairs", "--seed", 4, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    report = evaluate_matching(pair_model(), open_source(classes), seed=4)
    written = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert written == report.as_dict() | {"seed": 4} and written["order"]["count"] == 6
    assert "6 pictures, each with two texts" in done.out
    assert f"{100 * report.order.value:.1f} [" in done.out and f"{100 * report.accuracy.value:.1f} [" in done.out
    gone = run("eval", "matching", "-d", tmp_path / "gone", "-m", "pairs")
    assert gone.code == 2 and "gone" in gone.err


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("zero-shot", ()),
        ("prompts", ("--sets", "none")),
        ("retrieval", ("--gallery", 3, "--rerank", 2)),
        ("matching", ()),
    ],
)
def test_unreadable_pictures_are_told_and_the_figures_written(
    run: Run, classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, options: tuple[object, ...]
) -> None:
    """Exit status 1, as of `vlm classify`: a script must not take figures for those of the whole set."""
    monkeypatch.setattr("vlm.weights.load.load", lambda *_, **__: fused_model())
    where = ("eval", command, "-d", classes, "-m", "fused", *options, "--out", tmp_path / "out")
    whole = run(*where)
    assert whole.code == 0 and "could not be read" not in whole.err
    (tmp_path / "out" / "report.json").unlink()
    (classes / "sky" / "broken.png").write_bytes(b"no picture")
    done = run(*where)
    assert done.code == 1 and "1 picture (or ends of shards) could not be read" in done.err
    assert json.loads((tmp_path / "out" / "report.json").read_text("utf-8")) and "|" in done.out


def test_references_whose_pictures_are_gone_are_told(run: Run, tmp_path: Path) -> None:
    lines = [json.dumps({"image": f"{name}.png", "caption": f"a {name} thing"}) for name in ("red", "blue", "gone")]
    for name in ("red", "blue"):
        plain(name).save(tmp_path / f"{name}.png")
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    (tmp_path / "said.jsonl").write_text("\n".join(lines[:2]))
    where = ("eval", "captions", tmp_path / "said.jsonl", "--out", tmp_path / "out", "--data")
    done = run(*where, tmp_path / "all.jsonl")
    assert done.code == 1 and "1 picture (or ends of shards) could not be read" in done.err
    assert json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))["pictures"] == 2
    assert run(*where, tmp_path / "said.jsonl").code == 0


def test_a_score_without_re_ranking_is_refused(run: Run, model: str, classes: Path) -> None:
    done = run("eval", "retrieval", "-d", classes, "-m", model, "--score", "itm+itc")
    assert done.code == 2 and "rerank is 0" in done.err


def test_re_ranking_needs_a_model_that_can(run: Run, model: str, classes: Path) -> None:
    done = run("eval", "retrieval", "-d", classes, "-m", model, "--rerank", 8)
    assert done.code == 2 and "has no match; ViLT, ALBEF" in done.err


def test_prompts(run: Run, model: str, classes: Path, tmp_path: Path) -> None:
    done = run(
        "eval",
        "prompts",
        "-d",
        classes,
        "-m",
        model,
        "--sets",
        "none,drawing,drawings",
        "-k",
        "1",
        "--out",
        tmp_path / "o",
    )
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].count("|") == 5 and "against none" in lines[0]
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["none", "drawing", "drawings"]
    rows = json.loads((tmp_path / "o" / "report.json").read_text("utf-8"))["rows"]
    assert rows[0]["top-1 against none"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert [row["count"] for row in rows] == [1, 1, 12]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("zero-shot", "-d", "gone"), "gone"),
        (("zero-shot", "-d", "classes", "-k", "0"), "--top-k"),
        (("zero-shot", "-d", "classes", "-k", "one"), "--top-k"),
        (("zero-shot", "-d", "classes", "-k", ","), "--top-k"),
        (("zero-shot", "-d", "classes", "--templates", "nothing"), "no set of that name"),
        (("zero-shot", "-d", "classes", "--labels-from", "gone.txt"), "gone.txt"),
        (("zero-shot", "-d", "classes", "--out", "file"), "expected a folder"),
        (("zero-shot", "-d", "hollow"), "hollow"),
        (("retrieval", "-d", "classes", "--gallery", "1"), "--gallery"),
        (("retrieval", "-d", "classes", "--distractors", "gone"), "gone"),
        (("prompts", "-d", "classes", "--sets", ""), "none were given"),
        (("prompts", "-d", "classes", "--sets", "none,drawigns"), "did you mean 'drawings'"),
    ],
)
def test_bad_options(
    run: Run, model: str, classes: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(classes.parent)
    Path("file").write_text("")
    Path("hollow").mkdir()
    done = run("eval", *options, "-m", model)
    assert done.code == 2 and message in done.err, done.err
    assert "Traceback" not in done.err
