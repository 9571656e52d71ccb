"""What a folder's content depends on, noted in it once and compared ever after."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm.errors import ConfigError
from vlm.files import write_text

SHOWN = 80
"""Characters of a value in messages."""


def settle(path: Path, now: Mapping[str, Any], *, what: str) -> None:
    """Note `now` in the JSON file `path`; where it is noted already, compare.

    what: how messages call what depends on it. Raises ConfigError that names every value which has changed.
    """
    values = json.loads(json.dumps(_plain(now)))
    if not path.exists():
        write_text(path, json.dumps(values, indent=1) + "\n")
        return
    changed = differences(noted(path, advice="choose another folder"), values)
    if changed:
        raise ConfigError(
            f"{path.parent}: {what} began with other settings, data or weights; restore them, or choose another "
            "folder. Changed:\n" + "\n".join(changed)
        )


def noted(path: Path, *, advice: str) -> dict[str, Any]:
    """What `settle` noted in a file. Raises ConfigError, with `advice`, where that can't be read."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: can't be read ({error}); {advice}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected names with values, found {_short(found)}; {advice}")
    return found


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each value that has changed, with its name."""
    old, new = _flat(_plain(before)), _flat(json.loads(json.dumps(_plain(now))))
    changed = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    return [f"  {name}: {_short(old.get(name))} before, {_short(new.get(name))} now" for name in changed]


def weights_digest(network: nn.Module) -> str:
    """Hash of a network's configuration, and of the names, types, shapes and bytes of its tensors."""
    digest = hashlib.sha256(repr(getattr(network, "config", "")).encode())
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= _flat(value, f"{prefix}.{name}" if prefix else name)
    return out


def _short(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
