"""A stage as a job for the engine: its configuration, data, starting weights and export."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from vlm.data.batch import KINDS, Batch
from vlm.data.features import FeatureStore
from vlm.data.loader import LoaderConfig, make_loader, steps_per_epoch
from vlm.data.prompts import Prompts
from vlm.data.sources import open_source
from vlm.data.tokenizers import Tokenizer, clip_bpe, wordpiece
from vlm.data.transforms import CLIP_MEAN, CLIP_STD, ImageTransform, Resize
from vlm.errors import ConfigError, WeightsError, counted
from vlm.models.blip2_llm import Blip2LlmConfig
from vlm.train.checkpoint import Position, last_step
from vlm.train.config import TrainConfig, load_config, to_yaml
from vlm.train.distributed import Ranks, wait
from vlm.train.draws import check_maskable, masked
from vlm.train.engine import Evaluate, Job, Trainer
from vlm.train.environment import check_unused, describe, go_on, start_run
from vlm.train.features import features_of_run
from vlm.weights.families import FAMILIES, family, family_name
from vlm.weights.files import save_model
from vlm.weights.llm import load_llm_tokenizer
from vlm.weights.official import Training
from vlm.weights.start import start_from

logger = logging.getLogger("vlm.train")

M = TypeVar("M")


@dataclass
class _Stored:
    """What a model folder is written from."""

    config: Any
    tensors: dict[str, Tensor]

    def state_dict(self) -> dict[str, Tensor]:
        return self.tensors


@dataclass(frozen=True)
class ImagesConfig:
    """How pictures become pixels; the side is the model's."""

    mean: tuple[float, float, float] = CLIP_MEAN
    """What is subtracted from red, green and blue, each from 0 to 1."""
    std: tuple[float, float, float] = CLIP_STD
    """What they are then divided by."""
    resize: Resize = "squash"
    """`squash` both sides, `crop` the centre, `pad` with white, or `fit`: keep the shape, for ViLT alone."""


@dataclass(frozen=True)
class MaskingConfig:
    """Which tokens are hidden for MLM; stages without it ignore this."""

    share: float = 0.15
    """Chance of a token to be guessed (BERT §3.1)."""
    whole_words: bool = False
    """Choose words whole, not tokens (ViLT §3.2.1)."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(f"masking.share is a chance and must lie between 0 and 1, got {self.share!r}")


@dataclass(frozen=True)
class RunConfig(Generic[M]):
    """Everything that a run depends on, whatever the stage: `M` is the stage's own configuration."""

    model: M
    name: str = "model"
    """What the model folder calls itself."""
    start: tuple[str, ...] = ()
    """Weights to begin with, later ones over earlier: ``minilm``, a shipped name, a model or run folder, a folder or
    Hub repo id of a BERT or BLIP-2 of transformers, an official ALBEF, BLIP or BLIP-2 checkpoint."""
    tokenizer: Literal["wordpiece", "clip_bpe"] = "wordpiece"
    """How texts become ids: BERT's pieces, or CLIP's byte pairs."""
    data: tuple[str, ...] = ("human-train", "web-train")
    """Training sets, joined; anything that `open_source` takes."""
    validation: tuple[str, ...] = ("web-val",)
    """Sets that figures are taken on while training; empty for none."""
    images: ImagesConfig = field(default_factory=ImagesConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    features: str = ""
    """Folder of `vlm data features`: what the frozen image encoder made of `data`, trained on instead of pictures."""
    checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more time."""
    train: TrainConfig = field(default_factory=TrainConfig)


def run_kind(stage: str) -> Any:
    """The type of a stage's runs, for `load_config`. Raises WeightsError for an unknown stage."""
    return RunConfig[family(stage).config]  # type: ignore[misc]


def make_tokenizer(config: RunConfig[Any]) -> Tokenizer:
    """The run's tokenizer, checked against the text tower's vocabulary and length.

    Raises ConfigError when they don't fit.
    """
    if isinstance(config.model, Blip2LlmConfig):
        return load_llm_tokenizer(config.model.llm.name)
    text = getattr(config.model, "text", config.model)
    room = text.context_length - len(getattr(config.model, "prompt_ids", ()))  # a prompt comes before each text
    make = {"wordpiece": wordpiece, "clip_bpe": clip_bpe}[config.tokenizer]
    longest = min(room, config.loader.max_length or room)
    if longest < 2:
        raise ConfigError(f"context_length {longest}: a text has at least 2 tokens, its start and its end")
    tokenizer = make(max_length=longest)
    if tokenizer.vocab_size > text.vocab_size:
        raise ConfigError(
            f"model.text.vocab_size is {text.vocab_size}, but {config.tokenizer} has {tokenizer.vocab_size} tokens"
        )
    taken = [
        name for name in ("enc_id", "dec_id") if getattr(config.model, name, text.vocab_size) < tokenizer.vocab_size
    ]
    if taken:
        raise ConfigError(
            f"model.{taken[0]} {getattr(config.model, taken[0])} is a word of {config.tokenizer}; choose ids from "
            f"{tokenizer.vocab_size} on, and model.text.vocab_size to hold them"
        )
    return tokenizer


def make_prompts(model: Any) -> Prompts | None:
    """What texts begin with, for a stage whose configuration says so."""
    if not isinstance(model, Blip2LlmConfig):
        return None
    return Prompts(model.prompt, model.question, model.split)


def make_transform(config: RunConfig[Any]) -> ImageTransform:
    """The run's picture preprocessing. Raises ConfigError for `fit` where the stage can't mask padding."""
    images, image = config.images, config.model.image
    if images.resize == "fit" and family_name(config.model) != "vilt":
        raise ConfigError("images.resize=fit pads pictures to one size, which only ViLT masks; use pad, crop or squash")
    return ImageTransform(image.image_size, images.mean, images.std, images.resize, multiple=image.patch_size)


def train_stage(
    config: RunConfig[Any],
    run: Path,
    here: Ranks,
    *,
    resume: bool = False,
    evaluate: Evaluate | None = None,
    progress: bool = True,
) -> Position:
    """Train a stage into the folder `run`; ``run/model`` is what `vlm.load` reads at the end.

    evaluate: figures of the network while training (every rank calls it). Raises ConfigError, DataError,
    WeightsError or TrainingError with what to do.
    """
    if here.first and not resume:
        check_unused(run)  # before anything is read for it
    stage = family_name(config.model)
    tokenizer, transform = make_tokenizer(config), make_transform(config)
    source = open_source(config.data)
    fingerprint = source.fingerprint()
    before = last_step(run) if resume else None
    torch.manual_seed(config.train.seed)
    network = _untrained(config, stage)
    config = dataclasses.replace(config, model=network.config)
    taught = _begin(network, config) if before is None else None
    _settle(network, config)
    loader = dataclasses.replace(config.loader, seed=config.train.seed)
    hides, prompts = _hides(network, tokenizer, config), make_prompts(config.model)
    features: FeatureStore | None = None

    def batches(epoch: int, skip: int) -> Iterable[Batch]:
        made = make_loader(
            source, loader, tokenizer=tokenizer, transform=transform, epoch=epoch, skip_samples=skip,
            rank=here.rank, ranks=here.count, prompts=prompts, features=features,
        )  # fmt: skip
        hide = dataclasses.asdict(config.masking)
        return masked(made, tokenizer, **hide, seed=config.train.seed, epoch=epoch) if hides else made

    def export(state: dict[str, Tensor], folder: Path) -> None:
        save_model(_Stored(config.model, state), tokenizer, transform, folder, name=config.name, family=stage)

    steps = steps_per_epoch(len(source), loader)
    width = getattr(config.model, "embed_dim", 0)
    job = Job(network, batches, steps, export, evaluate, fingerprint, width, len(KINDS))
    trainer = Trainer(job, config.train, run, here, progress=progress)
    if taught is not None and trainer.teaching is not None:
        trainer.teaching.start_from(taught.teacher, taught.image_queue, taught.text_queue, taught.pointer)
    del taught  # a second copy of the network
    if resume:  # before anything of the run is changed: other data or another network is refused here
        trainer.resume()
    features = features_of_run(config.features, network, transform, source, loader.augment)
    if here.first and resume:
        go_on(run, to_yaml(config), finished=before == trainer.steps)
    elif here.first:
        start_run(run, to_yaml(config), describe(fingerprint, len(source)))
    wait(here)
    _log_sizes(network, trainer, len(source))
    position = trainer.fit()
    trainer.checkpoints.publish(run / "model")
    return position


def begun_network(config: RunConfig[Any]) -> nn.Module:
    """The stage's network with the weights that a run begins with. Raises as `train_stage`."""
    torch.manual_seed(config.train.seed)
    network = _untrained(config, family_name(config.model))
    _begin(network, config)
    return network


def _untrained(config: RunConfig[Any], stage: str) -> nn.Module:
    """The stage's network. Raises ConfigError when it would learn nothing, or have a teacher for nothing."""
    network = FAMILIES[stage].network(config.model)
    complete = FAMILIES[stage].complete
    if complete is not None:
        complete(network)
    weights: dict[str, float] = network.loss_weights  # type: ignore[assignment]
    if not any(weights.values()):
        found = ", ".join(f"{name} {weight:g}" for name, weight in weights.items()) or "none"
        raise ConfigError(f"nothing to learn: the losses and their weights are {found}; set one above 0 in model")
    if config.train.teacher.decay and not getattr(network, "teachable", False):
        raise ConfigError(
            f"train.teacher.decay={config.train.teacher.decay:g}: {stage} has no loss with a teacher; set it to 0"
        )
    return network


def _settle(network: Any, config: RunConfig[Any]) -> None:
    """What a network gets once it has its starting weights: LoRA beside them, and layers that are recomputed."""
    if hasattr(network, "adapt"):
        network.adapt()
    for part in network.children():
        if hasattr(part, "checkpointing"):
            part.checkpointing = config.checkpointing


def _hides(network: nn.Module, tokenizer: Tokenizer, config: RunConfig[Any]) -> bool:
    """Whether tokens are hidden for MLM. Raises ConfigError when the tokenizer has nothing to hide them by."""
    hides = bool(network.loss_weights.get("mlm"))  # type: ignore[operator, union-attr]
    if hides:
        check_maskable(tokenizer, whole_words=config.masking.whole_words)
    return hides


def _begin(network: nn.Module, config: RunConfig[Any]) -> Training | None:
    """Give the network its starting weights. Raises WeightsError where matrices would stay frozen at random numbers.

    Returns teacher and queue of the last official checkpoint among the starts; without one the teacher is the
    student's copy.
    """
    frozen = tuple(config.train.optim.freeze)
    named = ((n, p) for n, p in network.named_parameters() if p.dim() > 1 and not n.startswith("llm."))
    chosen = {n: p for n, p in named if not p.requires_grad or n.startswith(frozen)}
    random = {name: parameter.detach().clone() for name, parameter in chosen.items()}
    taught: Training | None = None
    for start in config.start:
        taught = start_from(network, start, training=bool(config.train.teacher.decay)) or taught
    _check_frozen([name for name, parameter in chosen.items() if torch.equal(parameter, random[name])], config)
    return taught


def _check_frozen(left: list[str], config: RunConfig[Any]) -> None:
    """Refuse a run in which matrices without weights are frozen; one that starts from nothing at all, and freezes no
    more than its stage does, is let through with a warning: it may be there for its speed."""
    if not left:
        return
    thawed = [name for name in left if name.startswith(tuple(config.train.optim.freeze))]
    told = f"{counted(len(left), 'matrix', 'matrices')} {'is' if len(left) == 1 else 'are'} frozen that no start gave "
    told += f"weights, {', '.join(left[:3])} first, and would stay random"
    if not config.start and not thawed:
        logger.warning("%s", told)
        return
    given = f"start {', '.join(config.start) or '(none)'}"
    advice = ", or let them learn (train.optim.freeze=[])" if thawed else ""
    raise WeightsError(
        f"{given}: {told}. Start also from a model that has them (--start may be given again, later ones over earlier)"
        f"{advice}"
    )


def read_run_config(stage: str, run: Path, overrides: Iterable[str] = ()) -> RunConfig[Any]:
    """The configuration that a stage's run folder was started with.

    Raises ConfigError when it holds none, or that of another stage.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run}: no run to resume there (config.yaml is missing); start it without --resume")
    try:
        found: RunConfig[Any] = load_config(run_kind(stage), path, list(overrides))
    except ConfigError as error:
        other = next((name for name in FAMILIES if name != stage and _reads(name, path)), None)
        if other is None:
            raise
        raise ConfigError(f"{run}: a run of {other}, not of {stage}; choose another --out") from error
    return found


def _reads(stage: str, path: Path) -> bool:
    """Whether a file is the configuration of a stage's run."""
    try:
        load_config(run_kind(stage), path)
    except ConfigError:
        return False
    return True


def _log_sizes(network: nn.Module, trainer: Trainer, samples: int) -> None:
    if trainer.here.first:
        counts = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in network.named_children()}
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad) / 1e6
        logger.info(
            "%d samples, %d steps; parameters: %s, trained %.1f M; %s on %d x %s",
            samples, trainer.steps, ", ".join(f"{name} {count:.1f} M" for name, count in counts.items()), trained,
            str(trainer.precision).removeprefix("torch."), trainer.here.count, trainer.here.device,
        )  # fmt: skip
