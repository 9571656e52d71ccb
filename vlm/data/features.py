"""What a frozen image encoder made of a source's pictures, kept on disk: computed once, read at random places.

A folder holds ``features.json`` (what was encoded, by what, after which preprocessing) and three arrays over the
source's samples: ``states.bin`` (n, N, D), ``pictures.bin`` (n,) the pictures' hashes, ``done.bin`` (n,). Rows are
marked as done after they are written, so that an interrupted computation goes on where it stood.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlm.data.images import decode_image
from vlm.data.samples import stable_id
from vlm.data.sources import Source
from vlm.data.transforms import ImageTransform
from vlm.errors import DataError, reason
from vlm.files import visible_names, write_text

NOTE = "features.json"
DELETE = f"delete {NOTE}, states.bin, pictures.bin and done.bin there"
MISSING, DONE, UNREADABLE = 0, 1, 2
TYPES = {"float32": np.float32, "float16": np.float16}


@dataclass(frozen=True)
class Encoded:
    """What features are of; they are of use only where all of it is the same."""

    encoder: str
    """Hash of the image encoder's weights and settings."""
    preprocessing: str
    """Hash of how pictures become pixels."""
    data: str
    """The source's fingerprint."""
    samples: int


class FeatureStore:
    """The features of one folder; safe to hand to a loader's workers, each of which opens the files itself."""

    def __init__(self, folder: Path, shape: tuple[int, int, int], kind: str, *, writing: bool = False) -> None:
        """shape: (n, N, D). kind: of the numbers, see `TYPES`. Use `create` and `open_features`."""
        self.folder, self.shape, self.kind, self.writing = folder, shape, kind, writing
        self._open()

    @classmethod
    def create(
        cls, folder: Path, encoded: Encoded, states: tuple[int, int], kind: Literal["float32", "float16"]
    ) -> FeatureStore:
        """The folder's features to be written, or to go on with where it holds a part of just these.

        states: (N, D) of a picture. Raises DataError where it holds others, or can't be written.
        """
        shape = (encoded.samples, *states)
        path = folder / NOTE
        if path.is_file():
            note = _note(folder)
            _refuse_other(folder, note, encoded, f"choose another --out, or {DELETE}")
            if (tuple(note["shape"]), note["type"]) != (shape, kind):
                raise DataError(f"{folder}: holds features of shape {note['shape']} in {note['type']}; choose another")
            return cls(folder, shape, kind, writing=True)
        made: list[Path] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if others := visible_names(folder):
                raise DataError(f"{folder}: holds other files, such as {others[0]}; choose a new or empty --out")
            for name, (type_, size) in _arrays(shape, kind).items():
                made.append(folder / name)
                _reserve(made[-1], int(np.prod(size)) * np.dtype(type_).itemsize)
            write_text(path, json.dumps({**asdict(encoded), "shape": shape, "type": kind}, indent=1) + "\n")
        except BaseException as error:
            for array in made:  # else the folder would be one of other files next time
                array.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise DataError(f"{folder}: can't be written ({error.strerror or error})") from error
            raise
        return cls(folder, shape, kind, writing=True)

    def missing(self) -> np.ndarray:
        """Numbers of the samples that are still to be computed."""
        return np.flatnonzero(np.asarray(self._done) == MISSING)

    def unreadable(self) -> int:
        """How many pictures couldn't be decoded."""
        return int((np.asarray(self._done) == UNREADABLE).sum())

    def write(self, numbers: Sequence[int], states: Tensor, pictures: Sequence[int], bad: Sequence[int] = ()) -> None:
        """Keep (b, N, D) states of the samples `numbers`, their pictures' hashes, and which others can't be decoded."""
        chosen = np.asarray(numbers, dtype=np.int64)
        self._states[chosen] = states.numpy().astype(self._states.dtype)
        self._pictures[chosen] = np.asarray(pictures, dtype=np.int64)
        self._states.flush()
        self._pictures.flush()
        self._done[chosen] = DONE
        self._done[np.asarray(bad, dtype=np.int64)] = UNREADABLE
        self._done.flush()

    def row(self, number: int, key: str) -> tuple[Tensor, int]:
        """A sample's states (N, D) float32 and its picture's hash. Raises DataError, naming `key`, without them."""
        if self._done[number] != DONE:
            raise DataError(f"{key}: its picture couldn't be decoded when features were computed")
        return torch.from_numpy(self._states[number].astype(np.float32)), int(self._pictures[number])

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("folder", "shape", "kind", "writing")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        mode: Literal["r", "r+"] = "r+" if self.writing else "r"
        opened = {}
        for name, (type_, size) in _arrays(self.shape, self.kind).items():
            path = self.folder / name
            expected = int(np.prod(size)) * np.dtype(type_).itemsize
            found = path.stat().st_size if path.is_file() else 0
            if found != expected:
                raise DataError(f"{path}: has {found} bytes, expected {expected}; {DELETE}, and compute again")
            opened[name] = np.memmap(path, type_, mode, shape=size)
        self._states, self._pictures, self._done = opened.values()


def open_features(folder: Path, encoded: Encoded) -> FeatureStore:
    """The features of a folder, for training on them.

    Raises DataError when there are none, when they aren't whole, or when encoder, preprocessing or data were others.
    """
    again = "compute them again with `vlm data features`"
    if not (folder / NOTE).is_file():
        raise DataError(f"{folder}: no features there ({NOTE} is missing); {again}")
    note = _note(folder)
    _refuse_other(folder, note, encoded, again)
    store = FeatureStore(folder, tuple(note["shape"]), note["type"])
    missing = len(store.missing())
    if missing:
        raise DataError(f"{folder}: {missing} of {encoded.samples} samples are missing; go on with `vlm data features`")
    return store


def pictures_of(
    source: Source, transform: ImageTransform, numbers: np.ndarray, *, batch_size: int, workers: int
) -> DataLoader[Any]:
    """Batches of (numbers, pixels (b, 3, H, W), their pictures' hashes, numbers that can't be decoded)."""
    parts = [numbers[start : start + batch_size].tolist() for start in range(0, len(numbers), batch_size)]
    return DataLoader(_Pictures(source, transform, parts), batch_size=None, num_workers=workers)


class _Pictures(Dataset[Any]):
    def __init__(self, source: Source, transform: ImageTransform, parts: list[list[int]]) -> None:
        self.source, self.transform, self.parts = source, transform, parts

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, part: int) -> tuple[list[int], Tensor, list[int], list[int]]:
        found, pixels, pictures, bad = [], [], [], []
        for number in self.parts[part]:
            try:
                sample = self.source[number]
                pixels.append(
                    self.transform(decode_image(sample.image, name=sample.key, min_side=2 * self.transform.size))
                )
            except DataError:
                bad.append(number)
                continue
            found.append(number)
            pictures.append(stable_id(sample.image))
        return found, torch.stack(pixels) if pixels else torch.empty(0), pictures, bad


def _arrays(shape: tuple[int, int, int], kind: str) -> dict[str, tuple[Any, tuple[int, ...]]]:
    return {
        "states.bin": (TYPES[kind], shape),
        "pictures.bin": (np.int64, shape[:1]),
        "done.bin": (np.uint8, shape[:1]),
    }


def _reserve(path: Path, size: int) -> None:
    """A file of zeros whose room is taken now: a disk that fills up later would end the process without a word."""
    with path.open("wb") as file:
        file.truncate(size)
        try:
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that can't
                raise


def _note(folder: Path) -> dict[str, Any]:
    try:
        note = json.loads((folder / NOTE).read_text("utf-8"))
        whole = (
            len(note["shape"]) == 3 and note["type"] in TYPES and {"encoder", "preprocessing", "data"} <= note.keys()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{folder / NOTE}: can't be read ({reason(error)}); if it is of features, {DELETE}, and compute again"
        ) from error
    if not whole:
        raise DataError(f"{folder / NOTE}: isn't what `vlm data features` writes; choose another folder")
    return note


def _refuse_other(folder: Path, note: Mapping[str, Any], encoded: Encoded, advice: str) -> None:
    """Raises DataError, which names what is another one than the features are of."""
    names = {
        "encoder": "another image encoder's weights",
        "preprocessing": "another preprocessing of pictures (size, mean, std or resize)",
        "data": "other data",
        "samples": "other data",
    }
    wrong = dict.fromkeys(words for name, words in names.items() if note.get(name) != getattr(encoded, name))
    if wrong:
        raise DataError(f"{folder}: its features are of {' and of '.join(wrong)} than this run's; {advice}")
