"""The public packages that the set is made from, fetched by name with the ordinary clients."""

from __future__ import annotations

import logging
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlm.errors import DataError

logger = logging.getLogger("vlm.data")


@dataclass(frozen=True)
class Package:
    """A package at the version that the committed set was made from."""

    name: str
    version: str
    client: Literal["npm", "apt"]
    licence: str
    """SPDX identifier of the pictures (of the texts for emojibase), as the package's own files say."""
    attribution: str
    licence_file: str
    """Where the package says so, inside it."""

    @property
    def label(self) -> str:
        """Name and version."""
        return f"{self.name}@{self.version}"

    @property
    def folder(self) -> str:
        """Folder that it is unpacked to."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}"


NOTO = Package("emoji-datasource-google", "16.0.0", "npm", "Apache-2.0", "Noto Emoji, Google", "package/README.md")
TWEMOJI = Package(
    "emoji-datasource-twitter",
    "16.0.0",
    "npm",
    "CC-BY-4.0",
    "Twemoji, Twitter and contributors",
    "package/README.md",
)
FLUENT_3D = Package(
    "@lobehub/fluent-emoji-3d", "1.1.0", "npm", "MIT", "Fluent Emoji, Microsoft", "package/package.json"
)
FLUENT = Package("fluentui-emoji", "1.3.0", "npm", "MIT", "Fluent Emoji, Microsoft", "package/LICENSE")
OPENMOJI = Package(
    "openmoji",
    "17.0.0",
    "npm",
    "CC-BY-SA-4.0",
    "OpenMoji, HfG Schwaebisch Gmuend and contributors",
    "package/LICENSE.txt",
)
EMOJIBASE = Package("emojibase-data", "17.0.0", "npm", "MIT", "Emojibase, Miles Johnson", "package/LICENSE")
CLIPART = Package(
    "openclipart-svg", "0.18+dfsg", "apt", "LicenseRef-Public-Domain", "Open Clip Art Library",
    "usr/share/doc/openclipart-svg/copyright",
)  # fmt: skip
PACKAGES = (NOTO, TWEMOJI, FLUENT_3D, FLUENT, OPENMOJI, EMOJIBASE, CLIPART)


def fetch(package: Package, work: Path) -> Path:
    """The unpacked package under `work`, downloaded when it isn't there yet.

    Raises DataError when the client is missing or fails, saying what to install or to run.
    """
    work = work.absolute()  # the clients run inside it
    unpacked = work / package.folder
    if unpacked.is_dir():
        return unpacked
    work.mkdir(parents=True, exist_ok=True)
    archive = _npm(package, work) if package.client == "npm" else _apt(package, work)
    temporary = work / f".tmp-{package.folder}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    if package.client == "npm":
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(temporary, filter="data")
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise DataError(f"{archive}: damaged or cut ({error}); delete it, and it is fetched again") from error
    else:
        _run(["dpkg-deb", "-x", str(archive), str(temporary)], work)
    temporary.rename(unpacked)
    return unpacked


def _npm(package: Package, work: Path) -> Path:
    archive = work / f"{package.folder}.tgz"
    if not archive.is_file():
        logger.info("fetching %s with npm", package.label)
        _run(["npm", "pack", "--silent", package.label], work)
    return archive


def _apt(package: Package, work: Path) -> Path:
    found = sorted(work.glob(f"{package.name}_*.deb"))
    if not found:
        logger.info("fetching %s with apt", package.label)
        _run(["apt-get", "download", package.name], work)
        found = sorted(work.glob(f"{package.name}_*.deb"))
    if not found:
        raise DataError(f"{package.label}: apt-get gave no file; run apt-get update, then try again")
    if package.version not in found[-1].name:
        logger.warning("%s: expected version %s", found[-1].name, package.version)
    return found[-1]


def _run(command: Sequence[str], folder: Path) -> None:
    client = command[0]
    if shutil.which(client) is None:
        package = {"npm": "npm", "apt-get": "apt", "dpkg-deb": "dpkg"}[client]
        raise DataError(f"`{client}` isn't installed; install {package}, or use the shards that are in data/")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DataError(f"`{' '.join(command)}` failed: {done.stderr.strip()[-500:] or done.stdout[-500:]}")
