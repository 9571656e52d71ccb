"""CapFilt on Ray Data: what the local engine gives, byte by byte, also where it goes on after a break."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.tasks.capfilt.small import ALONE, HERE, content, settings
from vlm.data.sources import open_source
from vlm.errors import ConfigError, WeightsError
from vlm.tasks.capfilt import engines
from vlm.tasks.capfilt.run import run_capfilt
from vlm.tasks.capfilt.settings import Execution
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


def test_without_ray_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "vlm\[ray\]"'):
        run_capfilt(settings(tmp_path), tmp_path / "out", ALONE, how=Execution("ray"), pretrain=False)
    assert not (tmp_path / "out").exists()
