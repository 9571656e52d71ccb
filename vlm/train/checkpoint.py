"""Checkpoints that appear whole or not at all, and from which any number of ranks goes on.

``checkpoints/step-00000500/`` holds ``state/`` (trained weights, optimiser and average, by torch's distributed
checkpoint), ``model/`` (what `vlm.load` reads, frozen weights included) and ``trainer.json`` (where the run stood).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from vlm.errors import TrainingError, WeightsError
from vlm.files import write_folder
from vlm.train.distributed import Ranks, gather_objects, unwrapped, wait
from vlm.train.ema import WeightAverage
from vlm.train.teacher import Teaching
from vlm.weights.files import WEIGHTS, read_tensors

PREFIX = "step-"
# What torch's planner wraps a full disk or a damaged file in; it isn't an Exception.
FAILURES = (Exception, CheckpointException)
Export = Callable[[dict[str, Tensor], Path], None]


@dataclass
class Position:
    """Where a run stands: all that a resume needs besides tensors."""

    step: int = 0
    """Optimiser steps taken."""
    epoch: int = 0
    consumed: int = 0
    """Samples of the epoch that all ranks together have used."""
    loss_scale: float = 1.0
    good: int = 0
    """Steps since the loss scale last changed."""
    average_steps: int = 0
    best: float | None = None
    best_step: int = -1


@dataclass(frozen=True)
class Trained:
    """All that a checkpoint holds tensors of."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None = None
    teaching: Teaching | None = None


class Checkpoints:
    """The checkpoints of a run folder."""

    def __init__(self, run: Path, here: Ranks, *, keep: int, export: Export) -> None:
        """export: writes a network's full state dict as a model folder (called on the first rank alone)."""
        self.folder = run / "checkpoints"
        self.here = here
        self.keep = max(1, keep)
        self.export = export

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, oldest first."""
        return whole_steps(self.folder)

    def path(self, step: int) -> Path:
        """Folder of the checkpoint after `step` steps."""
        return self.folder / f"{PREFIX}{step:08d}"

    def save(self, trained: Trained, position: Position) -> None:
        """Write one checkpoint, then drop those that aren't kept. Every rank calls it.

        Raises TrainingError when it can't be written (a full disk); what was written before is intact.
        """
        final = self.path(position.step)
        temporary = self.folder / f".tmp-{final.name}"
        problem = ""
        try:
            if self.here.first:
                shutil.rmtree(temporary, ignore_errors=True)
                (temporary / "state").mkdir(parents=True)
        except OSError as error:
            problem = str(error)
        self._agree(problem, temporary)
        try:
            with _alone(self.here):
                state = _state(trained)
                dcp.save(state, checkpoint_id=temporary / "state", no_dist=self.here.count == 1)
        except FAILURES as error:
            _go_on_stopping(error)
            problem = _reason(error)
        self._agree(problem, temporary)
        tensors = full_state(trained.network, trained.average)
        try:
            if self.here.first:
                self.export(tensors, temporary / "model")
                (temporary / "trainer.json").write_text(json.dumps(asdict(position), indent=1), "utf-8")
                os.replace(temporary, final)
                self._drop_old(position)
        except Exception as error:  # a full disk shows as OSError here and as SafetensorError there
            problem = _reason(error)
        self._agree(problem, temporary)

    def load(self, step: int, trained: Trained) -> Position:
        """Put the checkpoint after `step` steps into the network, the optimiser and what else is trained.

        Every rank calls it. Raises TrainingError when it doesn't fit.
        """
        folder = self.path(step)
        try:
            position = Position(**json.loads((folder / "trainer.json").read_text("utf-8")))
            state = _state(trained)
            with _alone(self.here):
                dcp.load(state, checkpoint_id=folder / "state", no_dist=self.here.count == 1)
        except FAILURES as error:
            _go_on_stopping(error)
            raise TrainingError(
                f"{folder}: the checkpoint can't be read into this configuration ({_reason(error)}). Resume with the "
                "configuration it was written with; only if its files are damaged, delete this folder to go on from "
                "the one before."
            ) from error
        # Those of frozen weights aren't in the state.
        set_state_dict(
            trained.network, trained.optimizer, model_state_dict=state["network"], optim_state_dict=state["optimizer"],
            options=StateDictOptions(strict=False),
        )  # fmt: skip
        _load_frozen(trained.network, folder / "model" / WEIGHTS)
        if trained.average is not None:
            trained.average.steps = position.average_steps
        if trained.teaching is not None:
            set_model_state_dict(trained.teaching.teacher.network, state["teacher"])
        return position

    def publish(self, target: Path) -> None:
        """Put the model of the best checkpoint (the newest where none is marked) at `target`."""
        problem = ""
        try:
            if self.here.first:
                newest = self.path(self.steps()[-1])
                best = json.loads((newest / "trainer.json").read_text("utf-8"))["best_step"]
                chosen = self.path(best) if best >= 0 else newest
                write_folder(target, lambda new: _copy(chosen / "model", new))
        except OSError as error:
            problem = str(error)
        self._agree(problem, target.with_name(f".tmp-{target.name}"))

    def _drop_old(self, position: Position) -> None:
        kept = {*self.steps()[-self.keep :], position.best_step}
        for step in self.steps():
            if step not in kept:
                shutil.rmtree(self.path(step))

    def _agree(self, problem: str, temporary: Path) -> None:
        """Stop all ranks when one of them met a problem."""
        problems = [text for text in gather_objects(problem, self.here) if text]
        wait(self.here)
        if not problems:
            return
        if self.here.first:
            shutil.rmtree(temporary, ignore_errors=True)
        steps = self.steps()
        left = f"the last good checkpoint is {self.path(steps[-1])}" if steps else "no checkpoint was written yet"
        raise TrainingError(
            f"{temporary.parent}: the checkpoint can't be written ({problems[0]}); {left}. "
            "Free space or choose another --out, then go on with --resume."
        )


def whole_steps(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in a run's ``checkpoints`` folder, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if (path / "trainer.json").is_file()]
    return sorted(int(path.name.removeprefix(PREFIX)) for path in found)


def last_step(run: Path) -> int | None:
    """Step of a run folder's newest checkpoint, None before the first."""
    return next(reversed(whole_steps(run / "checkpoints")), None)


def _copy(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder, dirs_exist_ok=True)


def _reason(error: BaseException) -> str:
    """What was wrong in one line; torch's own message holds the tracebacks of all ranks."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _go_on_stopping(error: BaseException) -> None:
    """Raises KeyboardInterrupt again, which torch wraps as it does a full disk."""
    if isinstance(error, CheckpointException):
        stops = (found for found, _ in error.failures.values() if isinstance(found, KeyboardInterrupt))
        for stop in stops:
            raise stop


@contextlib.contextmanager
def _alone(here: Ranks) -> Iterator[None]:
    """One rank is meant, so torch's remark that there is no process group says nothing."""
    with warnings.catch_warnings():
        if here.count == 1:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def full_state(network: nn.Module, average: WeightAverage | None) -> dict[str, Tensor]:
    """All tensors of the network (of the average, if there is one) on the CPU of the first rank."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    applied = contextlib.nullcontext() if average is None else average.applied()
    with applied:
        state = get_model_state_dict(unwrapped(network), options=options)
        return {name: tensor.clone() for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _frozen(network: nn.Module) -> set[str]:
    """Names of the parameters that never change; what is stored nowhere, such as a language model's, among them."""
    return {name for name, parameter in unwrapped(network).named_parameters() if not parameter.requires_grad}


def _load_frozen(network: nn.Module, file: Path) -> None:
    """Give the frozen parameters the values of a model's file. Raises TrainingError where it lacks one."""
    wanted = _frozen(network) & set(get_model_state_dict(network))
    if not wanted:
        return
    try:
        held = read_tensors(file)
    except WeightsError as error:
        raise TrainingError(f"{file}: the frozen weights of the run can't be read ({error})") from error
    lacking = sorted(wanted - set(held))
    if lacking:
        raise TrainingError(f"{file}: {len(lacking)} frozen tensors are missing, {lacking[0]} first")
    chosen: dict[str, Any] = {name: held[name] for name in wanted}
    set_model_state_dict(network, chosen, options=StateDictOptions(full_state_dict=True, strict=False))


def _state(trained: Trained) -> dict[str, Any]:
    tensors, moments = get_state_dict(trained.network, trained.optimizer)
    frozen = _frozen(trained.network)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in frozen}
    state: dict[str, Any] = {"network": tensors, "optimizer": moments}
    if trained.average is not None:
        state["average"] = trained.average.average
    if trained.teaching is not None:
        state["teacher"] = get_model_state_dict(trained.teaching.teacher.network)
        state["queue"] = trained.teaching.queue.state()  # filled in place by a load
    return state
