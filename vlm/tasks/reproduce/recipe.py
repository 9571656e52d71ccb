"""What a run was made with, value by value: results of another recipe are told apart, and the reason is named."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from itertools import zip_longest
from typing import Any

from vlm.tasks.reproduce.short import tiny_config
from vlm.train.run import RunConfig


def recipe_values(stage: str, settings: Sequence[str], prepared: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of a stage's `tiny` recipe by its name (``train.optim.lr``), and under ``prepared.`` what its start
    and its data were made with; values as JSON gives them back. What a recipe calls its model is no setting."""
    found = settings_of(_nameless(tiny_config(stage, settings)))
    for name, value in prepared.items():
        found |= settings_of(_nameless(value), f"prepared.{name}")
    return found


def _nameless(value: Any) -> Any:
    """A recipe without what it calls its model; any other value as it is."""
    return replace(value, name="") if isinstance(value, RunConfig) else value


def settings_of(value: Any, name: str = "") -> dict[str, Any]:
    """A configuration's settings by name, those of its sections too; another value is the one setting `name`."""
    if not is_dataclass(value):
        return {name: json.loads(json.dumps(value))}
    found: dict[str, Any] = {}
    for one in fields(value):
        found |= settings_of(getattr(value, one.name), f"{name}.{one.name}" if name else one.name)
    return found


def recipe_difference(made: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first setting that both have with two values, in words; empty when there is none.

    A setting that only one of the two has doesn't count: it has come, or gone, with a version of vlm, whose defaults
    keep what was before.
    """
    for name in made:
        if name in now and made[name] != now[name]:
            return f"{name} was {made[name]!r} and is {now[name]!r}"
    return ""


def override_difference(made: Sequence[str], now: Sequence[str]) -> str:
    """The first of two lists of ``KEY=VALUE`` that differs, in words; empty when none does."""
    for one, other in zip_longest(made, now, fillvalue="not given"):
        if one != other:
            return f"{one} there, {other} here"
    return ""
