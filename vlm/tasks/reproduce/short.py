"""What the ablations have in common: short runs of a `tiny` recipe, and retrieval on clip art that no run sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm.data.sources import Source, open_source
from vlm.tasks.retrieval import evaluate_retrieval
from vlm.train.config import load_config, named_config
from vlm.train.run import RunConfig, run_kind
from vlm.weights.load import load
from vlm.weights.loaded import VisionLanguageModel

TEST, GALLERY = "web-test", 50
PLAIN = ("loader.augment={}", "loader.captions={}")
"""Pictures and captions as they are: what costs time, and differs between no two variants."""
TEACHER = ("train.teacher.decay=0.98", "train.teacher.ramp=0.25")
"""Short runs need a teacher that follows sooner, and its share of the targets from early on."""


def short_run(steps: int, precision: str) -> list[str]:
    """Overrides for a run of so many optimiser steps of 48 that is measured when it is finished."""
    return [
        f"train.steps={steps}", f"train.precision={precision}", "train.evaluate_every=0", "train.save_every=100",
        "train.keep=1", f"train.optim.warmup={max(1, steps // 10)}", "validation=[]", "loader.batch_size=48",
    ]  # fmt: skip


def frozen(stage: str) -> tuple[str, ...]:
    """Parts that no short run trains: the image tower, which costs time too, and those of the stage's tiny recipe."""
    config: RunConfig[Any] = load_config(run_kind(stage), named_config(stage, "tiny"), [])
    return ("image.", *config.train.optim.freeze)


def open_run(run: Path, device: str) -> tuple[VisionLanguageModel, Source]:
    """A run's model, and the held-out clip art that it is measured on."""
    return load(run, device=device), open_source(TEST)


def retrieval_figures(model: VisionLanguageModel, source: Source) -> dict[str, float]:
    """Recall by features (``itc_...``), and by ITM over all pairs (``itm_...``), in galleries of `GALLERY`."""
    report = evaluate_retrieval(model, source, gallery=GALLERY, rerank=GALLERY, score="itm")
    found = {f"itc_{name}": value for name, value in report.figures().items()}
    if report.reranked is not None:
        found |= {f"itm_{way}_r{k}": f.value for way, at in report.reranked.recall.items() for k, f in at.items()}
    return found
