"""Settings of CapFilt: what its result depends on, and how it is computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from vlm.errors import ConfigError, check_least, nearest
from vlm.generate import GenerationConfig

ENGINES = ("local", "ray")


def _nucleus() -> GenerationConfig:
    return GenerationConfig("nucleus", top_p=0.9, max_new_tokens=20, min_new_tokens=5)


@dataclass(frozen=True)
class CapfiltConfig:
    """What the texts that are kept depend on."""

    web: tuple[str, ...]
    """Noisy sets, anything that `open_source` takes."""
    human: tuple[str, ...]
    """Sets whose texts are right: captioner and filter are fine-tuned on them, and all their pairs are kept."""
    model: str = ""
    """The pre-trained MED that both begin as; anything that `vlm.load` takes. Not needed where both are given."""
    captioner: str = ""
    """A captioner that is fine-tuned already; empty for one made here."""
    judge: str = ""
    """A filter that is fine-tuned already; empty for one made here."""
    judged: str = ""
    """Folder of an earlier CapFilt whose texts and scores are taken, so that neither model is needed: the sets, the
    models and all settings must be its own, but `synthetic`, `filtering` and `threshold`. Empty for new texts."""
    synthetic: bool = True
    """Whether the captioner writes texts; without it the web texts are filtered alone."""
    filtering: bool = True
    """Whether texts that don't match are dropped; without it the scores are only noted."""
    threshold: float = 0.5
    """A text is kept where its matched probability is above it."""
    generation: GenerationConfig = field(default_factory=_nucleus)
    """How the captioner writes; one text for each picture."""
    web_field: str = "web"
    """Field of a sample's JSON that holds the text as it was found; samples without it give their captions."""
    seed: int = 0
    """Of the draws, the exchanged texts and the page of pictures."""
    shard_samples: int = 1000
    """Pictures that are worked on, and written, as one."""
    check: tuple[str, ...] = ()
    """Sets that captioner and filter are measured on while they train, and whose texts are exchanged to measure the
    finished filter; empty for the human ones, at the end alone."""
    check_pictures: int = 1000
    """Pictures of these at most, half of which get another one's text."""
    captioner_training: str = "caption-tiny"
    """Configuration of the captioner's fine-tuning: one of the BLIP stage's, or a YAML file; the network's shape is
    the pre-trained one's."""
    judge_training: str = "filter-tiny"
    """Likewise of the filter's."""
    training: str = "tiny"
    """Configuration of the new model."""
    tune: tuple[str, ...] = ()
    """Changes, KEY=VALUE, to both fine-tunings."""
    pretrain: tuple[str, ...] = ()
    """Changes to the training of the new model."""

    def __post_init__(self) -> None:
        check_least(self, "capfilt", {"seed": 0, "shard_samples": 1, "check_pictures": 2})
        for name in ("web", "human"):
            if not getattr(self, name):
                raise ConfigError(f"capfilt.{name}: no set was named; give shards, a folder, a table or a name")
        if not 0 <= self.threshold < 1:
            raise ConfigError(f"capfilt.threshold is a probability, at least 0 and below 1, got {self.threshold!r}")
        if self.generation.sequences != 1:
            raise ConfigError(
                f"capfilt.generation.sequences must be 1, one text for each picture (§3.3), got "
                f"{self.generation.sequences}"
            )
        missing = [name for name in (["captioner"] if self.synthetic else []) + ["judge"] if not getattr(self, name)]
        if missing and not self.model and not self.judged:
            raise ConfigError(
                f"capfilt.model (--model): name the pre-trained MED that {' and '.join(missing)} are made of, or give "
                "them (--captioner, --filter)"
            )


@dataclass(frozen=True)
class Execution:
    """How it is computed. The texts that are kept don't depend on engine, actors or workers; another batch size or
    device rounds scores otherwise, and may turn one that lies on the threshold."""

    engine: Literal["local", "ray"] = "local"
    """This process, or actors of Ray Data."""
    address: str = ""
    """Of a Ray cluster; empty for one on this machine."""
    actors: int = 1
    """Ray actors, each with both models; all must see the sets and the folder under the same paths."""
    actor_gpus: float = 0.0
    """GPUs of each."""
    batch_size: int = 32
    """Pictures that run at once."""
    workers: int = 0
    """Processes that decode pictures; 0 decodes where the models run."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        check_least(self, "capfilt", {"actors": 1, "actor_gpus": 0, "batch_size": 1, "workers": 0})
        if self.engine not in ENGINES:
            hint = nearest(str(self.engine), ENGINES)
            raise ConfigError(f"unknown engine {self.engine!r}{hint}; choose from {', '.join(ENGINES)}")
        given: dict[str, Any] = {"address": self.address, "actor_gpus": self.actor_gpus}
        for name, value in given.items():
            if value and self.engine != "ray":
                raise ConfigError(f"capfilt.{name} is for engine ray, and the engine is {self.engine}")
