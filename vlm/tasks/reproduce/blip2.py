"""BLIP-2's two stages in miniature (2301.12597): what the second gains from the first (figure 5), and what ITG is worth
in the first (table 6), beside the models of the stages before."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from vlm.errors import ConfigError
from vlm.models.blip2_llm import Blip2Llm
from vlm.tasks.language import evaluate_language
from vlm.tasks.reproduce.grid import REFERENCE, Cell, folder_name, run_grid, train_part
from vlm.tasks.reproduce.references import reference_results
from vlm.tasks.reproduce.short import (
    GALLERY,
    MOST_TOKENS,
    PLAIN,
    TEST,
    caption_figures,
    open_run,
    open_test,
    retrieval_figures,
    short_run,
    tiny_config,
)
from vlm.train.distributed import pick_device
from vlm.train.features import compute_features
from vlm.train.optim import freeze
from vlm.train.run import RunConfig, begun_network, make_transform, read_run_config
from vlm.weights.files import CONFIG, read_json
from vlm.weights.load import load

FIRST, SECOND = "blip2", "blip2-llm"
STARTS = ("tiny-clip", "minilm")
ALONE = "stage 2 alone"
VARIANTS = {"ITC + ITM + ITG, then stage 2": (), "ITC + ITM, then stage 2": ("model.itg_weight=0",)}
"""By row, what stage 1 has of its losses; settings of its `tiny` recipe, which has them all."""
REFERENCES = ("tiny-clip", "tiny-albef", "tiny-blip")
MEASURES = {
    "itm_text_to_image_r1": "text to image R@1 % (ITM)",
    "itm_image_to_text_r1": "image to text R@1 % (ITM)",
    "itc_text_to_image_r1": "text to image R@1 % (ITC)",
    "itc_image_to_text_r1": "image to text R@1 % (ITC)",
    "lm_accuracy": "caption's tokens foreseen %",
    "cider": "captions' CIDEr-D x 100",
}
"""Retrieval is stage 1's, captions are stage 2's."""
COUNTS = {"trained": "trained in stage 2, M", "parameters": "parameters, M"}
COLUMN = "steps trained here"
FAST = ("model.llm.start_first=true", "train.optim.lr_scale={qformer.: 0.5}")
"""Of stage 2, where the `tiny` recipe foresees no word in its first 75 steps; the Q-Former moves at half the rate."""


@dataclass(frozen=True)
class Sizes:
    """Lengths of the trainings, in optimiser steps, and how much each step and the measuring takes."""

    stage1: int = 200
    """Of each Q-Former that has a stage 1."""
    stage2: int = 200
    """Of every model that is compared."""
    stage1_batch: int = 64
    """Samples of a step of stage 1."""
    stage2_batch: int = 64
    """Samples of a step of stage 2."""
    captioned: int = 0
    """Test pictures that are captioned, the same for all models; 0 for all."""


def reproduce_blip2(
    out: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    sizes: Sizes = Sizes(),
    start: Sequence[str] = STARTS,
    references: Sequence[str] = REFERENCES,
    first: Sequence[str] = (),
    second: Sequence[str] = (),
    precision: str = "auto",
    known: Sequence[dict[str, Any]] = (),
    after: Callable[[list[dict[str, Any]]], None] | None = None,
    device: str = "auto",
) -> list[dict[str, Any]]:
    """For every seed: train a Q-Former's stage 1 with and without ITG, then stage 2 from each of the two and from
    neither, in as many steps, and measure them.

    All train on what the frozen image encoder made of the pictures, computed once. Measured on ``web-test``, which no
    run sees: stage 1's ITM over all pairs of galleries of 50 and its features' own order in them; stage 2's captions
    of beam search against one reference each, and how often it foresees the next token of that.

    start: what image encoder and Q-Former begin as; anything that ``--start`` takes. references: models that are
    measured as they are, as far as they can do the same, and not trained. first, second: further overrides of each
    stage's `tiny` configuration. known, after: see `run_grid`. Returns the results, those of reference last. Raises
    ConfigError when there is no seed, no step or nothing to start from.
    """
    _check(seeds, sizes, start)
    plain = (*PLAIN, f"loader.max_length={MOST_TOKENS}")
    stage1 = [
        *short_run(sizes.stage1, precision, sizes.stage1_batch), f"start={json.dumps(list(start))}", *plain, *first,
    ]  # fmt: skip
    recipe = [*short_run(sizes.stage2, precision, sizes.stage2_batch), *plain, "train.best=''", *FAST, *second]
    before = tiny_config(FIRST, stage1)  # refuses wrong settings before anything is measured
    measured = f"{TEST}: captions of {MOST_TOKENS} tokens, {sizes.captioned or 'all'} pictures, galleries of {GALLERY}"
    beside = reference_results(
        references, out=out / "references", measured=[measured], known=known,
        measure=lambda model: measure_reference(model, device, sizes.captioned),
    )  # fmt: skip
    found = run_grid(
        SECOND, cells(sizes), seeds=seeds, recipe=recipe, out=out / "models",
        prepare=lambda cell, seed: _prepare(out, cell, seed, stage1, device),
        prepared={"stage1": before, "measured": measured},
        measure=lambda run: measure(run, device, sizes.captioned),
        known=[one for one in known if not one.get(REFERENCE)],
        after=None if after is None else lambda results: after([*results, *beside]), device=device,
    )  # fmt: skip
    return [*found, *beside]


def cells(sizes: Sizes) -> list[Cell]:
    """What is compared: stage 2 after each kind of stage 1, and without one."""
    after = [Cell(row, f"{sizes.stage1} + {sizes.stage2}", ()) for row in VARIANTS]
    return [*after, Cell(ALONE, str(sizes.stage2), ())]


def measure(run: Path, device: str = "auto", captioned: int = 0) -> dict[str, float]:
    """Figures of a stage-2 run's model on the held-out clip art, and of the stage-1 model that it began as, if any."""
    model, source = open_run(run, device)
    config = read_run_config(SECOND, run)
    found = caption_figures(model, source, captioned) | evaluate_language(model, source).figures()
    found |= {"trained": _trained(config), "parameters": _parameters(model.network)}
    for folder in map(Path, config.start):
        if (folder / CONFIG).is_file() and read_json(folder / CONFIG).get("family") == FIRST:
            found |= retrieval_figures(load(folder, device=device), source)
    return found


def measure_reference(name: str, device: str = "auto", captioned: int = 0) -> dict[str, float]:
    """The same figures of another model, as far as it can do what they need."""
    model, source = load(name, device=device), open_test()
    found = retrieval_figures(model, source) if model.can("encode_image") else {}
    found |= caption_figures(model, source, captioned) if model.can("decode") else {}
    return found | {"parameters": _parameters(model.network)}


def _check(seeds: Sequence[int], sizes: Sizes, start: Sequence[str]) -> None:
    if not seeds or min(astuple(sizes)[:4]) < 1 or sizes.captioned < 0:
        raise ConfigError(f"expected at least one seed, one step and one sample of each, got {seeds!r} and {sizes}")
    if not start:
        raise ConfigError("expected at least one start: the image encoder is frozen, and would stay random")


def _prepare(out: Path, cell: Cell, seed: int, stage1: Sequence[str], device: str) -> list[str]:
    """What a cell's model begins as, and the features that it is trained on; made if they aren't there."""
    config = tiny_config(FIRST, stage1)
    folder = out / "features"
    network, transform = begun_network(config), make_transform(config)
    compute_features(network, transform, config.data, folder, device=pick_device(device), kind="float16")
    features = f"features={json.dumps(str(folder))}"
    if cell.row not in VARIANTS:
        return [f"start={json.dumps(config.start)}", features]
    run = out / f"seed-{seed}" / folder_name(cell.row)
    model = train_part(FIRST, run, [*stage1, *VARIANTS[cell.row], f"train.seed={seed}", features], device)
    return [f"start={json.dumps([str(model)])}", features]


def _trained(config: RunConfig[Any]) -> int:
    """Parameters that a stage-2 run moves."""
    with torch.device("meta"):
        network = Blip2Llm(config.model)  # without its language model, which is frozen
    freeze(network, config.train.optim.freeze)
    return sum(one.numel() for one in network.parameters() if one.requires_grad)


def _parameters(network: torch.nn.Module) -> int:
    """All parameters of a network, a frozen language model's too."""
    return sum(one.numel() for one in network.parameters())
