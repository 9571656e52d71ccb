"""The doctor on made runs: each disease is named, alone, and a healthy run is called healthy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vlm.train.config import named_config, read_yaml
from vlm.train.doctor import Run, diagnose
from vlm.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
Change = Callable[[int, float], dict[str, float]]
CONFIG = {
    "model": {"logit_scale_max": 100.0},
    "loader": {"batch_size": 64},
    "train": {"teacher": {"decay": 0.995, "queue": 960}, "optim": {"warmup": 200, "clip_norm": 1.0, "lr": 1e-3}},
}
LN2, THIRD = math.log(2), math.log(3) - 2 / 3 * math.log(2)


def healthy(step: int, done: float) -> dict[str, float]:
    """An ALBEF line; `done` runs from 0 to 1."""
    wave = 0.01 * math.sin(step)
    return {
        "loss": 13 - 5 * done + wave,
        "itc": math.log(1024) - 3 * done + wave,
        "itm": THIRD - 0.2 * done + wave,
        "itm_accuracy": 0.667 + 0.15 * done,
        "mlm": 7 - 3 * done,
        "scale": 14 + 20 * done,
        "teacher_distance": 0.02 + 0.001 * math.sin(step),
        "gradient_norm": 3 + wave,
        "lr": 1e-3 * min(1.0, (step + 1) / 200),
        "samples_per_second": 100 + 10 * wave,
    }


def made(change: Change = lambda step, done: {}, *, without: tuple[str, ...] = (), **more: Any) -> Run:
    lines: list[dict[str, Any]] = []
    for number in range(40):
        step, done = 50 * (number + 1), number / 39
        values = {k: v for k, v in (healthy(step, done) | change(step, done)).items() if k not in without}
        lines.append({"kind": "train", "step": step, "time": 10.0 * number, **values})
        if step % 400 == 0:
            recall = more.get("recall", lambda done: 0.1 + 0.3 * done)(done)
            lines.append({"kind": "evaluate", "step": step, "time": 10.0 * number, "recall": recall})
    more.pop("recall", None)
    return Run(lines, **({"config": CONFIG, "planned": 2000, "finished": True} | more))


def names(run: Run) -> list[str]:
    return [f"{finding.level}: {finding.name}" for finding in diagnose(run)]


def test_healthy_runs() -> None:
    assert names(made()) == []
    assert names(made(without=("itc", "scale", "teacher_distance"))) == []
    shipped = read_metrics(ROOT / "vlm" / "assets" / "tiny-clip" / "metrics.jsonl")
    assert names(Run(shipped, {"loader": {"batch_size": 64}, "train": {"optim": {"clip_norm": 1.0}}})) == []


DISEASES: list[tuple[str, Change, str]] = [
    ("not finite", lambda s, d: {"loss": math.nan} if s == 2000 else {}, "step 2000: loss nan"),
    ("loss rising", lambda s, d: {"loss": 13 - 5 * d if d < 0.5 else 8 + 4 * d}, "12.744 at first"),
    ("itm at chance", lambda s, d: {"itm": THIRD - 0.002, "itm_accuracy": 0.667}, "chance 0.6365"),
    ("itc at chance", lambda s, d: {"itc": math.log(1024) - 0.01}, "ln(1024)"),
    ("itc at chance", lambda s, d: {"itc": math.log(64)}, "ln(batch) = ln(64)"),
    ("temperature at its bound", lambda s, d: {"scale": min(100, 50 + 200 * d)}, "upper bound is 100"),
    ("temperature at its bound", lambda s, d: {"scale": max(1, 14 - 40 * d)}, "lower bound is 1"),
    ("teacher not moving", lambda s, d: {"teacher_distance": 0.0}, "exactly 0 on all 40"),
    ("teacher not moving", lambda s, d: {"teacher_distance": 0.04}, "0.04 on all lines"),
    ("teacher not moving", lambda s, d: {"teacher_distance": s / 1000}, "grew on"),
    ("gradient always clipped", lambda s, d: {"gradient_norm": 60.0}, "60.0 long"),
    ("learning rate 0", lambda s, d: {"lr": 0.0}, "on all 40 lines"),
    ("throughput falling", lambda s, d: {"samples_per_second": 100 if d < 0.6 else 30}, "30.0 in the last"),
    ("loss scale collapsed", lambda s, d: {"loss_scale": 65536 * 0.5 ** (40 * d)}, "fp16 loss scale"),
]


@pytest.mark.parametrize(("name", "change", "evidence"), DISEASES)
def test_a_disease_is_named_and_nothing_else(name: str, change: Change, evidence: str) -> None:
    (finding,) = diagnose(made(change))
    assert (finding.level, finding.name) == ("wrong", name)
    assert evidence in finding.evidence and finding.advice


def test_itm_chance_of_equal_halves() -> None:
    """A run without ITC (ViLT) judges as many matched as unmatched pairs: ln 2; ALBEF's third says nothing there."""
    without = ("itc", "scale", "teacher_distance")
    stuck = made(lambda s, d: {"itm": LN2, "itm_accuracy": 0.5}, without=without)
    assert names(stuck) == ["wrong: itm at chance"]
    assert names(made(lambda s, d: {"itm": THIRD, "itm_accuracy": 0.66}, without=without)) == []
    # Pairs are told apart although the loss is no better than chance.
    assert names(made(lambda s, d: {"itm": LN2, "itm_accuracy": 0.8})) == []


def test_itm_chance_of_an_albef_without_a_contrast() -> None:
    stuck = made(lambda s, d: {"itm": THIRD, "itm_accuracy": 0.667, "scale": 14.3}, without=("itc", "teacher_distance"))
    assert names(stuck) == ["wrong: itm at chance"]


def test_words_at_chance() -> None:
    """Word frequencies alone bring the loss well below an even chance; a run without LM says nothing of it."""
    config = CONFIG | {"model": {"text": {"vocab_size": 30524}, "logit_scale_max": 100.0}}
    (finding,) = diagnose(made(lambda s, d: {"lm": 10.2}, config=config))
    assert (finding.level, finding.name) == ("wrong", "lm at chance") and "ln(30524) = 10.326" in finding.evidence
    assert names(made(lambda s, d: {"itg": 10.2}, config=config)) == ["wrong: itg at chance"]
    assert names(made(lambda s, d: {"lm": 10.3 - 5 * d}, config=config)) == []
    assert names(made(config=config)) == []


def test_words_for_a_q_former() -> None:
    """By the recipe itself: its batch, its vocabulary, no queue; what keeps ITM at chance there is named."""
    config = read_yaml(named_config("blip2", "tiny"))
    itc, itg = math.log(64), math.log(30523)
    sick: dict[str, dict[str, float]] = {
        "itm at chance": {"itm": THIRD, "itm_accuracy": 0.667},
        "itc at chance": {"itc": itc}, "itg at chance": {"itg": itg},
    }  # fmt: skip
    for name, values in sick.items():
        well = {"itc": 2.0, "itg": 4.0}
        (finding,) = diagnose(made(lambda s, d, v=well | values: v, config=config, without=("mlm", "teacher_distance")))  # type: ignore[misc]
        assert (finding.level, finding.name) == ("wrong", name)
        assert ("lower model.itg_weight (to 0.1) and model.hard_share" in finding.advice) == (name == "itm at chance")


def test_a_captioner_over_fits_by_the_words_it_foresees() -> None:
    run = made(recall=lambda done: 0.4 - 0.3 * abs(done - 0.4))
    lines = [{("lm_accuracy" if name == "recall" else name): v for name, v in line.items()} for line in run.lines]
    (finding,) = diagnose(replace(run, lines=lines))
    assert finding.name == "over-fitting" and "lm_accuracy 0." in finding.evidence


def test_a_young_run_is_only_watched() -> None:
    run = made(lambda s, d: {"itm": THIRD, "itm_accuracy": 0.667, "itc": math.log(1024)})
    young = replace(run, lines=[{**line, "step": line["step"] // 10} for line in run.lines], planned=0)
    assert names(young) == ["watch: itm at chance", "watch: itc at chance"]


def test_the_chance_of_itc_grows_with_a_queue_that_still_fills() -> None:
    long = {"decay": 0.995, "queue": 262144}
    config = {**CONFIG, "train": CONFIG["train"] | {"teacher": long}}
    stuck = made(lambda s, d: {"itc": math.log(64 + 64 * s) - 0.01}, config=config)
    (finding,) = diagnose(stuck)
    assert finding.name == "itc at chance" and "ln(batch + queue) = ln(113664)" in finding.evidence
    assert names(made(lambda s, d: {"itc": math.log(64 + 64 * s) - 3 * d}, config=config)) == []


def test_itc_that_crosses_the_batch_is_healthy_with_a_queue() -> None:
    assert names(made(lambda s, d: {"itc": math.log(64) + 0.4 * (0.87 - d)})) == []


def test_a_teacher_of_a_short_memory_may_grow_in_warm_up() -> None:
    assert names(made(lambda s, d: {"teacher_distance": 0.02 * min(1.0, s / 1000)})) == []


def test_never_leaves_warm_up() -> None:
    config = CONFIG | {"train": {"optim": {"warmup": 3000, "clip_norm": 1.0}}}
    assert names(made(config=config)) == ["wrong: never leaves warm-up"]


def test_over_fitting_needs_a_falling_loss() -> None:
    def falls(done: float) -> float:
        return 0.4 - 0.3 * abs(done - 0.4)

    (finding,) = diagnose(made(recall=falls))
    assert finding.name == "over-fitting" and "recall 0." in finding.evidence
    flat = made(lambda s, d: {"loss": 5.0}, recall=falls)
    assert "wrong: over-fitting" not in names(flat)


def test_unreadable_pictures() -> None:
    run = made(unreadable=("a.png: truncated",), tried=50)
    assert names(run) == ["wrong: unreadable pictures"] and "1 of 50" in diagnose(run)[0].evidence
    assert names(replace(run, tried=500)) == ["watch: unreadable pictures"]


def test_unfinished() -> None:
    run = made(planned=4000, finished=False, resume="vlm train albef --out x --resume")
    assert names(run) == ["watch: still running"]
    (finding,) = diagnose(replace(run, silent=5000.0))
    assert (finding.level, finding.name) == ("wrong", "unfinished") and "albef --out x --resume" in finding.advice
    assert names(replace(run, planned=2000)) == ["wrong: unfinished"]


def test_moderate_clipping_is_only_watched() -> None:
    assert names(made(lambda s, d: {"gradient_norm": 15.0})) == ["watch: gradient always clipped"]
    assert names(made(lambda s, d: {"gradient_norm": 8.0})) == []


def test_nothing_written() -> None:
    assert names(Run([{"kind": "evaluate", "step": 1, "recall": 0.1}])) == ["wrong: nothing trained"]
