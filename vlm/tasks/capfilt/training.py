"""The three trainings of CapFilt as jobs of the engine: captioner, filter, and the new model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from vlm.errors import ConfigError
from vlm.models.blip import BlipConfig
from vlm.tasks.capfilt.settings import CapfiltConfig
from vlm.train.config import load_config, named_config
from vlm.train.distributed import Ranks
from vlm.train.engine import Evaluate
from vlm.train.run import ImagesConfig, RunConfig, run_kind, train_stage
from vlm.weights.files import CONFIG
from vlm.weights.loaded import VisionLanguageModel

logger = logging.getLogger("vlm.capfilt")

Part = Literal["captioner", "filter"]
Evaluation = Callable[[RunConfig[Any]], Evaluate | None]
"""What is measured while a run trains, if anything."""
LOSSES: dict[Part, tuple[str, ...]] = {"captioner": ("lm",), "filter": ("itc", "itm")}
"""What each is fine-tuned with (§3.3); the weights of these are the configuration's, those of the others 0."""


def tuning(config: CapfiltConfig, part: Part, model: VisionLanguageModel, start: Path) -> RunConfig[BlipConfig]:
    """The run that makes captioner or filter of the pre-trained model, which lies in the folder `start`.

    Raises ConfigError when the loss that it needs has no weight.
    """
    base = _base(config, config.tune)
    network: Any = model.network
    weights = {f"{head}_weight": 0.0 for head in ("itc", "itm", "lm")}
    weights |= {f"{head}_weight": getattr(base.model, f"{head}_weight") for head in LOSSES[part]}
    if not all(weights[f"{head}_weight"] > 0 for head in LOSSES[part]):
        wrong = ", ".join(f"model.{head}_weight" for head in LOSSES[part])
        raise ConfigError(f"the {part} is trained with {wrong}: set them above 0 in the configuration")
    train = base.train
    if part == "captioner":  # a teacher has nothing to say of LM
        train = replace(train, teacher=replace(train.teacher, decay=0.0))
    seen = model.transform
    return replace(
        base,
        name=part,
        model=replace(network.config, label_smoothing=base.model.label_smoothing, **weights),
        start=(str(start),),
        tokenizer="clip_bpe" if model.tokenizer.to_dict()["kind"] == "clip" else "wordpiece",
        data=config.human,
        validation=(),
        images=ImagesConfig(seen.mean, seen.std, seen.resize),
        train=train,
    )


def pretraining(config: CapfiltConfig, data: Path) -> RunConfig[BlipConfig]:
    """The run of the new model: the stage's own configuration and start, on what CapFilt wrote (§3.3)."""
    return replace(_base(config, config.pretrain), data=(str(data),))


def train_once(config: RunConfig[Any], run: Path, here: Ranks, evaluation: Evaluation | None = None) -> Path:
    """Train into the folder `run`, going on where a run of the same configuration stopped; returns its model's folder.

    Does nothing where the run is finished.
    """
    model = run / "model"
    if (model / CONFIG).is_file():
        return model
    resume = (run / "config.yaml").is_file()
    logger.info("%s %s", "going on with" if resume else "training", run)
    evaluate = evaluation(config) if evaluation is not None else None
    train_stage(config, run, here, resume=resume, evaluate=evaluate, progress=False)
    return model


def _base(config: CapfiltConfig, changes: Sequence[str]) -> RunConfig[BlipConfig]:
    found: RunConfig[BlipConfig] = load_config(
        run_kind("blip"), named_config("blip", config.training), [f"train.seed={config.seed}", *changes]
    )
    return found
