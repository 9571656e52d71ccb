"""The training loop of every stage: read, forward, backward, step, log, evaluate, save."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlm.errors import TrainingError, reason
from vlm.files import write_text
from vlm.train.checkpoint import Checkpoints, Export, Position, Trained
from vlm.train.config import TrainConfig
from vlm.train.distributed import Ranks, gather_objects, reshard, spread, unwrapped
from vlm.train.ema import WeightAverage
from vlm.train.metrics import Log, Meter
from vlm.train.optim import (
    LossScale,
    freeze,
    gradient_norm,
    learning_rate,
    make_optimizer,
    set_learning_rate,
    shorten_,
)
from vlm.train.step import StepContext, backward
from vlm.train.teacher import Teaching

logger = logging.getLogger("vlm.train")

Evaluate = Callable[[nn.Module], dict[str, float]]
NONFINITE = "nonfinite.json"
"""In a run's folder: the step that stopped it, why, and all keys of the step's batch."""
SHOWN = 64
"""Keys that the message itself names."""


@dataclass(frozen=True)
class Job:
    """What is trained: a stage's network with its data, and how it is judged and written."""

    network: nn.Module
    """A stage's network; `vlm.models.stage` says what it offers. Its `clamp_`, where it has one, puts
    parameters with bounds, such as the temperature, back within them after each step."""
    batches: Callable[[int, int], Iterable[Any]]
    """(epoch, samples to skip) to this rank's batches; each tells `consumed`, the samples used so far."""
    steps_per_epoch: int
    export: Export
    """(full state dict, folder): writes a model folder."""
    evaluate: Evaluate | None = None
    """Figures of a network in eval mode; every rank calls it."""
    fingerprint: str = ""
    """Hash of the data; a resume with other data is refused."""
    width: int = 0
    """Of the features that a teacher's queue keeps; 0 where the stage has none."""
    kinds: int = 2
    """Of id that a batch's rows have."""


class Trainer:
    """One run: build, then `fit`."""

    def __init__(self, job: Job, config: TrainConfig, run: Path, here: Ranks, *, progress: bool = True) -> None:
        self.job, self.config, self.run, self.here = job, config, run, here
        self.progress = progress
        self.frozen = freeze(job.network, config.optim.freeze)
        self.steps = config.steps or math.ceil(config.epochs * job.steps_per_epoch)
        job.network.to(here.device)
        self.teaching: Teaching | None = None
        if config.teacher.decay:
            self.teaching = Teaching(
                job.network, config.teacher, width=job.width, kinds=job.kinds, steps_per_epoch=job.steps_per_epoch,
                device=here.device,
            )  # fmt: skip
            spread(self.teaching.teacher.network, config.parallel, here, teacher=True)
        if config.compile:
            for part in job.network.children():
                part.compile()
        self.network = spread(job.network, config.parallel, here)
        self.optimizer = make_optimizer(unwrapped(self.network), config.optim)
        self.average = WeightAverage(unwrapped(self.network), config.ema) if config.ema else None
        self.precision = pick_precision(config.precision, here.device)
        scaled = self.precision is torch.float16
        self.scale = LossScale(2.0**16 if scaled else 1.0, dynamic=scaled)
        self.position = Position()
        self.checkpoints = Checkpoints(run, here, keep=config.keep, export=job.export)
        self.trained = Trained(self.network, self.optimizer, self.average, self.teaching)
        self.context = StepContext(
            here, job.network, self._autocast, seed=config.seed, accumulate=config.accumulate, teaching=self.teaching
        )

    def fit(self, *, resume: bool = False) -> Position:
        """Train to the end and return where the run stands.

        Raises TrainingError on a loss or gradient that isn't finite (with the batch's keys, all of them in
        `NONFINITE`), on a checkpoint that can't be written, and when a resume doesn't fit; checkpoints written before
        stay intact.
        """
        if resume:
            self.resume()
        log = Log(
            self.run,
            active=self.here.first,
            step=self.position.step,
            steps=self.steps,
            progress=self.progress,
        )
        try:
            self.network.train()
            meter = Meter()
            while self.position.step < self.steps:
                for batch in self.job.batches(self.position.epoch, self.position.consumed):
                    values = self._step(batch)
                    self.position.consumed = batch.consumed
                    meter.add(values, len(batch) * self.here.count)
                    log.advance(values["loss"], meter.rate)
                    step = self.position.step
                    if step % self.config.log_every == 0 or step == self.steps:
                        log.write("train", step, meter.means() | self._watch())
                        meter = Meter()
                    if self._due(self.config.evaluate_every) and self.job.evaluate is not None:
                        figures = self._evaluate()
                        log.write("evaluate", step, figures)
                        self._keep_best(figures)
                        meter = Meter()
                    if self._due(self.config.save_every):
                        self._save()
                        meter = Meter()
                    if step == self.steps:
                        break
                else:
                    if self.position.consumed == 0:
                        raise TrainingError("the data gave no batch in a whole epoch: it is empty")
                    self.position.epoch, self.position.consumed = self.position.epoch + 1, 0
        finally:
            log.close()
        return self.position

    def _step(self, batch: Any) -> dict[str, float]:
        """Forward, backward and one move of the weights."""
        step, optim = self.position.step, self.config.optim
        batch = batch.to(self.here.device, non_blocking=True)
        rate = learning_rate(step, self.steps, optim)
        set_learning_rate(self.optimizer, rate)
        values = backward(self.network, batch, self.context, step=step, loss_scale=self.scale.value)
        if not math.isfinite(values["loss"]):
            self._stop(f"the loss is {values['loss']}", batch)
        trained = [p for p in self.network.parameters() if p.requires_grad]
        self.scale.unscale_(trained)
        norm = gradient_norm(trained)
        finite = bool(torch.isfinite(norm))
        if not finite and not self.scale.dynamic:
            self._stop(f"the gradient's length is {float(norm)}", batch)
        if finite:
            shorten_(trained, norm, optim.clip_norm)
            self.optimizer.step()
            clamp = getattr(self.job.network, "clamp_", None)
            if clamp is not None:
                clamp()
            if self.average is not None:
                self.average.update()
            if self.teaching is not None:
                self.teaching.teacher.update(unwrapped(self.network))
        self.scale.update(finite)
        self.optimizer.zero_grad(set_to_none=True)
        self.position.step += 1
        extra = {"gradient_norm": float(norm)} if finite else {}
        if self.scale.dynamic:
            extra["loss_scale"] = self.scale.value
        return values | extra | {"lr": rate}

    def _stop(self, what: str, batch: Any) -> None:
        keys = [key for part in gather_objects(batch.keys, self.here) for key in part]
        note = {"step": self.position.step + 1, "what": what, "keys": keys}
        path, named = self.run / NONFINITE, f"all {len(keys)} stand in {self.run / NONFINITE}"
        try:
            if self.here.first:
                write_text(path, json.dumps(note, indent=1) + "\n", error=TrainingError)
        except TrainingError as error:  # a full disk mustn't hide why the run stops
            named = f"{len(keys)}; {error}"
        shown = ", ".join(keys[:SHOWN]) + (", ..." if len(keys) > SHOWN else "")
        steps = self.checkpoints.steps()
        left = f"the last good checkpoint is {self.checkpoints.path(steps[-1])}" if steps else "no checkpoint yet"
        raise TrainingError(
            f"step {self.position.step + 1}: {what}; {left}. Look at these samples, or lower train.optim.lr. "
            f"Keys of the batch ({named}): {shown}"
        )

    def _watch(self) -> dict[str, float]:
        """Figures that cost a pass over the weights, taken when a line is written."""
        if self.teaching is None:
            return {}
        return {"teacher_distance": self.teaching.teacher.distance(unwrapped(self.network))}

    def _due(self, every: int) -> bool:
        step = self.position.step
        return step == self.steps or (every > 0 and step % every == 0)

    def _evaluate(self) -> dict[str, float]:
        self.network.eval()
        swap = contextlib.nullcontext() if self.average is None else self.average.applied()
        # In the weights' own precision: figures then equal those of the exported model.
        with swap, torch.no_grad():
            figures = self.job.evaluate(unwrapped(self.network)) if self.job.evaluate else {}
            # FSDP2 may still hold whole parameters, which would outlive the average that they come from.
            reshard(self.network)
        self.network.train()
        return figures

    def _keep_best(self, figures: dict[str, float]) -> None:
        name = self.config.best
        if not name:
            return
        if name not in figures:
            self._save()  # the steps since the last one shouldn't be lost to a wrong name
            raise TrainingError(f"train.best={name!r}: the evaluation gives {', '.join(figures) or 'nothing'}")
        if self.position.best is None or figures[name] > self.position.best:
            self.position.best, self.position.best_step = figures[name], self.position.step
            self._save()

    def _save(self) -> None:
        if self.position.step in self.checkpoints.steps():
            return
        self.position.loss_scale, self.position.good = self.scale.value, self.scale.good
        self.position.average_steps = self.average.steps if self.average else 0
        self.checkpoints.save(self.trained, self.position)

    def resume(self) -> None:
        """Take up the newest checkpoint, or the beginning where none was written; `fit` goes on from there.

        Raises TrainingError when the data is not what the run began with, or the checkpoint doesn't fit.
        """
        self._check_data()
        steps = self.checkpoints.steps()
        if not steps:
            logger.info("no checkpoint was written before: from the beginning")
            return
        self.position = self.checkpoints.load(steps[-1], self.trained)
        self.scale.value, self.scale.good = self.position.loss_scale, self.position.good
        if self.here.first:
            logger.info("going on after step %d of %d", self.position.step, self.steps)

    def _check_data(self) -> None:
        path = self.run / "manifest.json"
        try:
            before = json.loads(path.read_text("utf-8"))["data"]
        except (OSError, ValueError, KeyError) as error:
            raise TrainingError(f"{path}: can't be read ({reason(error)}); this is no run folder to resume") from error
        if before != self.job.fingerprint:
            raise TrainingError(
                f"{self.run}: the data has changed since this run began, so its place in the epoch means "
                "nothing now. Restore the data, or start a new run from this one's model."
            )

    @contextlib.contextmanager
    def _autocast(self) -> Iterator[None]:
        enabled, device = self.precision is not torch.float32, self.here.device.type
        # The fused attention of torch's CPU build takes a third of a bf16 step for its backward pass alone; plain
        # products take a tenth of that at the lengths that are trained on CPUs.
        plain = sdpa_kernel(SDPBackend.MATH) if enabled and device == "cpu" else contextlib.nullcontext()
        with torch.autocast(device, dtype=self.precision if enabled else None, enabled=enabled), plain:
            yield


def pick_precision(precision: str, device: torch.device) -> torch.dtype:
    """The type of the forward pass's products: what was asked for, or what the device does well."""
    if precision == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
