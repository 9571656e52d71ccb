"""The CLIP stage as a job for the engine: its configuration, data, starting weights and export."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vlm.data.batch import Batch
from vlm.data.loader import LoaderConfig, make_loader, steps_per_epoch
from vlm.data.sources import open_source
from vlm.data.tokenizers import Tokenizer, clip_bpe, wordpiece
from vlm.data.transforms import CLIP_MEAN, CLIP_STD, ImageTransform, Resize
from vlm.errors import ConfigError
from vlm.models.clip import Clip, ClipConfig
from vlm.train.checkpoint import Position, last_step
from vlm.train.config import TrainConfig, load_config, to_yaml
from vlm.train.distributed import Ranks, wait
from vlm.train.engine import Evaluate, Job, Trainer
from vlm.train.environment import describe, go_on, start_run
from vlm.weights.files import save_model
from vlm.weights.start import start_from

logger = logging.getLogger("vlm.train")


@dataclass(frozen=True)
class ImagesConfig:
    """How pictures become pixels; the side is the model's."""

    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    resize: Resize = "squash"
    """`squash` both sides, `crop` the centre, or `pad` with white."""


@dataclass(frozen=True)
class ClipRun:
    """Everything that a CLIP run depends on."""

    name: str = "clip"
    """What the model folder calls itself."""
    model: ClipConfig = field(default_factory=ClipConfig)
    start: tuple[str, ...] = ()
    """Weights to begin with, later ones over earlier: ``minilm``, a BERT folder, a model or run folder."""
    tokenizer: Literal["wordpiece", "clip_bpe"] = "wordpiece"
    data: tuple[str, ...] = ("human-train", "web-train")
    """Training sets, joined; anything that `open_source` takes."""
    validation: tuple[str, ...] = ("web-val",)
    """Sets that figures are taken on while training; empty for none."""
    images: ImagesConfig = field(default_factory=ImagesConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more time."""
    train: TrainConfig = field(default_factory=TrainConfig)


def make_tokenizer(config: ClipRun) -> Tokenizer:
    """The run's tokenizer, checked against the text tower's vocabulary and length.

    Raises ConfigError when they don't fit.
    """
    context = config.model.text.context_length
    make = {"wordpiece": wordpiece, "clip_bpe": clip_bpe}[config.tokenizer]
    tokenizer = make(max_length=min(context, config.loader.max_length or context))
    if tokenizer.vocab_size > config.model.text.vocab_size:
        raise ConfigError(
            f"model.text.vocab_size is {config.model.text.vocab_size}, "
            f"but {config.tokenizer} has {tokenizer.vocab_size} tokens"
        )
    return tokenizer


def make_transform(config: ClipRun) -> ImageTransform:
    """The run's picture preprocessing."""
    images = config.images
    return ImageTransform(config.model.image.image_size, images.mean, images.std, images.resize)


def train_clip(
    config: ClipRun,
    run: Path,
    here: Ranks,
    *,
    resume: bool = False,
    evaluate: Evaluate | None = None,
    progress: bool = True,
) -> Position:
    """Train CLIP into the folder `run`; ``run/model`` is what `vlm.load` reads at the end.

    evaluate: figures of the network while training (every rank calls it). Raises ConfigError, DataError,
    WeightsError or TrainingError with what to do.
    """
    tokenizer, transform = make_tokenizer(config), make_transform(config)
    source = open_source(config.data)
    fingerprint = source.fingerprint()
    before = last_step(run) if resume else None
    torch.manual_seed(config.train.seed)
    network = Clip(config.model)
    for start in config.start if before is None else ():
        start_from(network, start)
    network.image.checkpointing = network.text.checkpointing = config.checkpointing
    loader = dataclasses.replace(config.loader, seed=config.train.seed)

    def batches(epoch: int, skip: int) -> Iterable[Batch]:
        return make_loader(
            source,
            loader,
            tokenizer=tokenizer,
            transform=transform,
            epoch=epoch,
            skip_samples=skip,
            rank=here.rank,
            ranks=here.count,
        )

    def export(state: dict[str, Tensor], folder: Path) -> None:
        with torch.device("meta"):
            copy = Clip(config.model)
        copy.load_state_dict(state, assign=True)
        save_model(copy, tokenizer, transform, folder, name=config.name)

    steps = steps_per_epoch(len(source), loader)
    job = Job(network, batches, steps, export, evaluate, fingerprint)
    trainer = Trainer(job, config.train, run, here, progress=progress)
    if resume:  # before anything of the run is changed: other data or another network is refused here
        trainer.resume()
    if here.first and resume:
        go_on(run, to_yaml(config), finished=before == trainer.steps)
    elif here.first:
        start_run(run, to_yaml(config), describe(fingerprint, len(source)))
    wait(here)
    _log_sizes(network, trainer, len(source))
    position = trainer.fit()
    trainer.checkpoints.publish(run / "model")
    return position


def read_run_config(run: Path, overrides: Iterable[str] = ()) -> ClipRun:
    """The configuration that a run folder was started with. Raises ConfigError when it holds none."""
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run}: no run to resume there (config.yaml is missing); start it without --resume")
    return load_config(ClipRun, path, list(overrides))


def _log_sizes(network: Clip, trainer: Trainer, samples: int) -> None:
    if trainer.here.first:
        sizes: dict[str, Any] = {"image": network.image, "text": network.text}
        counts = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in sizes.items()}
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad) / 1e6
        logger.info(
            "%d samples, %d steps; parameters: image %.1f M, text %.1f M, trained %.1f M; %s on %d x %s",
            samples, trainer.steps, counts["image"], counts["text"], trained,
            str(trainer.precision).removeprefix("torch."), trainer.here.count, trainer.here.device,
        )  # fmt: skip
