"""`vlm explain` and `vlm eval pointing`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.apps.conftest import Run
from tests.tasks.fused import fused_model


def test_a_picture_is_written(run: Run, model: str, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "found.png"
    done = run("explain", pictures / "red.png", "a red thing", "-m", model, "--out", out)
    assert done.code == 0, done.err
    assert "relevance, 3 words" in done.out and "--method has also rollout" in done.out
    assert Image.open(out).format == "PNG" and [path.name for path in out.parent.iterdir()] == ["found.png"]
    chosen = run("explain", pictures / "red.png", "red", "-m", model, "-o", out, "--method", "rollout").out
    assert ", rollout\n" in chosen and "--method" not in chosen


@pytest.mark.parametrize("called", ["itself", "a longer way", "a symbolic link", "a hard link"])
def test_the_picture_itself_is_never_overwritten(
    run: Run, pictures: Path, called: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm.apps.explain.load_model", lambda *_: pytest.fail("the model was loaded first"))
    picture = pictures / "red.png"
    before, out = picture.read_bytes(), pictures / "other.png"
    if called == "a symbolic link":
        out.symlink_to(picture)
    elif called == "a hard link":
        out.hardlink_to(picture)
    else:
        out = picture if called == "itself" else pictures / ".." / pictures.name / picture.name
    done = run("explain", picture, "red", "--out", out)
    assert done.code == 2 and "is one of the inputs" in done.err and picture.read_bytes() == before


def test_the_ending_says_the_format(run: Run, model: str, pictures: Path, tmp_path: Path) -> None:
    for name in ("found.xyz", "found"):
        done = run("explain", pictures / "red.png", "red", "-m", model, "--out", tmp_path / name)
        assert done.code == 2 and "must end in .png, .jpg, .jpeg, .webp" in done.err and not (tmp_path / name).exists()
    done = run("explain", pictures / "red.png", "red", "-m", model, "--out", tmp_path / "found.JPG")
    assert done.code == 0 and Image.open(tmp_path / "found.JPG").format == "JPEG"


def test_layers_of_a_fused_model(run: Run, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm.weights.load.load", lambda *_, **__: fused_model())
    written = []
    for layer in (1, 2):
        out = tmp_path / f"{layer}.png"
        assert run("explain", pictures / "red.png", "a thing", "-o", out, "--layer", layer, "-m", "x").code == 0
        written.append(out.read_bytes())
    assert written[0] != written[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gone.png", "red"), "gone.png"),
        (("red.png", " "), "blank"),
        (("red.png", "red", "--method", "plan"), "has no plan; it has relevance, rollout"),
        (("red.png", "red", "--method", "gradcam"), "did you mean 'grad-cam'"),
        (("red.png", "red", "--out", "."), "is a folder"),
        (("red.png", "red", "--layer", "1"), "layer 1 (--layer): chooses a fusion layer for grad-cam alone"),
    ],
)
def test_bad_input(run: Run, model: str, pictures: Path, arguments: tuple[str, ...], message: str) -> None:
    done = run("explain", pictures / arguments[0], *arguments[1:], "-m", model)
    assert done.code == 2 and message in done.err


def test_pointing(run: Run, model: str, pictures: Path, tmp_path: Path) -> None:
    for picture in pictures.glob("*.png"):
        picture.with_suffix(".txt").write_text(picture.stem)
    where = ("eval", "pointing", "-d", pictures, "-m", model, "--collages", 5)
    done = run(*where, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "5 collages, relevance" in done.out and "random weights" in done.out
    written = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert written["collages"] == written["hits"]["count"] == 5 and written["random weights"]["hits"]["chance"] == 0.25
    assert "random weights" not in run(*where, "--no-control").out
    assert run(*where, "--method", "plan").code == 2
    refused = run(*where, "--layer", 2)
    assert refused.code == 2 and "here the method is relevance" in refused.err


def test_the_help_tells_what_points_better(run: Run) -> None:
    shown = " ".join(run("explain", "--help").out.replace("│", " ").split())
    assert "tiny-albef points better by cam than by grad-cam" in shown


def test_the_shipped_model_points(run: Run, tmp_path: Path) -> None:
    done = run("eval", "pointing", "-d", "unseen-concept", "--collages", 3, "--out", tmp_path)
    assert done.code == 0 and "3 collages, cam" in done.out
