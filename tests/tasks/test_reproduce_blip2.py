"""BLIP-2's ablation: its stages on small models, from beginning to end, with a language model of a few words."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.models.small_llm import llm_folder
from tests.tasks.fused import med_model
from tests.tasks.small import COLOURS, random_model
from vlm.errors import ConfigError
from vlm.tasks.reproduce import grid, short
from vlm.tasks.reproduce.blip2 import ALONE, COLUMN, COUNTS, MEASURES, REFERENCES, VARIANTS, Sizes, reproduce_blip2
from vlm.tasks.reproduce.grid import REFERENCE, as_table
from vlm.tasks.reproduce.references import COLUMN as SHIPPED
from vlm.tasks.reproduce.references import reference_results
from vlm.train.config import load_config, named_config
from vlm.train.metrics import read_metrics
from vlm.train.run import run_kind
from vlm.weights.files import read_json, read_tensors
from vlm.weights.shipped import shipped_folder

SIZES = Sizes(stage1=3, stage2=2, stage1_batch=6, stage2_batch=5, captioned=4)
IMAGE = "model.image={image_size: 16, patch_size: 8, width: 32, layers: 2, heads: 2, mlp_width: 64}"
QFORMER = "queries: 3, text: {{vocab_size: {}, width: 16, layers: 2, heads: 2, mlp_width: 32, cross_layers: [0], \
cross_width: 32, context_length: 32, token_types: 0}}"
FULL, WITHOUT = VARIANTS


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The ablation on ten pictures, which are the test set too, in `tmp_path / "out"`."""
    root = tmp_path / "pictures"
    root.mkdir()
    for number in range(10):
        name, colour = list(COLOURS.items())[number % 5]
        Image.new("RGB", (20, 20 + number), colour).save(root / f"{number}.png")
        (root / f"{number}.txt").write_text(f"a {name} box number {number}")
    monkeypatch.setattr(short, "TEST", str(root))
    random_model().save(tmp_path / "clip")
    med_model().save(tmp_path / "med")
    data = [f"data={json.dumps([str(root)])}", "loader.workers=0", "train.log_every=1", IMAGE]
    llm = {"name": str(llm_folder(tmp_path / "llm")), "width": 32}
    changes = {
        "first": [*data, "train.optim.freeze=[]", "train.optim.lr_scale={}", "model.embed_dim=8",
                  f"model.qformer={{{QFORMER.format(30523)}}}"],
        "second": [*data, f"model.qformer={{speaks: false, {QFORMER.format(0)}}}", f"model.llm={json.dumps(llm)}"],
    }  # fmt: skip

    def called(**more: Any) -> list[dict[str, Any]]:
        given: dict[str, Any] = {"seeds": [4], "sizes": SIZES, "start": [str(tmp_path / "clip")], "device": "cpu"}
        given["references"] = [str(tmp_path / "clip"), str(tmp_path / "med")]
        return reproduce_blip2(tmp_path / "out", **given | changes | more)

    torch.set_num_threads(1)
    return called


def losses(run: Path) -> dict[str, float]:
    """Of the last step."""
    return [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"][-1]


def test_the_stages_from_beginning_to_end(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[list[dict[str, Any]]] = []
    found = call(after=written.append)
    out, rows = tmp_path / "out", [one["row"] for one in found]
    assert rows == [FULL, WITHOUT, ALONE, str(tmp_path / "clip"), str(tmp_path / "med")]
    assert [one["column"] for one in found] == ["3 + 2", "3 + 2", "2", SHIPPED, SHIPPED]
    assert [len(results) for results in written] == [3, 4, 5] and written[-1] == found

    firsts = {
        row: next((out / "seed-4").glob(f"{'itc-itm-itg' if row == FULL else 'itc-itm-then'}*")) for row in VARIANTS
    }
    steps = {row: losses(run) for row, run in firsts.items()}
    assert {row: (line["step"], line.get("itg", 0) > 0) for row, line in steps.items()} == {
        FULL: (3, True), WITHOUT: (3, False),
    }  # fmt: skip
    assert not list(out.glob("*/*/checkpoints"))
    begun = {}
    for run in (out / "models").iterdir():
        assert losses(run)["step"] == 2
        config: Any = load_config(run_kind("blip2-llm"), run / "config.yaml", [])
        assert config.features == str(out / "features") and config.loader.batch_size == 5 and config.train.seed == 4
        begun[run.name] = config.start
    assert begun["stage-2-alone-2-seed-4"] == (str(tmp_path / "clip"),)
    assert {start for start in begun.values()} == {
        (str(tmp_path / "clip"),), *((str(run / "model"),) for run in firsts.values()),
    }  # fmt: skip

    figures = {one["row"]: one["figures"] for one in found}
    recalls = {name for name in MEASURES if "_r1" in name}
    assert all(set(MEASURES) <= figures[row].keys() for row in VARIANTS)
    assert not recalls & figures[ALONE].keys() and {"cider", "lm_accuracy"} <= figures[ALONE].keys()
    assert {name for name in recalls if name in figures[str(tmp_path / "clip")]} == {
        "itc_text_to_image_r1", "itc_image_to_text_r1",
    }  # fmt: skip
    assert {*recalls, "cider"} <= figures[str(tmp_path / "med")].keys()
    # What is trained are the tensors that a stage-2 model holds, but those of the image encoder.
    tensors = read_tensors(out / "models" / "stage-2-alone-2-seed-4" / "model" / "model.safetensors")
    size = {part: sum(v.numel() for n, v in tensors.items() if n.startswith(part)) for part in ("", "image.")}
    llm = sum(value.numel() for value in read_tensors(tmp_path / "llm" / "model.safetensors").values())
    assert all(figures[row]["trained"] == size[""] - size["image."] for row in (*VARIANTS, ALONE))
    assert all(figures[row]["parameters"] == size[""] + llm for row in (*VARIANTS, ALONE))

    lines = as_table(found, MEASURES, column=COLUMN, counts=COUNTS).splitlines()
    assert lines[0].startswith(f"| setting | {COLUMN} | seeds | text to image R@1 % (ITM) |")
    assert lines[2].startswith(f"| {FULL} | 3 + 2 | 1 |") and lines[4].startswith(
        f"| {ALONE} | 2 | 1 | - | - | - | - |"
    )
    assert lines[5].startswith(f"| {tmp_path / 'clip'} | {SHIPPED} | - | - | - |")
    _goes_on(call, out, found, monkeypatch)


def _goes_on(call: Any, out: Path, found: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is made twice; what is missing is made of what lies there; other settings are refused."""
    trained: list[str] = []
    real = grid._train

    def train(stage: str, run: Path, settings: list[str], device: str) -> None:
        trained.append(run.name)
        real(stage, run, settings, device)

    monkeypatch.setattr("vlm.tasks.reproduce.grid._train", train)
    assert call() == found and trained == []
    with pytest.raises(ConfigError, match="was made with other settings"):
        call(sizes=replace(SIZES, captioned=3), references=[])
    with pytest.raises(ConfigError, match=r"itc-itm-itg.*was begun with other settings"):
        call(sizes=replace(SIZES, stage1=4))
    lost = next((out / "models").glob("itc-itm-then*"))
    (lost / "result.json").unlink()  # trained, and not measured
    again = call()
    assert trained == [lost.name] and [one["figures"] for one in again] == [one["figures"] for one in found]
    assert read_json(lost / "model" / "config.json")["config"]["llm"]["sha256"]
    other = next((out / "seed-4").glob("itc-itm-then*"))
    for folder in (out / "models", other):
        shutil.rmtree(folder)
    known = [one for one in found if one["row"] != WITHOUT]
    assert [one["row"] for one in call(known=known)] == [one["row"] for one in found]
    assert trained[1:] == [other.name, lost.name]


def test_a_changed_model_of_reference_is_measured_again(tmp_path: Path) -> None:
    measured: list[str] = []

    def measure(model: str) -> dict[str, float]:
        measured.append(model)
        return {"cider": 0.1 * len(measured)}

    random_model().save(tmp_path / "clip")
    name, out = str(tmp_path / "clip"), tmp_path / "out"
    first = reference_results([name], out=out, measure=measure)
    assert reference_results([name], out=out, measure=measure) == first
    assert reference_results([name], out=tmp_path / "elsewhere", measure=measure, known=first) == first
    assert len(measured) == 1 and first[0][REFERENCE] and first[0]["row"] == name
    random_model(seed=1).save(tmp_path / "clip")
    second = reference_results([name], out=out, measure=measure, known=first)
    assert len(measured) == 2 and second[0]["figures"] != first[0]["figures"]
    assert reference_results([name], out=out, measure=measure, measured=["fewer"]) != second and len(measured) == 3


def test_variants_are_what_they_are_called() -> None:
    configs: dict[str, Any] = {
        row: load_config(run_kind("blip2"), named_config("blip2", "tiny"), list(changes))
        for row, changes in VARIANTS.items()
    }
    weights = {row: (c.model.itc_weight, c.model.itm_weight, c.model.itg_weight) for row, c in configs.items()}
    assert weights == {FULL: (1.0, 1.0, 0.1), WITHOUT: (1.0, 1.0, 0.0)}
    assert all(shipped_folder(name) for name in REFERENCES)


@pytest.mark.parametrize(
    "wrong",
    [{"seeds": []}, {"sizes": Sizes(0, 1)}, {"sizes": Sizes(1, 0)}, {"sizes": Sizes(stage2_batch=0)}, {"start": []},
     {"sizes": Sizes(captioned=-1)}, {"precision": "fp99"}],
)  # fmt: skip
def test_nothing_to_train_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"at least one|train\.precision"):
        reproduce_blip2(tmp_path, **wrong)
    assert not list(tmp_path.iterdir())
