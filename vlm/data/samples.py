"""One picture with its texts, the identities of both, and an account of what could not be used."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

logger = logging.getLogger("vlm.data")

CAPTION_FIELDS = ("captions", "caption", "text", "title")
UNREADABLE = "picture that can't be decoded (each showing counted)"
ABSENT = "picture isn't there"
DAMAGED = "damaged shard, its readable part is used"
"""Reasons for which `Problems` count what was asked for and could not be read."""
EMPTY = "shard without samples"
"""Nothing is lost with it: it is only told."""
ANSWER_FIELDS = ("answers", "answer")


@dataclass(frozen=True)
class Sample:
    """A picture as it was encoded, with everything that is known about it."""

    key: str
    """Name in its source: a tar key, or a path relative to the folder or table."""

    image: bytes
    """Encoded picture, for `decode_image`."""

    meta: dict[str, Any]
    """``captions`` (list of str; at least one, unless the source takes pictures without a text) and, where known,
    source, licence, concept, tags, name, ..."""


@dataclass
class Problems:
    """What was skipped, counted by reason, with the first places of each."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    keep: int = 20
    """How many places are remembered for each reason."""

    def add(self, reason: str, where: str, count: int = 1) -> None:
        """Count one more place where `reason` was met."""
        self.counts[reason] = self.counts.get(reason, 0) + count
        known = self.examples.setdefault(reason, [])
        if len(known) < self.keep and where not in known:
            known.append(where)

    def merge(self, other: Problems) -> None:
        """Add all of `other`."""
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            known = self.examples.setdefault(reason, [])
            known += other.examples.get(reason, [])[: self.keep - len(known)]

    @property
    def total(self) -> int:
        """All that was skipped."""
        return sum(self.counts.values())

    @property
    def unread(self) -> int:
        """Pictures, and ends of damaged shards, that could not be read."""
        return sum(self.counts.get(reason, 0) for reason in (UNREADABLE, ABSENT, DAMAGED))

    def summary(self) -> str:
        """One line for each reason: count, reason, first places."""
        lines = []
        for reason, count in sorted(self.counts.items(), key=lambda item: -item[1]):
            places = self.examples.get(reason, [])
            shown = ", ".join(places[:3]) + (", ..." if count > min(3, len(places)) else "")
            lines.append(f"{count} x {reason}: {shown}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Counts and examples as JSON values."""
        return {"total": self.total, "counts": dict(self.counts), "examples": dict(self.examples)}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Problems:
        """The inverse of `as_dict`."""
        return cls(dict(saved["counts"]), {reason: list(places) for reason, places in saved["examples"].items()})

    def log(self, name: str) -> None:
        """Warn of everything that was skipped in the source `name`; silent when nothing was."""
        if self.total:
            logger.warning("%s: %d left out\n%s", name, self.total, self.summary())


def with_captions(
    meta: Any, extra: Iterable[str] = (), *, textless: bool = False, report: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """A copy of a sample's JSON with ``captions`` as a list of non-empty texts, duplicates removed.

    Takes ``captions``, else ``caption``, ``text`` or ``title`` (a text or a list of texts), else `extra`. Where
    there is a ``question``, its ``answers`` or ``answer`` come first, and ``pairs`` lists [question, answer].
    textless: whether there may be no text at all. report: called with what was left out on the way, in words.
    Raises ValueError when it isn't an object, or holds no text but must.
    """
    if not isinstance(meta, dict):
        raise ValueError("JSON is not an object")
    found: list[str] = []
    question = meta.get("question")
    asks = isinstance(question, str) and bool(question.strip())
    for name in (*ANSWER_FIELDS, *CAPTION_FIELDS) if asks else CAPTION_FIELDS:
        value = meta.get(name)
        texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
        found = [clean_text(text) for text in texts if isinstance(text, str) and text.strip()]
        if found:
            if len(found) < len(texts) and report is not None:
                report("empty caption beside others, left out")
            asks = asks and name in ANSWER_FIELDS
            break
    found = found or [clean_text(text) for text in extra if text.strip()]
    if not found and not textless:
        raise ValueError("no caption")
    captions = list(dict.fromkeys(found))
    if len(captions) < len(found) and report is not None:
        report("same caption twice for one picture, kept once")
    pairs = {"pairs": [[clean_text(str(question)), answer] for answer in captions]} if asks and captions else {}
    return {**meta, "captions": captions, **pairs}


def clean_text(text: str) -> str:
    """A text from outside without outer spaces, and with a question mark for each half of a character."""
    # JSON can hold half surrogates ("\ud83d"), which no encoder and no tokenizer takes.
    return text.strip().encode("utf-8", "replace").decode("utf-8")


def parse_json(content: bytes | str) -> Any:
    """The JSON value of a text from outside; raises ValueError, also where it is nested too deeply to read."""
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def caption_length(meta: Mapping[str, Any]) -> int:
    """Mean length of a sample's captions in characters, rounded; 0 where there are none."""
    captions = meta["captions"]
    return round(sum(map(len, captions)) / max(1, len(captions)))


def stable_id(content: str | bytes) -> int:
    """63-bit number of a text or a file: the same on every machine and in every run."""
    given = content.encode("utf-8", "replace") if isinstance(content, str) else content
    return int.from_bytes(hashlib.blake2b(given, digest_size=8).digest(), "big") >> 1


def caption_id(caption: str) -> int:
    """`stable_id` of a caption, blind to case, spaces and the full stop at its end."""
    return stable_id(" ".join(caption.casefold().split()).rstrip(" .!?"))


OWN = "sample:"
"""How the concept begins of a sample that names none: it stands for itself alone."""


def fingerprint(keys: Iterable[str], concepts: Iterable[str], *numbers: np.ndarray) -> str:
    """Hash of a source's content as its index knows it: keys, concepts, lengths and sizes."""
    digest = hashlib.sha256()
    for key, concept in zip(keys, concepts, strict=True):
        digest.update(f"{key}\0{concept}\n".encode("utf-8", "replace"))
    for array in numbers:
        digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
    return digest.hexdigest()
