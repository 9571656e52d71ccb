"""Typed settings of a training run: the engine's own, and how YAML and command-line overrides become them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from vlm.errors import ConfigError, check_least, nearest

Config = TypeVar("Config")
EXPECTED = {
    "tuple_type": "expected a list, such as [a, b]",
    "dataclass_type": "expected a section with keys of its own",
}
"""What is said of a wrong value instead of pydantic's words, which speak of Python's types."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedule, and which parameters it moves; the defaults are CLIP's (2103.00020, table 19)."""

    lr: float = 5e-4
    """Highest learning rate."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decays of AdamW's means of the gradient and of its square."""
    eps: float = 1e-6
    """What AdamW adds to the root of the latter."""
    weight_decay: float = 0.2
    """Decay of matrices; gains, biases and the temperature never decay."""
    warmup: int = 500
    """Steps in which the learning rate grows linearly from 0."""
    final_lr: float = 0.0
    """Learning rate at the last step as a share of `lr`; a cosine leads there."""
    clip_norm: float = 1.0
    """Longest gradient; 0 never shortens it."""
    lr_scale: dict[str, float] = field(default_factory=dict)
    """Factor on the learning rate of parameters whose name starts so; the longest match counts."""
    freeze: tuple[str, ...] = ()
    """Parameters whose name starts so stay as they are: no gradient, no optimiser state."""

    def __post_init__(self) -> None:
        least = dict.fromkeys(("lr", "weight_decay", "warmup", "final_lr", "clip_norm", "eps"), 0)
        check_least(self, "train.optim", least)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"train.optim.betas must be at least 0 and below 1, got {self.betas!r}")


@dataclass(frozen=True)
class TeacherConfig:
    """Momentum distillation, for the stages that have it; the defaults are ALBEF's (2107.07651 §3.5)."""

    decay: float = 0.0
    """Of the teacher's weights, each optimiser step (ALBEF: 0.995); 0 for no teacher."""
    queue: int = 65536
    """Rows of features that the contrast compares with besides the batch."""
    alpha: float = 0.4
    """Share of the teacher's softmax in the targets."""
    ramp: float = 1.0
    """Epochs in which that share grows linearly from 0 (ALBEF: 1, BLIP: 2)."""

    def __post_init__(self) -> None:
        check_least(self, "train.teacher", dict.fromkeys(("decay", "queue", "alpha", "ramp"), 0))
        if self.decay >= 1:
            raise ConfigError(f"train.teacher.decay must be below 1, got {self.decay!r}")
        if self.alpha > 1:
            raise ConfigError(f"train.teacher.alpha is a share and must be at most 1, got {self.alpha!r}")


@dataclass(frozen=True)
class TrainConfig:
    """What the engine does, whatever it trains."""

    epochs: float = 10.0
    """Passes over the data."""
    steps: int = 0
    """Optimiser steps; 0 for what `epochs` gives."""
    seed: int = 0
    """Fixes data order, augmentation, captions and every draw inside the network."""
    accumulate: int = 1
    """Micro-batches that each rank's part of a batch is cut into; the gradient stays the whole batch's."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 on GPUs that have it, fp16 with loss scaling on others, fp32 on CPUs."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several ranks: copies of the network (DDP), or parameters and optimiser sharded (FSDP2)."""
    compile: bool = False
    """Compile the network's parts with torch.compile."""
    ema: float = 0.0
    """Decay per step of an average of the weights, which is then evaluated and exported; 0 for none."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    log_every: int = 20
    """Steps between lines of metrics."""
    evaluate_every: int = 0
    """Steps between evaluations, besides the one at the end, which always takes place; 0 for that one alone. An empty
    `validation` has none at all."""
    save_every: int = 500
    """Steps between checkpoints; one is always written at the end."""
    keep: int = 2
    """Checkpoints kept, the newest; the best one stays besides."""
    best: str = ""
    """Evaluation metric whose highest value marks the best checkpoint; empty keeps only the newest."""
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        least = dict.fromkeys(("steps", "seed", "evaluate_every", "save_every", "ema"), 0)
        check_least(self, "train", least | dict.fromkeys(("accumulate", "log_every", "keep"), 1))
        if not self.steps and not self.epochs > 0:
            raise ConfigError(f"train.epochs must be above 0, got {self.epochs!r}, unless train.steps is given")
        if self.ema >= 1:
            raise ConfigError(f"train.ema is a decay per step and must be below 1, got {self.ema!r}")


def load_config(kind: type[Config], source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Read a dataclass `kind` from YAML, refusing unknown keys with the nearest name.

    source: a YAML file, or an already parsed mapping. overrides: ``section.key=value``, values as in YAML.
    Raises ConfigError that names the key, what was expected and where it stood.
    """
    if isinstance(source, Mapping):
        where, values = "the configuration", dict(source)
    else:
        where, values = str(source), read_yaml(Path(source))
    values = _copied(values)
    for override in overrides:
        _override(kind, values, override)
    _refuse_unknown(kind, values, where, "")
    changed = f" with {', '.join(overrides)}" if overrides else ""
    return build(kind, values, where + changed)


def fields_of(kind: Any) -> dict[str, Any]:
    """Names and types of a dataclass' fields; of a generic one such as ``Run[Model]``, with its arguments."""
    plain = get_origin(kind) or kind
    given = dict(zip(getattr(plain, "__parameters__", ()), get_args(kind), strict=False))
    return {name: given.get(hint, hint) for name, hint in get_type_hints(plain).items()}


def is_section(kind: Any) -> bool:
    """Whether a type is a dataclass, or a generic one with its arguments."""
    return dataclasses.is_dataclass(get_origin(kind) or kind)


def build(kind: type[Config], values: Mapping[str, Any], where: str) -> Config:
    """Check types and build the dataclass; raises ConfigError with every wrong value."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            reason = EXPECTED.get(item["type"], item["msg"].lower())
            lines.append(f"  {'.'.join(map(str, item['loc']))} = {item['input']!r}: {reason}")
        raise ConfigError(f"{where}: wrong value\n" + "\n".join(lines)) from error


def named_config(stage: str, name: str) -> Path:
    """The packaged YAML of a stage and size (``clip``, ``tiny``), or `name` itself when it is a YAML file.

    Raises ConfigError listing the sizes there are.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"{name}: no such configuration file")
        return path
    folder = Path(str(resources.files("vlm").joinpath("configs")))
    path = folder / f"{stage}-{name}.yaml"
    if not path.is_file():
        sizes = sorted(found.stem.removeprefix(f"{stage}-") for found in folder.glob(f"{stage}-*.yaml"))
        raise ConfigError(
            f"no {stage} configuration named {name!r}{nearest(name, sizes)}: "
            f"expected one of {', '.join(sizes)}, or a .yaml file"
        )
    return path


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping. Raises ConfigError when it can't be read or isn't a mapping."""
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections with keys, got {type(values).__name__}")
    return values


def to_yaml(config: Any) -> str:
    """A configuration as YAML that `load_config` reads back."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)


def _override(kind: type, values: dict[str, Any], override: str) -> None:
    path, sign, text = override.partition("=")
    if not sign:
        raise ConfigError(f"override {override!r}: expected section.key=value, for instance train.seed=1")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML ({error})") from error
    node, names, here = values, path.split("."), kind
    for depth, name in enumerate(names[:-1]):
        hints = fields_of(here)
        if name not in hints:
            raise _unknown(here, name, f"override {override!r}")
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {name} is a value here, not a section")
        node, here = child, hints[name]
        if not is_section(here):
            # A mapping's keys, such as parameter names, may hold dots themselves.
            node[".".join(names[depth + 1 :])] = value
            return
    if names[-1] not in fields_of(here):
        raise _unknown(here, names[-1], f"override {override!r}")
    node[names[-1]] = value


def _refuse_unknown(kind: Any, values: Any, where: str, prefix: str) -> None:
    if not is_section(kind) or not isinstance(values, Mapping):
        return
    hints = fields_of(kind)
    for name, value in values.items():
        if name not in hints:
            raise _unknown(kind, str(name), where, prefix)
        _refuse_unknown(hints[name], value, where, f"{prefix}{name}.")


def _unknown(kind: Any, name: str, where: str, prefix: str = "") -> ConfigError:
    options = list(fields_of(kind))
    return ConfigError(f"{where}: unknown key {prefix}{name}{nearest(name, options)}; known here: {', '.join(options)}")


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
