"""The errors that a user can cause, each with a message that says what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class VlmError(Exception):
    """Base of all errors meant for the user: the command line prints the message alone and exits with 2."""


class MissingVerbError(VlmError, AttributeError):
    """A model of this family can't do what was asked of it; another stage's can."""


class DataError(VlmError):
    """A picture, caption, shard or data source can't be used."""

    def __init__(self, message: str, *, reason: str = "") -> None:
        """reason: why a picture was refused, for programs: ``bytes``, ``pixels``, ``format`` or ``damaged``; or a set
        of shards: `vlm.data.samples.EMPTY`.
        """
        super().__init__(message)
        self.reason = reason


class WeightsError(VlmError):
    """A checkpoint can't be found, read or matched with a network."""


class ConfigError(VlmError):
    """An option or a configuration value is unknown or out of range."""


class TrainingError(VlmError):
    """Training can't go on; what was written before is intact."""


def check_least(config: Any, section: str, least: Mapping[str, float]) -> None:
    """Raises ConfigError where a field of `config` is below its least value; `section` is how messages name it."""
    for name, bound in least.items():
        value = getattr(config, name)
        if not value >= bound:  # also refuses NaN
            raise ConfigError(f"{section}.{name} must be at least {bound}, got {value!r}")


def nearest(name: str, options: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest of `options`, or an empty string when none is close."""
    close = difflib.get_close_matches(name, list(options), n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""


def reason(error: BaseException) -> str:
    """Return what an exception says, on one line and in words: a bare KeyError only holds a name."""
    if isinstance(error, KeyError) and error.args:
        return f"{error.args[0]!r} is missing"
    return " ".join(str(getattr(error, "strerror", "") or error).split())[:300] or type(error).__name__


def counted(number: int, thing: str, plural: str = "") -> str:
    """Return a number with what it counts: ``1 picture``, ``1,944 pictures``; plural: where an s won't do."""
    return f"{number:,} {thing if number == 1 else plural or thing + 's'}"


def with_article(word: str) -> str:
    """Return a word behind ``a``, or ``an`` before a vowel."""
    return f"{'an' if word[:1].lower() in set('aeiou') else 'a'} {word}"
