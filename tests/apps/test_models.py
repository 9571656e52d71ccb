"""`vlm models`, `vlm export`, `vlm demo`, `vlm data`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import vlm
from tests.apps.conftest import Run
from tests.tasks.fused import PLAIN, pair_model
from tests.tasks.small import WORDS, class_folders, noise, random_model
from tests.weights.albef_reference import reference
from vlm.models.vilt import Vilt
from vlm.weights.loaded import VisionLanguageModel


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout without a shipped model."""
    monkeypatch.setattr("vlm.weights.shipped.shipped", dict)


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data" / "examples"
    folder.mkdir(parents=True)
    (folder.parent / "manifest.json").write_text("{}")
    (folder / "labels.txt").write_text("red\ngreen\nblue\npink\n")
    for number, picture in enumerate(noise(3)):
        picture.save(folder / f"{number}.png")
    monkeypatch.setenv("VLM_DATA", str(folder.parent))
    return folder


def test_models(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm.weights.shipped.shipped", lambda: {"small-clip": "Sees small things."})
    done = run("models")
    assert done.code == 0 and "small-clip\n  Sees small things.\n" in done.out
    assert "open_clip:ARCH/TAG" in done.out


def test_no_models(run: Run, bare: None) -> None:
    done = run("models")
    assert done.code == 0 and "no model is shipped" in done.out


@pytest.mark.parametrize(
    "command", [("demo",), ("classify", "x.png", "-l", "a"), ("export", "--out", "x"), ("eval", "zero-shot", "-d", "E")]
)
def test_a_missing_model_says_how_to_train_one(run: Run, bare: None, examples: Path, command: tuple[str, ...]) -> None:
    class_folders(examples.parent.parent / "set", {"red": ["red"]})
    done = run(*(str(examples.parent.parent / "set") if part == "E" else part for part in command))
    assert done.code == 2 and "vlm train clip" in done.err


@pytest.mark.parametrize(("command", "stage"), [("ask", "blip2-llm"), ("chat", "blip2-llm"), ("caption", "blip")])
def test_each_missing_default_names_its_stage(run: Run, bare: None, examples: Path, command: str, stage: str) -> None:
    done = run(command, examples / "0.png", *(["what ?"] if command == "ask" else []))
    name = "tiny-blip2" if stage == "blip2-llm" else "tiny-blip"
    assert done.code == 2
    assert f"{name} isn't in this checkout" in done.err and f"vlm train {stage} --config tiny" in done.err


def test_export_to_our_own_and_back(run: Run, model: str, tmp_path: Path) -> None:
    done = run("export", "--model", model, "--to", "vlm", "--out", tmp_path / "copy")
    assert done.code == 0, done.err
    pixels = torch.randn(2, 3, 16, 16)
    first, second = (vlm.load(place, device="cpu").encode_image(pixels) for place in (model, tmp_path / "copy"))
    torch.testing.assert_close(first, second)


def test_export_in_half_precision(run: Run, model: str, tmp_path: Path) -> None:
    for name in ("fp32", "fp16"):
        done = run("export", "-m", model, "--to", "vlm", "--dtype", name, "--out", tmp_path / name)
        assert done.code == 0, done.err
    whole, half = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("fp32", "fp16"))
    assert 1.8 < whole / half < 2.1
    assert "did you mean 'fp16'" in run("export", "-m", model, "--dtype", "fp6", "--out", tmp_path / "x").err


def test_export_of_what_differs_from_a_shipped_model(run: Run, model: str, tmp_path: Path) -> None:
    """Of tiny-clip itself nothing is left but an empty file, and yet it loads whole."""
    out = tmp_path / "part"
    done = run("export", "-m", "tiny-clip", "--to", "vlm", "--dtype", "fp16", "--base", "tiny-clip", "--out", out)
    assert done.code == 0, done.err
    assert (out / "model.safetensors").stat().st_size < 1000
    first, second = (vlm.load(place, device="cpu").network.state_dict() for place in ("tiny-clip", out))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    for words, said in (
        (("--to", "hf", "--base", "tiny-clip"), "only --to vlm leaves tensors out"),
        (("--to", "vlm", "--base", "tiny-clp"), "--base: no shipped model 'tiny-clp' (did you mean 'tiny-clip'?)"),
        (("--to", "vlm", "--base", "tiny-clip"), "base tiny-clip: this model has no "),
    ):
        done = run("export", "-m", model, *words, "--out", tmp_path / "x")
        assert done.code == 2 and said in done.err
    assert not (tmp_path / "x").exists()
    assert "use --to vlm" in run("export", "-m", model, "--dtype", "fp16", "--out", tmp_path / "x").err


@pytest.mark.parametrize("to", ["hf", "open_clip"])
def test_a_bidirectional_text_tower_goes_nowhere_else(run: Run, model: str, tmp_path: Path, to: str) -> None:
    done = run("export", "--model", model, "--to", to, "--out", tmp_path / "copy")
    assert done.code == 2 and "Traceback" not in done.err and len(done.err) > 40
    assert not (tmp_path / "copy").exists()


def test_a_model_is_not_written_over_itself(run: Run, model: str, tmp_path: Path) -> None:
    """Half precision would replace the only whole copy."""
    own = tmp_path / "own"
    assert run("export", "--model", model, "--to", "vlm", "--out", own).code == 0
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    refused = run("export", "--model", own, "--to", "vlm", "--dtype", "fp16", "--out", own)
    assert refused.code == 2 and "is one of the inputs" in refused.err
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before


def test_export_of_an_official_albef(run: Run, tmp_path: Path) -> None:
    first, again = tmp_path / "ALBEF.pth", tmp_path / "again.pth"
    stored = reference().checkpoint()
    torch.save({"model": stored}, first)
    done = run("export", "--model", first, "--to", "official", "--out", again)
    assert done.code == 0 and f"written to {again}" in done.out, done.err
    found = torch.load(again, weights_only=True)["model"]
    only_training = ("_m.", "queue")
    assert set(found) == {name for name in stored if not any(part in name for part in only_training)}
    for name, value in found.items():
        torch.testing.assert_close(value, stored[name], msg=lambda text, name=name: f"{name}: {text}")
    refused = run("export", "--model", first, "--to", "official", "--out", first)
    assert refused.code == 2 and "is one of the inputs" in refused.err
    refused = run("export", "--model", first, "--to", "hf", "--out", tmp_path / "hf")
    assert refused.code == 2 and "CLIPModel" in refused.err and not (tmp_path / "hf").exists()


def test_export_of_a_vilt(run: Run, tmp_path: Path) -> None:
    inner = pair_model()
    model = VisionLanguageModel(Vilt(inner.network.config), WORDS, PLAIN, name="small-vilt", family="vilt")
    model.save(tmp_path / "own")
    done = run("export", "--model", tmp_path / "own", "--to", "hf", "--out", tmp_path / "hf")
    assert done.code == 0, done.err
    again = vlm.load(tmp_path / "hf", device="cpu")
    pixels, tokens = torch.randn(2, 3, 16, 16), WORDS(["a red thing", "sky"])
    with torch.no_grad():
        torch.testing.assert_close(again.match(pixels, tokens), model.network.eval().match(pixels, tokens))
    refused = run("export", "--model", tmp_path / "own", "--to", "official", "--out", tmp_path / "x.pth")
    assert refused.code == 2 and "only ALBEF" in refused.err and not (tmp_path / "x.pth").exists()
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "notes").write_text("mine")
    assert run("export", "--model", tmp_path / "own", "--to", "hf", "--out", tmp_path / "again").code == 2
    assert (tmp_path / "again" / "notes").read_text() == "mine"


def test_a_padded_vilt_goes_nowhere_else(run: Run, tmp_path: Path) -> None:
    model = pair_model(transform=dataclasses.replace(PLAIN, resize="pad"))
    VisionLanguageModel(Vilt(model.network.config), WORDS, model.transform, name="padded", family="vilt").save(
        tmp_path / "own"
    )
    done = run("export", "--model", tmp_path / "own", "--to", "hf", "--out", tmp_path / "hf")
    assert done.code == 2 and "preprocessed by 'pad'" in done.err and not (tmp_path / "hf").exists()


def test_bad_export(run: Run, model: str, tmp_path: Path) -> None:
    assert "did you mean 'hf'" in run("export", "--model", model, "--to", "hff", "--out", tmp_path / "x").err
    (tmp_path / "file").write_text("")
    done = run("export", "--model", model, "--to", "vlm", "--out", tmp_path / "file")
    assert done.code == 2 and "is a file" in done.err


def test_demo(run: Run, model: str, examples: Path) -> None:
    done = run("demo", "--model", model)
    assert done.code == 0, done.err
    classifier = vlm.ZeroShotClassifier(random_model(), ["red", "green", "blue", "pink"], "drawings")
    for number in range(3):
        best = classifier.predict(examples / f"{number}.png", top_k=1)[0]
        after = done.out.split(str(examples / f"{number}.png"))[1].splitlines()[1]
        assert after.strip().startswith(best.label) and f"{100 * best.score:.1f} %" in after
    assert "3 pictures" in done.out and "4 labels" in done.out
    said = done.out.split("tiny-blip says what they show:")[1]
    for number, caption in enumerate(vlm.Captioner("tiny-blip").caption([examples / f"{n}.png" for n in range(3)])):
        assert f"{examples / f'{number}.png'}\n  {caption}\n" in said


def test_demo_refuses_a_captioner_that_can_t_speak_first(run: Run, model: str, examples: Path) -> None:
    done = run("demo", examples / "0.png", "--model", model, "--captioner", model)
    assert done.code == 2 and "has no generate" in done.err and not done.out


def test_demo_of_own_pictures_needs_no_data(
    run: Run, model: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLM_DATA", str(tmp_path / "nowhere"))
    (tmp_path / "labels").write_text("red\nblue\n")
    done = run("demo", pictures, "--labels-file", tmp_path / "labels", "--model", model)
    assert done.code == 0, done.err
    done = run("demo", "--model", model)
    assert done.code == 2 and "VLM_DATA" in done.err


def test_demo_reports_what_it_cannot_read(run: Run, model: str, examples: Path) -> None:
    (examples / "3.png").write_bytes(b"x")
    done = run("demo", "--model", model)
    assert done.code == 1 and "3.png" in done.err and "1 of 4" in done.err
    assert done.out.count("2.png") == 2 and "3.png" not in done.out, "all others are classified and captioned"
    assert run("demo", examples / "3.png", "--model", model).code == 2


def test_data_check(run: Run, tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set", {"red": ["red", "blue"], "green": ["green"]})
    done = run("data", "check", root, "--workers", 0)
    assert done.code == 0, done.err
    (root / "red" / "1.png").write_bytes(b"no picture")
    broken = run("data", "check", root, "--workers", 0, "--json")
    assert broken.code == 1
    assert "red/1.png" in json.dumps(json.loads(broken.out)["unreadable"])


def test_data_check_of_nothing(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "gone"):
        done = run("data", "check", place)
        assert done.code == 2 and str(place) in done.err


def test_data_build_reports_what_it_made(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vlm.data.build as builder

    called: dict[str, Any] = {}

    def build(out: Path, *, work: Path, workers: int) -> dict[str, Any]:
        called.update(out=out, work=work, workers=workers)
        return {"splits": {"train": 1200}, "bytes": 34567, "shards": [1, 2]}

    monkeypatch.setattr(builder, "build", build)
    done = run("data", "build", "--out", tmp_path / "d", "--work", tmp_path / "w", "--workers", 1)
    assert done.code == 0 and "1,200" in done.out and "34,567 bytes in 2 shards" in done.out
    assert called == {"out": tmp_path / "d", "work": tmp_path / "w", "workers": 1}
