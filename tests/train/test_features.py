"""Features on disk: the same losses as from pictures, no picture read, going on, and what is refused by name."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.train.small import ALONE
from tests.train.test_stages import curve, settings
from vlm.apps.cli import app
from vlm.data.features import NOTE, FeatureStore
from vlm.data.sources import open_source
from vlm.errors import ConfigError, DataError
from vlm.train.features import compute_features, encoder_digest
from vlm.train.run import begun_network, make_transform, train_stage

PLAIN = "loader.augment={}"


def computed(folder: Path, out: Path, *more: str, **options: Any) -> FeatureStore:
    config = settings("blip2", folder, None, PLAIN, *more)
    options = {"device": torch.device("cpu"), "workers": 0, "batch_size": 5} | options
    return compute_features(begun_network(config), make_transform(config), config.data, out, **options)


def test_training_on_features_is_training_on_pictures(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same losses, with ids of pictures too; no picture is read on the way, a broken one is left out."""
    train_stage(settings("blip2", folder, None, PLAIN), tmp_path / "pictures", ALONE, progress=False)
    store = computed(folder, tmp_path / "features")
    assert store.shape == (17, 5, 32) and store.unreadable() == 1 and not len(store.missing())

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a picture was decoded")

    monkeypatch.setattr("vlm.data.loader.decode_image", refuse)
    monkeypatch.setattr("vlm.data.sources.FileSource.__getitem__", refuse)
    cached = settings("blip2", folder, None, PLAIN, f"features={tmp_path / 'features'}", "loader.workers=1")
    train_stage(cached, tmp_path / "cached", ALONE, progress=False)
    found, expected = curve(tmp_path / "cached"), curve(tmp_path / "pictures")
    assert found == pytest.approx(expected, abs=1e-5) and len(found) == 6
    assert curve(tmp_path / "cached", "itm_accuracy") == curve(tmp_path / "pictures", "itm_accuracy")


def test_an_interrupted_computation_goes_on(folder: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, samples: int) -> None:
        if done >= 10:
            raise Stop

    with pytest.raises(Stop):
        computed(folder, tmp_path / "cut", progress=stop)
    config = settings("blip2", folder, None, PLAIN, f"features={tmp_path / 'cut'}")
    with pytest.raises(DataError, match="7 of 17 samples are missing; go on with"):
        train_stage(config, tmp_path / "run", ALONE, progress=False)
    assert not (tmp_path / "run").exists()
    seen: list[int] = []
    computed(folder, tmp_path / "cut", progress=lambda done, _: seen.append(done))
    computed(folder, tmp_path / "whole")
    assert seen == [15, 17]
    for name in ("states.bin", "pictures.bin", "done.bin"):
        kind = np.float32 if name == "states.bin" else np.uint8
        a, b = (np.fromfile(tmp_path / one / name, kind) for one in ("cut", "whole"))
        np.testing.assert_allclose(a, b, atol=1e-5)  # rows that were encoded beside others


def test_half_takes_half(folder: Path, tmp_path: Path) -> None:
    whole, half = (computed(folder, tmp_path / kind, kind=kind) for kind in ("float32", "float16"))
    sizes = [(tmp_path / kind / "states.bin").stat().st_size for kind in ("float32", "float16")]
    assert sizes[0] == 2 * sizes[1] == 17 * 5 * 32 * 4
    torch.testing.assert_close(half.row(0, "")[0], whole.row(0, "")[0], rtol=1e-3, atol=1e-3)
    with pytest.raises(DataError, match="in float32; choose another"):
        computed(folder, tmp_path / "float32", kind="float16")


def test_a_full_disk_is_told_before_anything_is_computed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.posix_fallocate", full)
        with pytest.raises(DataError, match=r"features: can't be written \(No space left on device"):
            computed(folder, tmp_path / "features")
    assert not (tmp_path / "features" / NOTE).exists()
    assert not len(computed(folder, tmp_path / "features").missing())


def test_a_folder_of_other_files_stays_as_it_is(folder: Path, tmp_path: Path) -> None:
    for name, content in {"states.bin": "mine", "features.json": "not JSON"}.items():
        out = tmp_path / name.split(".")[0]
        out.mkdir()
        (out / name).write_text(content)
        with pytest.raises(DataError, match=rf"such as {name}; choose a new or empty --out|{name}: can't be read"):
            computed(folder, out)
        assert [path.name for path in out.iterdir() if path.name != ".lock"] == [name]
        assert (out / name).read_text() == content


def test_stale_features_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "features"
    computed(folder, out)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "00.txt").write_text("something else")
    cases = {
        "another image encoder's weights than": settings("blip2", folder, None, PLAIN, "train.seed=1"),
        r"another preprocessing of pictures .* than": settings("blip2", folder, None, PLAIN, "images.resize=crop"),
        "other data than": settings("blip2", other, None, PLAIN),
    }
    for message, config in cases.items():
        stale = type(config)(**{**vars(config), "features": str(out)})
        with pytest.raises(DataError, match=message):
            train_stage(stale, tmp_path / "run", ALONE, progress=False)
    with pytest.raises(DataError, match="choose another --out"):
        computed(folder, out, "train.seed=1")


def test_what_can_t_be_trained_on_features(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "features"
    with pytest.raises(DataError, match=f"no features there \\({NOTE} is missing"):
        train_stage(settings("blip2", folder, None, PLAIN, f"features={out}"), tmp_path / "a", ALONE, progress=False)
    computed(folder, out)
    with pytest.raises(ConfigError, match=r"set loader\.augment=\{\}"):
        changed = settings("blip2", folder, None, "loader.augment={flip: 0.5}", f"features={out}")
        train_stage(changed, tmp_path / "b", ALONE, progress=False)
    with pytest.raises(ConfigError, match="a Clip trains its image encoder"):
        train_stage(settings("clip", folder, None, PLAIN, f"features={out}"), tmp_path / "c", ALONE, progress=False)
    note = json.loads((out / NOTE).read_text())
    (out / NOTE).write_text(json.dumps(note | {"type": "int3"}))
    with pytest.raises(DataError, match="isn't what `vlm data features` writes"):
        computed(folder, out)
    (out / NOTE).write_text(json.dumps(note))
    (out / "states.bin").write_bytes(b"short")
    with pytest.raises(DataError, match=r"states\.bin: has 5 bytes, expected 10880"):
        computed(folder, out)


def test_the_digest_is_of_weights_and_settings(folder: Path) -> None:
    network: Any = begun_network(settings("blip2", folder, None))
    before = encoder_digest(network.image)
    assert encoder_digest(network.image) == before
    with torch.no_grad():
        network.image.trunk.norm.bias[0] += 1e-6
    assert encoder_digest(network.image) != before


def test_command(folder: Path, tmp_path: Path) -> None:
    from tests.train.test_stages import COMMON, STAGES

    out = tmp_path / "features"
    options = ["--out", str(out), "--data", str(folder), "--workers", "0", "--device", "cpu"]
    result = CliRunner().invoke(app, ["data", "features", *options, *STAGES["blip2"], *COMMON, "start=[]"])
    assert result.exit_code == 0, result.output + str(result.exception)
    assert "17 pictures as 5 x 32" in result.output and "1 picture can't be decoded" in result.output
    assert f"features={out} loader.augment={{}}" in result.output
    config = settings("blip2", folder, None, PLAIN, f"features={out}", "train.steps=1")
    train_stage(config, tmp_path / "run", ALONE, progress=False)
    assert len(open_source(str(folder))) == 17
