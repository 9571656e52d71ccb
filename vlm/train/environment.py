"""What a run needs to be repeated, written beside it: data, versions, machine, command."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from vlm.errors import TrainingError
from vlm.files import write_text

PACKAGES = ("vlm", "torch", "torchvision", "timm", "open_clip_torch", "transformers", "webdataset", "pillow")


def describe(fingerprint: str, samples: int) -> dict[str, Any]:
    """Data, package versions, machine and command of this run as JSON values."""
    return {"data": fingerprint, "samples": samples, **surroundings(), "command": ["vlm", *sys.argv[1:]]}


def surroundings() -> dict[str, Any]:
    """Package versions and machine as JSON values."""
    cuda = torch.cuda.is_available()
    return {
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if cuda else None,
            "ranks": int(os.environ.get("WORLD_SIZE", "1")),
        },
    }


def check_unused(run: Path) -> None:
    """Raises TrainingError when a folder already holds a run, or is none."""
    if run.exists() and not run.is_dir():
        raise TrainingError(f"{run}: is a file; --out is a folder, choose another")
    if (run / "config.yaml").exists():
        kind = "finished run" if (run / "model").is_dir() else "run"
        raise TrainingError(f"{run}: holds a {kind} already; go on with --resume, or choose another --out")


def start_run(run: Path, config_text: str, description: dict[str, Any]) -> None:
    """Make the run folder with ``config.yaml`` and ``manifest.json``.

    Raises TrainingError when the folder already holds a run, or can't be written.
    """
    check_unused(run)
    write_text(run / "manifest.json", json.dumps(description, indent=1), error=TrainingError)
    # The configuration comes last: its presence says that the folder is whole.
    write_text(run / "config.yaml", config_text, error=TrainingError)


def go_on(run: Path, config_text: str, *, finished: bool) -> None:
    """Record the configuration that a resumed run has from now on.

    Unless it was `finished`, its ``model`` goes, since it would be older than what comes now; the checkpoint
    that it was copied from stays. Raises TrainingError when the folder can't be written.
    """
    write_text(run / "config.yaml", config_text, error=TrainingError)
    if not finished:
        shutil.rmtree(run / "model", ignore_errors=True)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
