"""The training benchmark of BLIP-2 measures what it says."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from tests.models.small_llm import llm_folder

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "model.image={image_size: 32, patch_size: 16, width: 32, layers: 2, heads: 2, mlp_width: 64}"
SECOND = (
    "model.qformer={queries: 3, speaks: false, text: {vocab_size: 0, width: 16, layers: 2, heads: 2, mlp_width: 32, "
    "cross_layers: [0], cross_width: 32}}"
)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import blip2_train

    return blip2_train


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(8):
        Image.new("RGB", (32, 32), (30 * number, 0, 0)).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(f"a red box number {number}")
    llm = llm_folder(tmp_path / "llm")
    both = [IMAGE, f"data={json.dumps([str(pictures)])}", "start=[]", "loader.batch_size=4", "loader.workers=0"]
    second = [SECOND, f"model.llm={{name: {json.dumps(str(llm))}, width: 32}}"]
    sizes = ["--steps", "1", "--rounds", "1", "--threads", "1"]
    return [*sizes, "--stage", "blip2-llm", "--set", *both, "--set-second", *second, "--out", str(tmp_path)]


def test_a_variant_is_measured(bench: ModuleType, words: list[str]) -> None:
    found = {kind: bench.measure(bench.parse([*words, "--run", "blip2-llm", kind])) for kind in ("fp32", "int8")}
    whole, small = found["fp32"], found["int8"]
    assert 0 < small["llm_mb"] < whole["llm_mb"]
    assert whole["per_second"]["samples"]["each"] == pytest.approx([4 / whole["seconds"][0]])
    assert whole["per_second"]["tokens"]["median"] > whole["per_second"]["samples"]["median"]
    assert len(whole["losses"]) == 2 and np.allclose(whole["losses"], small["losses"], rtol=0.05)
    assert whole["losses"] != small["losses"]
    assert 0 < whole["parameters"]["trained"] < whole["parameters"]["all"]
    assert whole["peak_mb"] > 50


@pytest.mark.slow
def test_the_command_writes_its_results(bench: ModuleType, words: list[str], tmp_path: Path) -> None:
    bench.main(words)
    result = json.loads((tmp_path / "blip2_train-tiny-cpu.json").read_text("utf-8"))
    assert [run["weights"] for run in result["runs"]] == ["fp32", "int8"]
    page = (tmp_path / "blip2_train-tiny-cpu.md").read_text("utf-8")
    assert page.count("| 2 | ") == 2 and f"{result['runs'][0]['llm_mb']:,.0f}" in page


def test_bad_options_are_named(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse(["--steps", "0"])
    assert "--steps must be at least 1" in capsys.readouterr().err
