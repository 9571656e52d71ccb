"""Settings of the service; each is an option of ``vlm serve`` and an environment variable ``VLM_NAME``."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any

import typer

from vlm.apps import common
from vlm.apps.common import DEFAULT_MODEL
from vlm.errors import ConfigError, check_least

MIB = 2**20


def _option(text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, **more)


@dataclass(frozen=True)
class ServeConfig:
    """What is served, where, and what a request may ask for."""

    model: Annotated[str, _option("Shipped name, folder, repo id, open_clip:ARCH/TAG or file.", "--model", "-m")] = (
        DEFAULT_MODEL
    )
    host: Annotated[str, _option("Address to listen on; 0.0.0.0 for every interface.")] = "127.0.0.1"
    port: Annotated[int, _option("Port to listen on; 0 for any free one.")] = 8000
    device: Annotated[str, _option("auto, cpu, cuda or cuda:N.")] = "auto"
    templates: Annotated[str, _option("Templates of requests that name none; auto: open_clip's 7 for CLIP.")] = "auto"
    api_key: Annotated[str, _option("Key that requests must bring as 'Authorization: Bearer KEY'; empty for none.")] = (
        ""
    )
    max_bytes: Annotated[int, _option("Longest body of a request, in bytes.")] = 20 * MIB
    max_pixels: Annotated[int, _option("Largest picture, width times height.")] = 50_000_000
    max_images: Annotated[int, _option("Most pictures of a request.")] = 16
    max_labels: Annotated[int, _option("Most labels of a request (or texts to embed).")] = 1000
    max_label_length: Annotated[int, _option("Longest label, text or template, in characters.")] = 300
    max_sentences: Annotated[int, _option("Most labels times templates of a request.")] = 20_000
    queue: Annotated[int, _option("Requests accepted and not yet answered; more are told to come back (429).")] = 512
    batch_size: Annotated[int, _option("Most pictures (and texts) that run at once.")] = 32
    cached_labels: Annotated[int, _option("Labels whose features are kept, least recently used go first.")] = 50_000
    head_timeout: Annotated[float, _option("Seconds in which a request's head must have arrived.")] = 15.0
    body_timeout: Annotated[float, _option("Seconds in which a request's body must have arrived.")] = 30.0
    shutdown_timeout: Annotated[int, _option("Seconds in which accepted requests are answered at the end.")] = 30

    def __post_init__(self) -> None:
        positive = (
            *("max_bytes", "max_pixels", "max_images", "max_labels", "max_label_length", "max_sentences"),
            *("queue", "batch_size", "shutdown_timeout"),
        )
        check_least(self, "serve", dict.fromkeys(positive, 1) | {"port": 0, "cached_labels": 0})
        check_least(self, "serve", {"head_timeout": 0.1, "body_timeout": 0.1})
        if self.port > 65535:
            raise ConfigError(f"serve.port must be at most 65535, got {self.port}")
        if any(ord(letter) < 33 or ord(letter) > 126 for letter in self.api_key):
            raise ConfigError("serve.api_key: expected visible ASCII characters without spaces, as HTTP headers allow")


def check_names(environment: Iterable[str]) -> None:
    """Raises ConfigError where a variable looks like an option's misspelled: a key must not be missing unnoticed."""
    known = [f"VLM_{field.name.upper()}" for field in dataclasses.fields(ServeConfig)]
    for name in sorted(environment):
        if name.startswith("VLM_") and name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
            if close:
                raise ConfigError(f"environment variable {name}: no option has this name; did you mean {close[0]}?")


def with_options(command: Callable[[ServeConfig], None]) -> Callable[..., None]:
    """A command for typer whose options are the fields of `ServeConfig`, which environment variables set too."""

    @wraps(command)
    def checked(config: ServeConfig) -> None:
        check_names(os.environ)
        command(config)

    return common.with_options(ServeConfig, environment="VLM_")(checked)
