"""The two engines: this process, or actors of Ray Data. Both run `Worker` on units and give them back when written."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from vlm.data.sources import Source
from vlm.errors import ConfigError
from vlm.tasks.capfilt.settings import Execution
from vlm.tasks.capfilt.units import Unit
from vlm.tasks.capfilt.work import Job, Worker


def run_units(job: Job, units: Sequence[Unit], sources: dict[str, Source], how: Execution) -> Iterator[Unit]:
    """Work on all units; each comes back when it is written, on a cluster in any order."""
    if not units:
        return
    if how.engine == "ray":
        yield from _on_ray(job, units, how)
    else:
        yield from Worker(job, sources).run(units)


def check_ray() -> None:
    """Raises ConfigError, which says what to install, where Ray Data is missing."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError('engine ray needs Ray Data: pip install "vlm[ray]", or use --engine local')


class _Actor:
    """A worker on some machine of the cluster."""

    def __init__(self, job: Job, threads: int) -> None:
        torch.set_num_threads(threads)
        self.worker = Worker(job)

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        names = ("number", "start", "stop")
        units = [
            Unit(str(kind), *(int(rows[name][place]) for name in names))  # type: ignore[arg-type]
            for place, kind in enumerate(rows["kind"])
        ]
        done = list(self.worker.run(units))
        return {name: [getattr(unit, name) for unit in done] for name in ("kind", *names)}


def _on_ray(job: Job, units: Sequence[Unit], how: Execution) -> Iterator[Unit]:
    check_ray()
    # Ray would else pack the folder that this runs in, data and all, and send it to each actor.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    import ray
    import ray.data

    mine = not ray.is_initialized()
    if mine:
        ray.init(address=how.address or None, log_to_driver=False, include_dashboard=False if not how.address else None)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = [{"kind": u.kind, "number": u.number, "start": u.start, "stop": u.stop} for u in units]
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Actor,
            fn_constructor_args=(job, torch.get_num_threads()),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(how.actors, len(units))),
            num_gpus=how.actor_gpus or None,
        )
        for row in done.iter_rows():
            yield Unit(row["kind"], int(row["number"]), int(row["start"]), int(row["stop"]))
    finally:
        if mine:
            ray.shutdown()
