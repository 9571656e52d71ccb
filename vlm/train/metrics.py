"""Where a run's figures go: a line of JSON each, TensorBoard, and a progress bar."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlm.errors import TrainingError, counted
from vlm.files import write_text

logger = logging.getLogger("vlm.train")


class Meter:
    """Means of the steps since the last line, and the speed."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.samples = 0
        self.started = time.perf_counter()

    def add(self, values: Mapping[str, float], samples: int) -> None:
        """Count one step of `samples` rows over all ranks."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1
        self.samples += samples

    @property
    def rate(self) -> float:
        """Samples per second."""
        return self.samples / max(1e-9, time.perf_counter() - self.started)

    def means(self) -> dict[str, float]:
        """Mean of each value over the steps that gave it, and `samples_per_second`."""
        return {name: total / self.counts[name] for name, total in self.sums.items()} | {
            "samples_per_second": round(self.rate, 2)
        }


class Log:
    """Writes lines to ``metrics.jsonl`` and TensorBoard; shows progress. Silent when not `active`."""

    def __init__(self, folder: Path, *, active: bool, step: int, steps: int, progress: bool) -> None:
        """step: where the run goes on; later lines of an earlier try are cut off. steps: its end."""
        self.path = folder / "metrics.jsonl"
        self.active = active
        self._writer: Any = None
        self._bar: Any = None
        if not active:
            return
        keep_until(self.path, step)
        with self._written():
            self._file = self.path.open("ab", buffering=0)  # nothing is left to fail when it is closed
            self._writer = _tensorboard(folder / "tensorboard", step)
        self._bar = tqdm(
            total=steps, initial=step, unit="step", dynamic_ncols=True, disable=not progress, smoothing=0.05
        )

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """One line: its kind (``train``, ``evaluate``), the step, and the values.

        Raises TrainingError when it can't be written.
        """
        if not self.active:
            return
        line = {"kind": kind, "step": step, "time": round(time.time(), 2), **values}
        with self._written():
            rest = (json.dumps(line) + "\n").encode("utf-8")
            while rest:  # a disk that fills up takes a part first
                rest = rest[self._file.write(rest) :]
            if self._writer is not None:
                for name, value in values.items():
                    self._writer.add_scalar(f"{kind}/{name}", value, step)
        if kind != "train" or self._bar.disable:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            logger.info("step %d: %s: %s", step, kind, shown)

    def advance(self, loss: float, samples_per_second: float) -> None:
        """Show one more step with the loss and the speed; the bar adds the remaining time."""
        if self.active:
            self._bar.set_postfix_str(f"loss {loss:.3f}, {samples_per_second:.0f} samples/s", refresh=False)
            self._bar.update()

    def close(self) -> None:
        """Flush all of it."""
        if self.active:
            self._bar.close()
            with self._written():
                self._file.close()
                if self._writer is not None:
                    self._writer.close()

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"{self.path}: the figures can't be written ({error.strerror or error}); the checkpoints are intact. "
                "Free space, then go on with --resume."
            ) from error


def keep_until(path: Path, step: int) -> None:
    """Cut lines after `step`, and a half-written last one, from a metrics file; absent is fine."""
    if not path.is_file():  # a device, such as /dev/full, may never end
        return
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept), error=TrainingError)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``; those that aren't JSON, such as one cut by a kill, are left out."""
    lines, left_out = [], 0
    for text in path.read_text("utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            left_out += 1
            continue
        lines.append(line)
    if left_out:
        logger.warning("%s: %s that can't be read, as after a kill, left out", path, counted(left_out, "line"))
    return lines


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.info("TensorBoard isn't installed (pip install 'vlm[train]'): metrics go to metrics.jsonl only")
        return None
    return SummaryWriter(str(folder), purge_step=step if step else None)
