"""The two engines: this process, or actors of Ray Data. Both run `Worker`, or `Rewriter` where
earlier texts are taken, on units and give them back when written."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vlm import errors
from vlm.data.sources import Source
from vlm.errors import ConfigError, DataError, VlmError
from vlm.tasks.capfilt.reuse import Rewriter
from vlm.tasks.capfilt.settings import Execution
from vlm.tasks.capfilt.units import Unit
from vlm.tasks.capfilt.work import Job, Worker

NUMBERS = ("number", "start", "stop")
"""What makes a unit besides its kind."""


def run_units(job: Job, units: Sequence[Unit], sources: dict[str, Source], how: Execution) -> Iterator[Unit]:
    """Work on all units; each comes back when it is written, on a cluster in any order."""
    if not units:
        return
    if how.engine == "ray":
        yield from _on_ray(job, units, sources, how)
    else:
        yield from _worker(job, sources).run(units)


def _worker(job: Job, sources: dict[str, Source] | None = None) -> Worker | Rewriter:
    return Rewriter(job, sources) if job.config.judged else Worker(job, sources)


def check_ray() -> None:
    """Raises ConfigError, which says what to install, where Ray Data is missing."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError('engine ray needs Ray Data: pip install "vlm[ray]", or use --engine local')


@dataclass(frozen=True)
class _Place:
    """What an actor must find on its machine as it is on the driver's."""

    folder: str
    """The working folder, which names of sets and models are relative to."""
    data: str | None
    """$VLM_DATA."""
    fingerprints: dict[str, str]
    """Of the sets."""
    threads: int


class _Actor:
    """A worker on some machine of the cluster.

    Errors of ours travel as rows: Ray would wrap them in its own, and keep no more of them than a trace.
    """

    def __init__(self, job: Job, place: _Place) -> None:
        self.job, self.place = job, place
        self.worker: Worker | Rewriter | None = None

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        columns = zip(rows["kind"], *(rows[name] for name in NUMBERS), strict=True)
        units = [Unit(str(kind), *map(int, numbers)) for kind, *numbers in columns]  # type: ignore[arg-type]
        error, message = "", ""
        try:
            self.worker = self.worker or self._made()
            list(self.worker.run(units))
        except VlmError as raised:
            error, message = type(raised).__name__, str(raised)
        described = {name: [getattr(unit, name) for unit in units] for name in ("kind", *NUMBERS)}
        return described | {"error": [error] * len(units), "message": [message] * len(units)}

    def _made(self) -> Worker | Rewriter:
        torch.set_num_threads(self.place.threads)
        try:
            os.chdir(self.place.folder)
        except OSError as error:
            raise DataError(
                f"{self.place.folder}: not there on {platform.node()}, where an actor runs ({error.strerror}); all "
                "machines must see the working folder, the sets and the result under the same paths"
            ) from error
        if self.place.data is not None:
            os.environ["VLM_DATA"] = self.place.data
        worker = _worker(self.job)
        for kind, source in worker.sources.items():
            if source.fingerprint() != self.place.fingerprints[kind]:
                raise DataError(f"{source.name}: on {platform.node()} this set is another one than where it began")
        return worker


def _on_ray(job: Job, units: Sequence[Unit], sources: dict[str, Source], how: Execution) -> Iterator[Unit]:
    import ray
    import ray.data
    from ray.exceptions import RayError

    fingerprints = {kind: source.fingerprint() for kind, source in sources.items()}
    place = _Place(os.getcwd(), os.environ.get("VLM_DATA"), fingerprints, torch.get_num_threads())
    mine = not ray.is_initialized()
    if mine:
        ray.init(address=how.address or None, log_to_driver=False)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.log_internal_stack_trace_to_stdout = False
        rows = [{"kind": unit.kind} | {name: getattr(unit, name) for name in NUMBERS} for unit in units]
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Actor,
            fn_constructor_args=(job, place),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(how.actors, len(units))),
            num_gpus=how.actor_gpus or None,
        )
        for row in done.iter_rows():
            if row["error"]:
                raise getattr(errors, row["error"])(row["message"])
            yield Unit(row["kind"], *(int(row[name]) for name in NUMBERS))
    except RayError as error:
        first = str(error).strip().splitlines()[-1][:300]
        raise VlmError(f"engine ray stopped ({first}); what was written is whole: start again to go on") from error
    finally:
        if mine:
            ray.shutdown()
