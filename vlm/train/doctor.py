"""What is wrong with a run, in words: signs of known diseases in its metrics, with the evidence and what to do.

Pure functions of the lines of ``metrics.jsonl``, the configuration, and what is known about the run folder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any, Literal

LEAST = 8
"""Lines of training from which a trend is read."""
NEAR = 0.02
"""A loss this close to its chance value, as a share of it, has learnt nothing."""


@dataclass(frozen=True)
class Finding:
    """One thing to know about a run."""

    level: Literal["wrong", "watch"]
    """`wrong` needs a person; `watch` may pass by itself."""
    name: str
    """Of the sign, such as ``itm at chance``."""
    evidence: str
    advice: str


@dataclass(frozen=True)
class Run:
    """What the signs are read from."""

    lines: Sequence[Mapping[str, Any]]
    """Of ``metrics.jsonl``: ``kind``, ``step``, ``time`` and values."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Of ``config.yaml``; what it doesn't say isn't judged."""
    planned: int = 0
    """Optimiser steps of the whole run; 0 when unknown."""
    finished: bool = False
    """Whether its final model was written."""
    silent: float = 0.0
    """Seconds since its last line."""
    resume: str = ""
    """The command that goes on with it."""
    unreadable: tuple[str, ...] = ()
    """Messages of training pictures that can't be decoded, among those tried."""
    tried: int = 0

    @property
    def train(self) -> list[Mapping[str, Any]]:
        """Lines of training."""
        return [line for line in self.lines if line.get("kind") == "train"]

    def values(self, name: str) -> list[float]:
        """A training value over the run, where it was written."""
        return [float(line[name]) for line in self.train if name in line]

    def end(self, name: str) -> float | None:
        """Median of a training value over the last quarter of its lines; None with too few of them."""
        found = self.values(name)
        return _end(found) if len(found) >= LEAST else None

    def setting(self, name: str, default: Any = None) -> Any:
        """A value of the configuration by its own name, in whatever section it stands."""
        return _search(self.config, name, default)

    @property
    def step(self) -> int:
        """The last step written."""
        return max((int(line["step"]) for line in self.lines), default=0)

    @property
    def level(self) -> Literal["wrong", "watch"]:
        """Of a sign that may pass: a run is too young for a verdict on what it learns while it warms up."""
        return "watch" if self.step < max(200, 2 * int(self.setting("warmup", 0))) else "wrong"


def _end(values: Sequence[float]) -> float:
    """Median of the last quarter."""
    return median(values[-max(2, len(values) // 4) :])


def diagnose(run: Run) -> list[Finding]:
    """All findings, the wrong ones first; empty for a healthy run."""
    if not run.train:
        advice = "look at what the training command printed; the first line comes after train.log_every steps"
        return [Finding("wrong", "nothing trained", "no line of training was written", advice)]
    found = [finding for check in CHECKS if (finding := check(run)) is not None]
    return sorted(found, key=lambda finding: finding.level != "wrong")


def _not_finite(run: Run) -> Finding | None:
    for line in run.train:
        bad = [name for name, value in line.items() if isinstance(value, float) and not math.isfinite(value)]
        if bad:
            values = ", ".join(f"{name} {line[name]}" for name in bad)
            advice = (
                "lower train.optim.lr, lengthen train.optim.warmup, or train.precision=fp32; resume before that step"
            )
            return Finding("wrong", "not finite", f"step {line['step']}: {values}", advice)
    return None


def _rising(run: Run) -> Finding | None:
    losses = run.values("loss")
    if len(losses) < LEAST or not all(map(math.isfinite, losses)):
        return None
    width = max(2, len(losses) // 8)
    means = [median(losses[i : i + width]) for i in range(0, len(losses) - width + 1, width)]
    start, low, end = means[0], min(means), means[-1]
    # Half of what was gained is lost again, by more than the noise of a mean.
    if end > low + max(0.5 * (start - low), 0.02 * abs(start)):
        evidence = f"loss {start:.3f} at first, {low:.3f} at its lowest, {end:.3f} at the end"
        return Finding(run.level, "loss rising", evidence, "lower train.optim.lr or train.optim.clip_norm, and resume")
    return None


def _itm_at_chance(run: Run) -> Finding | None:
    """ALBEF and BLIP judge one matched and two unmatched pairs a row, ViLT as many of each."""
    loss, accuracy = run.end("itm"), run.end("itm_accuracy")
    if loss is None:
        return None
    matched = 1 / 3 if run.values("scale") else 1 / 2  # ViLT has no temperature; an ALBEF may have no ITC
    chance = -matched * math.log(matched) - (1 - matched) * math.log(1 - matched)
    # A loss near chance with an accuracy well above it ranks pairs, and is only badly calibrated.
    if loss < (1 - NEAR) * chance or (accuracy is not None and accuracy > 1 - matched + 0.03):
        return None
    evidence = f"itm {loss:.4f} in the last quarter, chance {chance:.4f} ({matched:.2f} of the pairs match)"
    evidence += "" if accuracy is None else f"; accuracy {accuracy:.3f}, always 'unmatched' gives {1 - matched:.3f}"
    advice = "start from a trained CLIP stage, raise train.optim.lr, and check that captions belong to their pictures"
    spoken = next((f"model.{name}_weight" for name in ("lm", "itg") if run.values(name)), "")
    if spoken:
        advice += f"; lower {spoken} (to 0.1) and model.hard_share (to 0.25): both can keep it at chance at first"
    return Finding(run.level, "itm at chance", evidence, advice)


def _lm_at_chance(run: Run) -> Finding | None:
    """What says words (BLIP's LM, BLIP-2's ITG) and has learnt how often they come is far below their even chance."""
    words = int(run.setting("vocab_size", 0))
    for name in ("lm", "itg"):
        loss = run.end(name)
        if loss is None or words < 2 or loss < (1 - 5 * NEAR) * math.log(words):
            continue
        evidence = (
            f"{name} {loss:.3f} in the last quarter, ln({words}) = {math.log(words):.3f}: every word is as likely"
        )
        advice = "the decoder learns nothing: raise train.optim.lr, look at freeze and lr_scale, and read some captions"
        return Finding(run.level, f"{name} at chance", evidence, advice)
    return None


def _itc_at_chance(run: Run) -> Finding | None:
    loss, batch = run.end("itc"), int(run.setting("batch_size", 0))
    if loss is None or batch < 2:
        return None
    values, queue = run.values("itc"), int(run.setting("queue", 0)) if run.values("teacher_distance") else 0
    late = values[len(values) // 2 :]
    flat = max(late) - min(late) < NEAR * loss
    # A queue is empty at first, and a long one isn't full for many steps.
    filled = int(_end([min(queue, int(line["step"]) * batch) for line in run.train if "itc" in line]))
    for count, name in ((batch + filled, "batch + queue"), (batch, "batch")):
        chance = math.log(count)
        # A contrast over a queue crosses ln(batch) when it is healthy, so there it must also stand still.
        if abs(loss - chance) < NEAR * chance and (count == batch + filled or flat):
            evidence = f"itc {loss:.4f} in the last quarter, ln({name}) = ln({count}) = {chance:.4f}"
            advice = "features are all alike: lower train.optim.lr or lengthen its warm-up; look at the captions"
            return Finding(run.level, "itc at chance", evidence, advice)
    return None


def _temperature(run: Run) -> Finding | None:
    scale = run.end("scale")
    if scale is None:
        return None
    low, high = scale_bounds(run)
    if low * 1.005 < scale < high * 0.995:
        return None
    bound, side = (low, "lower") if scale <= low * 1.005 else (high, "upper")
    advice = (
        "the contrast finds nothing to tell apart: check the captions, lower train.optim.lr"
        if side == "lower"
        else "the model is surer than the bound lets it say: more or more varied data, more augmentation, fewer epochs"
    )
    evidence = f"logit scale {scale:.3f}, its {side} bound is {bound:g} (temperature {1 / bound:.4g})"
    return Finding("wrong", "temperature at its bound", evidence, advice)


def scale_bounds(run: Run) -> tuple[float, float]:
    """Bounds of the inverse temperature that the configuration sets; CLIP's 1 and 100 otherwise."""
    return float(run.setting("logit_scale_min", 1.0)), float(run.setting("logit_scale_max", 100.0))


def _teacher(run: Run) -> Finding | None:
    """The teacher follows the student at a distance that settles once the average is as old as its memory."""
    distances = run.values("teacher_distance")
    if len(distances) < 3:
        return None
    if not any(distances):
        evidence = f"teacher_distance is exactly 0 on all {len(distances)} lines: teacher and student are equal"
        advice = "either the teacher is copied instead of averaged (decay 0), or no weight moves (lr 0, all frozen)"
        return Finding("wrong", "teacher not moving", evidence, advice)
    if len(set(distances)) == 1:
        evidence = f"teacher_distance is {distances[0]:.4g} on all lines"
        return Finding(
            "wrong", "teacher not moving", evidence, "neither moves: look at the learning rate and at freeze"
        )
    memory = 5 / max(1e-6, 1 - float(run.setting("decay", 0.995)))
    settled = max(memory, float(run.setting("warmup", 0)))
    late = [line["teacher_distance"] for line in run.train if "teacher_distance" in line and line["step"] > settled]
    grew = sum(b > a for a, b in pairwise(late))
    if len(late) >= LEAST and grew >= 0.9 * (len(late) - 1) and late[-1] > 1.5 * late[0]:
        evidence = f"teacher_distance grew on {grew} of {len(late) - 1} lines, from {late[0]:.4g} to {late[-1]:.4g}"
        advice = "the student leaves and the teacher stays: it isn't updated after each step, or its decay is near 1"
        return Finding("wrong", "teacher not moving", evidence, advice)
    return None


def _clipped(run: Run) -> Finding | None:
    norms, bound = run.values("gradient_norm"), float(run.setting("clip_norm", 0.0))
    late = norms[len(norms) // 2 :]
    if not bound or len(norms) < LEAST or sum(norm > 10 * bound for norm in late) < 0.9 * len(late):
        return None
    evidence = f"gradients are {median(late):.1f} long in the second half, clipped to {bound:g} on nearly every line"
    advice = "lower train.optim.lr; raise train.optim.clip_norm if the loss falls well"
    # AdamW bears a steady factor; a large one hides the steps that went wrong.
    return Finding(run.level if median(late) > 30 * bound else "watch", "gradient always clipped", evidence, advice)


def _warm_up(run: Run) -> Finding | None:
    warmup, rates = int(run.setting("warmup", 0)), run.values("lr")
    if run.planned and warmup >= run.planned:
        evidence = f"warm-up takes {warmup} steps, the whole run has {run.planned}"
        advice = f"set train.optim.warmup to about {max(1, run.planned // 20)} in a new run"
        return Finding("wrong", "never leaves warm-up", evidence, advice)
    if rates and not any(rates):
        return Finding("wrong", "learning rate 0", f"lr is 0 on all {len(rates)} lines", "set train.optim.lr above 0")
    return None


def _slower(run: Run) -> Finding | None:
    rates = run.values("samples_per_second")
    if len(rates) < LEAST:
        return None
    first, last = median(rates[: len(rates) // 2]), median(rates[-max(2, len(rates) // 4) :])
    if last >= 0.5 * first:
        return None
    evidence = f"{first:.1f} samples/s in the first half, {last:.1f} in the last quarter"
    advice = "look for another program on the machine, a full memory (swapping), a hot processor, or slow storage"
    return Finding("wrong", "throughput falling", evidence, advice)


def _loss_scale(run: Run) -> Finding | None:
    scale = run.end("loss_scale")
    if scale is None or scale >= 1:
        return None
    evidence = f"fp16 loss scale {scale:.3g} in the last quarter: gradients overflow again and again"
    return Finding("wrong", "loss scale collapsed", evidence, "train.precision=bf16 or fp32, or lower train.optim.lr")


def _over_fitting(run: Run) -> Finding | None:
    lines = [line for line in run.lines if line.get("kind") == "evaluate"]
    retrieves = any("recall" in line for line in lines)  # a captioner has no features to retrieve by
    name = str(run.setting("best", "") or ("recall" if retrieves else "lm_accuracy"))
    shown = [(int(line["step"]), float(line[name])) for line in lines if name in line]
    if len(shown) < 3:
        return None
    best_step, best = max(shown, key=lambda pair: pair[1])
    after = [value for step, value in shown if step > best_step]
    if len(after) < 2 or max(after[-2:]) > 0.95 * best:
        return None
    before, now = _loss_at(run, best_step), _loss_at(run, run.step)
    if before is None or now is None or now >= before:
        return None
    evidence = f"{name} {best:.3f} at step {best_step}, {after[-1]:.3f} at the end; loss {before:.3f}, then {now:.3f}"
    advice = "use the best checkpoint (train.best names the figure that chooses it), fewer epochs, more augmentation"
    return Finding("wrong", "over-fitting", evidence, advice)


def _unreadable(run: Run) -> Finding | None:
    if not run.unreadable:
        return None
    evidence = f"{len(run.unreadable)} of {run.tried} pictures tried can't be decoded, first: {run.unreadable[0]}"
    level: Literal["wrong", "watch"] = "wrong" if len(run.unreadable) > 0.01 * run.tried else "watch"
    return Finding(level, "unreadable pictures", evidence, "list them with vlm data check, and mend or remove them")


def _unfinished(run: Run) -> Finding | None:
    if run.finished or not run.planned:
        return None
    if run.step >= run.planned:
        evidence = f"all {run.planned} steps are done, but no final model was written"
        return Finding("wrong", "unfinished", evidence, f"write it with: {run.resume}")
    times = [float(line["time"]) for line in run.train if "time" in line]
    usual = median([b - a for a, b in pairwise(times)] or [0.0])
    evidence = f"step {run.step} of {run.planned}, the last line {run.silent:.0f} s ago"
    if run.silent > max(600.0, 10 * usual):
        return Finding("wrong", "unfinished", evidence, f"go on with: {run.resume}")
    return Finding("watch", "still running", evidence, f"wait; if it was stopped, go on with: {run.resume}")


CHECKS: tuple[Callable[[Run], Finding | None], ...] = (
    *(
        _not_finite,
        _rising,
        _itm_at_chance,
        _lm_at_chance,
        _itc_at_chance,
        _temperature,
        _teacher,
        _clipped,
        _warm_up,
        _slower,
    ),
    *(_loss_scale, _over_fitting, _unreadable, _unfinished),
)


def _loss_at(run: Run, step: int) -> float | None:
    """Median loss of the five lines up to a step."""
    found = [float(line["loss"]) for line in run.train if "loss" in line and line["step"] <= step]
    return median(found[-5:]) if found else None


def _search(config: Mapping[str, Any], name: str, default: Any) -> Any:
    if name in config and not isinstance(config[name], Mapping):
        return config[name]
    for value in config.values():
        if isinstance(value, Mapping):
            found = _search(value, name, None)
            if found is not None:
                return found
    return default
