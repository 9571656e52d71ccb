"""The CLIP benchmark measures what it says."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
CAPTIONS = [f"a {'very ' * (i % 5)}red apple number {i}" for i in range(12)]


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def bench(folder: None) -> ModuleType:
    import train_clip

    return train_clip


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    file = tmp_path / "captions.txt"
    file.write_text("\n".join(CAPTIONS), encoding="utf-8")
    options = ["--preset", "tiny", "--batch", "2", "--rounds", "1", "--steps", "1", "--captions", str(file)]
    return [*options, "--threads", "1", "--out", str(tmp_path)]


def test_median_interval_by_hand(folder: None) -> None:
    from measure import median_interval

    # Six values: the range misses the median in 2 of 64 cases; leaving out one at each end, in 14.
    six = median_interval([6, 1, 5, 2, 4, 3])
    assert six == {"median": 3.5, "low": 1, "high": 6, "coverage": 1 - 2 / 64}
    nine = median_interval(list(range(1, 10)))
    assert (nine["low"], nine["median"], nine["high"]) == (2, 5, 8)
    assert nine["coverage"] == pytest.approx(1 - 2 * 10 / 512)
    assert median_interval([2.0]) == {"median": 2.0, "low": 2.0, "high": 2.0, "coverage": 0.0}


def test_both_sides_take_the_same_texts(bench: ModuleType, arguments: list[str]) -> None:
    import torch
    from clip_sides import make_material

    options = bench.parse(arguments)
    material = make_material(options, bench.prepare(options), batches=3)
    assert len(material.ours) == len(material.theirs) == 3
    for ours, theirs in zip(material.ours, material.theirs, strict=True):
        ids = ours.tokens.input_ids
        assert theirs.shape == (2, 77)
        assert torch.equal(theirs[:, : ids.shape[1]], ids)
        assert not theirs[:, ids.shape[1] :].any()
        assert ids.shape[1] == int(ours.tokens.attention_mask.sum(dim=1).max()) < 77


@pytest.mark.parametrize("preset", ["tiny", "vit-b-32"])
def test_both_sides_have_the_same_shape(folder: None, preset: str) -> None:
    import torch
    from clip_sides import PRESETS, open_clip_network, our_network

    with torch.device("meta"):
        sizes = [
            sorted(p.numel() for p in build(PRESETS[preset]).parameters() if p.numel() > 1)
            for build in (our_network, open_clip_network)
        ]
    assert sum(sizes[0]) == sum(sizes[1])
    assert sizes[0][-1] == sizes[1][-1]


def test_a_side_moves_its_weights(bench: ModuleType, arguments: list[str]) -> None:
    from clip_sides import make_material, our_side

    options = bench.parse(arguments)
    shape = bench.prepare(options)
    step = our_side(options, shape, make_material(options, shape, batches=1))
    network = next(cell.cell_contents for cell in step.__closure__ or () if hasattr(cell.cell_contents, "clamp_"))
    before = network.image_projection.weight.detach().clone()
    step(0)
    assert not before.equal(network.image_projection.weight)


@pytest.mark.slow
def test_the_command_writes_its_results(bench: ModuleType, arguments: list[str], tmp_path: Path) -> None:
    bench.main(arguments)
    result = json.loads((tmp_path / "train_clip-tiny-cpu.json").read_text(encoding="utf-8"))
    assert result["parameters"]["ours"] == result["parameters"]["open_clip"]
    assert result["ratio"]["median"] == pytest.approx(result["seconds"]["open_clip"][0] / result["seconds"]["ours"][0])
    for side in ("ours", "open_clip"):
        memory = result["memory"][side]
        assert 0 < memory["before_mb"] < memory["peak_mb"]
    page = (tmp_path / "train_clip-tiny-cpu.md").read_text(encoding="utf-8")
    assert f"{result['ratio']['median']:.2f}** times as fast" in page


def test_bad_options_are_named(bench: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse([*arguments, "--rounds", "0"])
    assert "--rounds must be at least 1" in capsys.readouterr().err
    options = bench.parse([*arguments, "--batch", "64"])
    from clip_sides import make_material

    with pytest.raises(SystemExit, match="12 captions are too few for a batch of 64"):
        make_material(options, bench.prepare(options), batches=1)
