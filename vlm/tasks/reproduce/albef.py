"""ALBEF's ablation in miniature (2107.07651, table 1): its objectives one by one, on clean and on noisy captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlm.errors import ConfigError
from vlm.tasks.matching import evaluate_matching
from vlm.tasks.reproduce.grid import Cell, run_grid
from vlm.tasks.reproduce.short import PLAIN, TEACHER, frozen, open_run, retrieval_figures, short_run

VARIANTS = {
    "ITM + MLM": ("model.itc_weight=0", "model.negatives=random", "train.teacher.decay=0"),
    "+ ITC": ("model.negatives=random", "train.teacher.alpha=0"),
    "+ hard negatives": ("train.teacher.alpha=0",),
    "+ MoD": (),
}
"""Each adds to the one before; settings of the `tiny` recipe, which has them all. Otherwise than in the paper it draws
half of the hard negatives evenly (`hard_share`) and weighs MLM with 0.1; short runs also have `PLAIN` data and a
sooner `TEACHER`."""
MEASURES = {
    "itm_text_to_image_r1": "ITM text to image R@1 %",
    "itm_image_to_text_r1": "ITM image to text R@1 %",
    "itc_text_to_image_r1": "ITC text to image R@1 %",
    "itc_image_to_text_r1": "ITC image to text R@1 %",
    "match_order": "own text before a foreign one %",
}


def reproduce_albef(
    out: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    noise: Sequence[float] = (0.0, 0.2, 0.4),
    steps: int = 120,
    precision: str = "auto",
    known: Sequence[dict[str, Any]] = (),
    after: Callable[[list[dict[str, Any]]], None] | None = None,
    device: str = "auto",
) -> list[dict[str, Any]]:
    """Train every variant from tiny-clip with every share of shuffled captions and every seed, and measure it.

    Measured on ``web-test``, which no run sees: ITM over all pairs of galleries of 50, the features' own order in
    them, and whether a picture's text scores higher than a foreign one. known, after: see `run_grid`. Returns the
    results. Raises ConfigError for shares that are none.
    """
    if not seeds or not noise or any(not 0 <= share < 1 for share in noise):
        raise ConfigError(
            f"expected at least one seed, and at least one share from 0 to below 1, got {seeds!r} and {noise!r}"
        )
    recipe = [
        *short_run(steps, precision), *PLAIN, *TEACHER,
        f"train.optim.freeze=[{', '.join(frozen('albef'))}]",
    ]  # fmt: skip
    return run_grid(
        "albef", cells_of(noise), seeds=seeds, recipe=recipe, out=out,
        measure=lambda run: measure(run, device), known=known, after=after, device=device,
    )  # fmt: skip


def cells_of(noise: Sequence[float]) -> list[Cell]:
    """Every variant with every share of shuffled captions."""
    return [
        Cell(name, f"{100 * share:g}% shuffled", (*changes, f"loader.shuffled={share}"))
        for share in dict.fromkeys(noise)
        for name, changes in VARIANTS.items()
    ]


def measure(run: Path, device: str = "auto") -> dict[str, float]:
    """Figures of a run's model on the held-out clip art."""
    model, source = open_run(run, device)
    return retrieval_figures(model, source) | evaluate_matching(model, source).figures()
