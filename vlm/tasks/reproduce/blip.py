"""BLIP's ablations in miniature (2201.12086, tables 1 to 3): what CapFilt's two parts are worth, how captions are
drawn, and what encoder and decoder share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from vlm.errors import ConfigError
from vlm.generate import GenerationConfig
from vlm.tasks.capfilt.run import run_capfilt
from vlm.tasks.capfilt.settings import CapfiltConfig, Execution
from vlm.tasks.capfilt.training import train_once
from vlm.tasks.reproduce.grid import Cell, folder_name, run_grid
from vlm.tasks.reproduce.short import (
    MOST_TOKENS,
    PLAIN,
    TEACHER,
    caption_figures,
    frozen,
    open_run,
    retrieval_figures,
    short_run,
    tiny_config,
)
from vlm.train.distributed import ranks

WEB, HUMAN = "web-train", "human-train"


@dataclass(frozen=True)
class Rewritten:
    """What CapFilt makes of the web set."""

    captions: Literal["", "nucleus", "beam"] = ""
    """How the captioner writes a second text for each picture; empty for none."""
    filtered: bool = False
    """Whether texts that don't match are dropped."""

    @property
    def name(self) -> str:
        """Of its folder, and in the table."""
        parts = [f"captioner ({self.captions})"] if self.captions else []
        return " + ".join([*parts, *(["filter"] if self.filtered else [])]) or "none"

    def config(self, start: CapfiltConfig) -> CapfiltConfig:
        """CapFilt with these switches."""
        beam = GenerationConfig("beam", beams=3, max_new_tokens=MOST_TOKENS)
        nucleus = GenerationConfig("nucleus", top_p=0.9, max_new_tokens=MOST_TOKENS)
        way = beam if self.captions == "beam" else nucleus
        return replace(start, synthetic=bool(self.captions), filtering=self.filtered, generation=way)


BOTH = Rewritten("nucleus", filtered=True)
SETS = (
    Rewritten(),
    Rewritten(filtered=True),
    Rewritten("beam"),
    Rewritten("nucleus"),
    Rewritten("beam", filtered=True),
    BOTH,
)
"""Table 1 and table 2: neither, each and both; beam search against nucleus sampling."""
SHARED = ("none", "all")
"""Table 3; sharing all but self-attention is the default, and so the last of `SETS`."""
EASY = "model.negatives=random"
"""With hard negatives ITM, which begins from nothing, doesn't leave its chance value in so few steps."""
FAST = "train.optim.lr=2.0e-3"
"""Twice the `tiny` recipe's."""
MEASURES = {
    "itm_text_to_image_r1": "text to image R@1 % (ITM)",
    "itm_image_to_text_r1": "image to text R@1 % (ITM)",
    "itc_text_to_image_r1": "text to image R@1 % (ITC)",
    "itc_image_to_text_r1": "image to text R@1 % (ITC)",
    "cider": "captions' CIDEr-D x 100",
}


@dataclass(frozen=True)
class Sizes:
    """Lengths of the trainings, in optimiser steps."""

    pretrain: int = 100
    """Of the MED that captioner and filter begin as, and of every model that is compared."""
    tune: int = 60
    """Of captioner and filter each."""


def reproduce_blip(
    out: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    sizes: Sizes = Sizes(),
    start: str = "tiny-albef",
    precision: str = "auto",
    known: Sequence[dict[str, Any]] = (),
    after: Callable[[list[dict[str, Any]]], None] | None = None,
    device: str = "auto",
) -> list[dict[str, Any]]:
    """For every seed: pre-train a MED on the noisy web set and the human one, make captioner and filter of it, rewrite
    the web set in each way, train a new model on each result, and measure it.

    The web set's texts are those of its uploaders, the human set's the names of emoji. All models begin as `start`
    and see as many texts in as many steps; those that are compared keep its image tower. Measured on ``web-test``,
    whose cleaned texts no run sees: ITM over all pairs of galleries of 50, features in the same, and captions of beam
    search against one reference each.

    start: the stage before; anything that ``--start`` takes. known, after: see `run_grid`. Returns the results.
    Raises ConfigError when there is no seed or no step.
    """
    if not seeds or min(sizes.pretrain, sizes.tune) < 1:
        raise ConfigError(f"expected at least one seed and one step of each training, got {seeds!r} and {sizes}")
    still = f"train.optim.freeze=[{', '.join(frozen('blip'))}]"
    plain = (*PLAIN, f"loader.max_length={MOST_TOKENS}")
    begun = f"start={json.dumps([start])}"
    recipe = [*short_run(sizes.pretrain, precision), begun, *plain, *TEACHER, still, FAST, EASY]
    tune = [*short_run(sizes.tune, precision), *plain, EASY]
    return run_grid(
        "blip", cells(), seeds=seeds, recipe=recipe, out=out / "models", measure=lambda run: measure(run, device),
        prepare=lambda cell, seed: _prepare(out, cell, seed, recipe, tune, device),
        prepared={"tuning": tune, "caption_tokens": MOST_TOKENS}, known=known, after=after, device=device,
    )  # fmt: skip


def cells() -> list[Cell]:
    """What is compared: the sets, then the ways of sharing on the best of them."""
    found = [Cell(one.name, "CapFilt", ()) for one in SETS]
    return found + [Cell(f"shared: {name}", BOTH.name, (f"model.sharing={name}",)) for name in SHARED]


def measure(run: Path, device: str = "auto") -> dict[str, float]:
    """Figures of a run's model on the held-out clip art."""
    model, source = open_run(run, device)
    return retrieval_figures(model, source) | caption_figures(model, source)


def _prepare(out: Path, cell: Cell, seed: int, recipe: Sequence[str], tune: Sequence[str], device: str) -> list[str]:
    """The set that a cell is trained on, made if it isn't there.

    Captioner and filter are made with `BOTH`, and run once for each way of captioning: the sets that lack one of the
    two take the texts and scores of the one that has both.
    """
    wanted = next((one for one in SETS if one.name == cell.row), BOTH)
    folder = out / f"seed-{seed}"
    config = CapfiltConfig((WEB,), (HUMAN,), model=str(folder / "med"), seed=seed, tune=tuple(tune), shard_samples=500)
    how = Execution(device=device, batch_size=64)
    with ranks(device) as here:
        changes = [*recipe, f"train.seed={seed}", "loader.captions.web=1"]
        train_once(tiny_config("blip", changes), folder / "med", here)
        whole = Rewritten(wanted.captions or BOTH.captions, filtered=True)
        places = {one: folder / "capfilt" / folder_name(one.name) for one in (BOTH, whole, wanted)}
        for one, place in places.items():
            given: dict[str, Any] = {}
            if one == whole != BOTH:
                given = {"captioner": str(places[BOTH] / "captioner"), "judge": str(places[BOTH] / "filter")}
            elif one != whole and one != BOTH:
                given = {"model": "", "judged": str(places[whole])}
            made = run_capfilt(one.config(replace(config, **given)), place, here, how=how, pretrain=False)
    return [f"data={json.dumps([str(made.data)])}"]
