"""What the ablations have in common: short runs of a `tiny` recipe, and retrieval on clip art that no run sees."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.images import decode_image
from vlm.data.sources import Source, open_source
from vlm.generate import GenerationConfig
from vlm.tasks.caption import Captioner
from vlm.tasks.caption_report import CIDER, References, evaluate_captions, source_references
from vlm.tasks.retrieval import evaluate_retrieval
from vlm.train.config import load_config, named_config
from vlm.train.run import RunConfig, run_kind
from vlm.weights.load import load
from vlm.weights.loaded import VisionLanguageModel

TEST, GALLERY = "web-test", 50
MOST_TOKENS = 12
"""Longest caption, learnt or said; names of emoji and clip art are short, and padding costs what words cost."""
PLAIN = ("loader.augment={}", "loader.captions={}")
"""Pictures and captions as they are: what costs time, and differs between no two variants."""
TEACHER = ("train.teacher.decay=0.98", "train.teacher.ramp=0.25")
"""Short runs need a teacher that follows sooner, and its share of the targets from early on."""


def short_run(steps: int, precision: str, batch: int = 48) -> list[str]:
    """Overrides for a run of so many optimiser steps of `batch` samples that is measured when it is finished."""
    return [
        f"train.steps={steps}", f"train.precision={precision}", "train.evaluate_every=0", "train.save_every=100",
        "train.keep=1", f"train.optim.warmup={max(1, steps // 10)}", "validation=[]", f"loader.batch_size={batch}",
    ]  # fmt: skip


def tiny_config(stage: str, changes: Sequence[str] = ()) -> RunConfig[Any]:
    """A stage's `tiny` recipe with some changes, KEY=VALUE."""
    config: RunConfig[Any] = load_config(run_kind(stage), named_config(stage, "tiny"), list(changes))
    return config


def frozen(stage: str) -> tuple[str, ...]:
    """Parts that no short run trains: the image tower, which costs time too, and those of the stage's tiny recipe."""
    return ("image.", *tiny_config(stage).train.optim.freeze)


def open_run(run: Path, device: str) -> tuple[VisionLanguageModel, Source]:
    """A run's model, and the held-out clip art that it is measured on."""
    return load(run, device=device), open_test()


def open_test() -> Source:
    """The held-out clip art that all models are measured on."""
    return open_source(TEST)


def retrieval_figures(model: VisionLanguageModel, source: Source) -> dict[str, float]:
    """Recall by features (``itc_...``), and by ITM over all pairs (``itm_...``), in galleries of `GALLERY`.

    A model that can't match has the former alone.
    """
    report = evaluate_retrieval(model, source, gallery=GALLERY, rerank=GALLERY if model.can("match") else 0)
    found = {f"itc_{name}": value for name, value in report.figures().items()}
    if report.reranked is not None:
        found |= {f"itm_{way}_r{k}": f.value for way, at in report.reranked.recall.items() for k, f in at.items()}
    return found


def caption_figures(model: VisionLanguageModel, source: Source, pictures: int = 0) -> dict[str, float]:
    """CIDEr-D (``cider``, from 0 to 10) of captions of beam search, of at most `MOST_TOKENS`.

    pictures: how many of the source's are captioned, always the same ones; 0 for all.
    """
    numbers = np.random.default_rng(0).permutation(len(source))[: pictures or None]
    samples = [source[number] for number in sorted(numbers.tolist())]
    captioner = Captioner(model, GenerationConfig("beam", beams=3, max_new_tokens=MOST_TOKENS))
    texts = captioner.caption([decode_image(sample.image, name=sample.key) for sample in samples])
    said = dict(zip([sample.key for sample in samples], texts, strict=True))
    written = source_references(source).captions
    references = References(source.name, {key: written[key] for key in said})
    report = evaluate_captions(said, references, name=model.name, draws=10)
    return {"cider": report.figures[CIDER].value}
