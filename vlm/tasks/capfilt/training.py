"""The three trainings of CapFilt as jobs of the engine: captioner, filter, and the new model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

from vlm.errors import ConfigError
from vlm.models.blip import Blip, BlipConfig, Head
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
HEADS: dict[Part, tuple[Head, ...]] = {"captioner": ("lm",), "filter": ("itc", "itm")}
"""What each has of the pre-trained model, and is fine-tuned with (§3.3)."""
LEARNING = ("itc_weight", "itm_weight", "lm_weight", "negatives", "hard_share", "label_smoothing")
"""Settings of the network that say how it learns, not what it is."""


def tuning(config: CapfiltConfig, part: Part, model: VisionLanguageModel, start: Path) -> RunConfig[BlipConfig]:
    """The run that makes captioner or filter of the pre-trained model, which lies in the folder `start`.

    Its network is the pre-trained one's, of which `HEADS` are left; losses, optimiser and all else are the
    configuration's. Raises ConfigError when a loss that it needs has no weight.
    """
    base = _base(config, config.captioner_training if part == "captioner" else config.judge_training, config.tune)
    ours, network, seen = base.model, cast(Blip, model.network), model.transform
    lost = [f"model.{head}_weight" for head in HEADS[part] if not getattr(ours, f"{head}_weight") > 0]
    if lost:
        raise ConfigError(f"the {part} learns by {' and '.join(HEADS[part])}: set {', '.join(lost)} above 0")
    trained = {name: getattr(ours, name) for name in LEARNING}
    prompt = ours.prompt_ids or network.config.prompt_ids
    train = base.train if config.check else replace(base.train, best="", evaluate_every=0)
    if part == "captioner":  # a teacher has nothing to say of LM
        train = replace(train, teacher=replace(train.teacher, decay=0.0))
    return replace(
        base,
        model=replace(network.config, heads=HEADS[part], prompt_ids=prompt, **trained),
        start=(str(start),),
        tokenizer="clip_bpe" if model.tokenizer.to_dict()["kind"] == "clip" else "wordpiece",
        data=config.human,
        validation=config.check,
        images=ImagesConfig(seen.mean, seen.std, seen.resize),
        train=train,
    )


def pretraining(config: CapfiltConfig, data: Path) -> RunConfig[BlipConfig]:
    """The run of the new model: the stage's own configuration and start, on what CapFilt wrote (§3.3)."""
    return replace(_base(config, config.training, config.pretrain), data=(str(data),))


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


def _base(config: CapfiltConfig, name: str, changes: Sequence[str]) -> RunConfig[BlipConfig]:
    found: RunConfig[BlipConfig] = load_config(
        run_kind("blip"), named_config("blip", name), [f"train.seed={config.seed}", *changes]
    )
    return found
