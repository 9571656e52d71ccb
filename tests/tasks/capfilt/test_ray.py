"""CapFilt on Ray Data: what the local engine gives, byte by byte, also where it goes on after a break."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tasks.capfilt.small import ALONE, HERE, content, settings
from vlm.data.sources import Source, open_source
from vlm.errors import ConfigError, WeightsError
from vlm.tasks.capfilt import engines
from vlm.tasks.capfilt.run import run_capfilt
from vlm.tasks.capfilt.settings import CapfiltConfig, Execution
from vlm.tasks.capfilt.units import find_units
from vlm.tasks.capfilt.work import Job


@pytest.mark.slow
def test_actors_give_what_the_local_engine_gives(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="Ray Data isn't installed: pip install vlm[ray]")
    config, told = settings(tmp_path, threshold=0.985), []
    run_capfilt(config, tmp_path / "local", ALONE, how=HERE, pretrain=False)
    # What a break leaves: one shard is done, one has no record yet.
    shutil.copytree(tmp_path / "local", tmp_path / "ray")
    for path in sorted((tmp_path / "ray" / "judged").iterdir())[1:]:
        path.unlink()
    for path in sorted((tmp_path / "ray" / "data").iterdir())[2:]:
        path.unlink()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        how = Execution("ray", actors=2, batch_size=3, device="cpu")
        run_capfilt(config, tmp_path / "ray", ALONE, how=how, pretrain=False, progress=lambda *step: told.append(step))
        sources = {kind: open_source(getattr(config, kind)) for kind in ("web", "human")}
        lost = Job(config, tmp_path / "lost", config.captioner, str(tmp_path / "no filter"), 3, "cpu")
        with pytest.raises(WeightsError, match="no filter"):
            list(engines.run_units(lost, find_units(sources, 8), sources, how))
    finally:
        ray.shutdown()
    assert content(tmp_path / "ray") == content(tmp_path / "local")
    assert told[-1] == (16, 16) and len(told) == 5


def rows_of(config: CapfiltConfig, sources: dict[str, Source]) -> dict[str, np.ndarray]:
    """All units as Ray Data hands them to an actor."""
    found = find_units(sources, config.shard_samples)
    return {name: np.array([getattr(unit, name) for unit in found]) for name in ("kind", *engines.NUMBERS)}


def test_an_actor_works_on_units_as_this_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on a cluster, without one: rows in, shards written, rows out; errors come as rows, by kind and text."""
    config = settings(tmp_path, threshold=0.985)
    run_capfilt(config, tmp_path / "local", ALONE, how=HERE, pretrain=False)
    monkeypatch.chdir(tmp_path)  # to be left again afterwards: an actor goes where the driver is
    monkeypatch.setenv("VLM_DATA", "elsewhere")
    sources = {kind: open_source(getattr(config, kind)) for kind in ("web", "human")}
    prints = {kind: source.fingerprint() for kind, source in sources.items()}
    job = Job(config, tmp_path / "actor", config.captioner, config.judge, HERE.batch_size, "cpu")
    place = engines._Place(str(tmp_path), None, prints, torch.get_num_threads())
    given = rows_of(config, sources)
    out = engines._Actor(job, place)(given)
    assert set(out["error"]) == {""}
    assert all(list(out[name]) == given[name].tolist() for name in given)
    local = {name: value for name, value in content(tmp_path / "local").items() if not name.startswith("report.")}
    assert content(tmp_path / "actor") == local
    for wrong, message in (
        (replace(place, folder=str(tmp_path / "gone")), "gone: not there on .* under the same paths"),
        (replace(place, fingerprints=prints | {"web": "other"}), "web: on .* this set is another one"),
    ):
        out = engines._Actor(job, wrong)(given)
        assert set(out["error"]) == {"DataError"} and re.search(message, out["message"][0])


def test_without_ray_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "vlm\[ray\]"'):
        run_capfilt(settings(tmp_path), tmp_path / "out", ALONE, how=Execution("ray"), pretrain=False)
    assert not (tmp_path / "out").exists()
