"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TextIO, TypeVar

from vlm.errors import DataError, VlmError

Result = TypeVar("Result")
logger = logging.getLogger("vlm.files")


def write_file(
    path: Path,
    write: Callable[[BinaryIO], Result],
    *,
    error: type[VlmError] = DataError,
    advice: str = "",
    named: Path | None = None,
) -> Result:
    """Call `write` on a temporary file beside `path`, then rename it; nothing is left behind on failure.

    Returns what `write` returned. Raises `error`, with `advice` behind it, when the folder can't be written or
    the disk is full; what stood there stays. What `path` links to is replaced, not the link; a device or a pipe,
    such as ``/dev/stdout``, is written into. named: what errors call it, where `path` is only a step towards that.
    """
    if path.exists() and not path.is_file():
        return _write_into(path, write, error, advice)
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".tmp-{path.name}-{secrets.token_hex(8)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("x+b") as file:
            result = write(file)
        os.replace(temporary, target)
        return result
    except OSError as problem:
        raise error(f"{named or path}: can't be written ({problem.strerror or problem}){advice}") from problem
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _write_into(path: Path, write: Callable[[BinaryIO], Result], error: type[VlmError], advice: str) -> Result:
    try:
        with path.open("wb") as file:
            return write(file)
    except OSError as problem:
        raise error(f"{path}: can't be written ({problem.strerror or problem}){advice}") from problem


def visible_names(folder: Path) -> list[str]:
    """Sorted names of what a folder holds, without hidden files such as locks. Raises OSError as `Path.iterdir`."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def write_text(path: Path, text: str, *, error: type[VlmError] = DataError, advice: str = "") -> None:
    """Write a text as `write_file` does; bytes of file names that aren't letters are escaped."""
    content = text.encode("utf-8", errors="backslashreplace")
    write_file(path, lambda file: file.write(content), error=error, advice=advice)


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Call `fill` on a temporary folder beside `target`, then put it in its place.

    Whatever `fill` raises comes through; what stood at `target` then stays, and nothing else is left.
    """
    temporary = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        fill(temporary)
        _replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_once(target: Path, fill: Callable[[Path], None]) -> None:
    """Call `fill` on a temporary folder and give it the name `target`, unless that is there already.

    Of several processes one does it, the others wait; where locks can't be had the first that is done wins. Whatever
    `fill` raises comes through, and nothing is left. Raises DataError where the folder above can't be written.
    """
    if target.is_dir():
        return
    temporary = target.with_name(f".tmp-{target.name}-{secrets.token_hex(8)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = target.with_name(f".lock-{target.name}").open("w")
    except OSError as problem:
        raise DataError(f"{target.parent}: can't be written ({problem.strerror or problem})") from problem
    with file:
        _wait_for_lock(file)
        if target.is_dir():
            return
        try:
            temporary.mkdir()
            fill(temporary)
            _name_it(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _wait_for_lock(file: TextIO) -> None:
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX)
    except (ImportError, OSError) as problem:
        logger.debug("%s: no lock can be had there (%s)", file.name, problem)


def _name_it(temporary: Path, target: Path) -> None:
    try:
        temporary.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was faster
            raise


@contextlib.contextmanager
def held_alone(folder: Path) -> Iterator[None]:
    """Make a folder and keep other processes out of it; the lock ends with the process, however that ends.

    Raises DataError where another process holds it. Without locks (Windows, some network disks) everybody comes in.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as problem:
        raise DataError(f"{folder}: can't be written ({problem.strerror or problem})") from problem
    with file:
        try:
            import fcntl

            # Not flock: workers that outlive a killed process for some seconds would inherit that.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as problem:
            raise DataError(f"{folder}: another process works there; wait for it, or choose another") from problem
        except (ImportError, OSError) as problem:
            logger.warning("%s: no lock can be had there (%s); run one process at a time", folder, problem)
        yield


def _replace(new: Path, target: Path) -> None:
    """Put `new` in the place of `target`, which is moved away first and dropped afterwards."""
    old = target.with_name(f".old-{target.name}")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(new, target)
    shutil.rmtree(old, ignore_errors=True)
