"""Reads all of a data set, every picture decoded, and says what is in it and what is wrong with it."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm.data.images import FORMATS, decode_image
from vlm.data.samples import Problems, caption_id
from vlm.data.sources import Source, open_source
from vlm.errors import DataError

CHUNK = 64
SHOWN = 5
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Spread:
    """Smallest, middle, 95th percentile and largest of some numbers."""

    min: float
    median: float
    p95: float
    max: float

    @classmethod
    def of(cls, numbers: Sequence[int] | np.ndarray) -> Spread:
        """Of at least one number; zeros for none."""
        if not len(numbers):
            return cls(0, 0, 0, 0)
        low, middle, high, top = np.percentile(np.asarray(numbers), [0, 50, 95, 100])
        return cls(float(low), float(middle), round(float(high), 1), float(top))

    def as_dict(self) -> dict[str, float]:
        """As JSON values."""
        return {"min": self.min, "median": self.median, "p95": self.p95, "max": self.max}

    def __str__(self) -> str:
        return f"min {self.min:g}, median {self.median:g}, p95 {self.p95:g}, max {self.max:g}"


@dataclass(frozen=True)
class Picture:
    """What one decoded picture turned out to be."""

    number: int
    digest: bytes = b""
    width: int = 0
    height: int = 0
    mode: str = ""
    format: str = ""
    frames: int = 1
    size: int = 0
    """Encoded, in bytes."""
    error: str = ""


@dataclass
class Report:
    """What `check_source` found."""

    name: str
    samples: int
    problems: Problems
    """What the source left out when it was opened."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Key of each picture that can't be decoded, and why."""
    identical: list[list[str]] = field(default_factory=list)
    """Keys of pictures with the same bytes, a list for each set of them."""
    shared_captions: dict[str, int] = field(default_factory=dict)
    """Captions that stand at several pictures and at how many, the commonest first; blind to case, so in one
    of their spellings."""
    captions: int = 0
    captions_per_picture: Spread = field(default_factory=lambda: Spread.of([]))
    characters: Spread = field(default_factory=lambda: Spread.of([]))
    tokens: Spread = field(default_factory=lambda: Spread.of([]))
    """WordPiece tokens of each caption, start and end token counted."""
    widths: Spread = field(default_factory=lambda: Spread.of([]))
    heights: Spread = field(default_factory=lambda: Spread.of([]))
    bytes: int = 0
    """Encoded pictures together."""
    modes: dict[str, int] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)
    animated: int = 0
    """Pictures with several frames, of which the first is used."""
    licences: dict[str, int] = field(default_factory=dict)
    concepts: int = 0
    fingerprint: str = ""

    @property
    def ok(self) -> bool:
        """Whether all of it can be used: nothing was left out and every picture is whole."""
        return not self.unreadable and not self.problems.total

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        plain = {name: value for name, value in vars(self).items() if not isinstance(value, Spread | Problems)}
        spreads = {name: value.as_dict() for name, value in vars(self).items() if isinstance(value, Spread)}
        return {**plain, **spreads, "problems": self.problems.as_dict(), "ok": self.ok}

    def text(self) -> str:
        """All of it as lines to read."""
        twins = sum(len(keys) - 1 for keys in self.identical)
        lines = [
            f"{self.name}: {'whole' if self.ok else 'not whole'}",
            f"  samples             {self.samples:,} of {self.concepts:,} concepts",
            f"  captions            {self.captions:,}; per picture {self.captions_per_picture}",
            f"  characters          {self.characters}",
            f"  WordPiece tokens    {self.tokens}",
            f"  widths              {self.widths}",
            f"  heights             {self.heights}",
            f"  formats             {_counts(self.formats)}; modes {_counts(self.modes)}",
            f"  picture bytes       {self.bytes:,}",
            f"  licences            {_counts(self.licences)}",
            f"  animated            {self.animated:,}",
            f"  identical pictures  {twins:,} more than once{_some([' = '.join(k[:3]) for k in self.identical])}",
            f"  shared captions     {len(self.shared_captions):,}{_some(_times(self.shared_captions))}",
            f"  unreadable          {len(self.unreadable):,}",
        ]
        lines += [f"    {why}" for why in list(self.unreadable.values())[: 4 * SHOWN]]
        if len(self.unreadable) > 4 * SHOWN:
            lines.append("    ...")
        lines.append(f"  left out            {self.problems.total:,}")
        lines += [f"    {line}" for line in self.problems.summary().splitlines()]
        return "\n".join(lines)


def check_source(
    spec: str | Path | Sequence[str | Path], *, workers: int = 2, progress: Progress | None = None
) -> Report:
    """Read all samples of `spec` (see `open_source`) and decode every picture.

    workers: processes that decode, 0 for this one alone. progress: called with pictures done and pictures in
    all. Pictures that can't be read are in the report; DataError is raised where nothing can be opened, or
    where a decoder brings its process down.
    """
    if workers < 0:
        raise DataError(f"workers must be at least 0, got {workers}")
    source = open_source(spec)
    report = Report(source.name, len(source), source.problems, concepts=len(set(source.concepts)))
    _check_pictures(source, report, workers, progress)
    _check_texts(source, report)
    report.fingerprint = source.fingerprint()
    return report


def _check_pictures(source: Source, report: Report, workers: int, progress: Progress | None) -> None:
    widths, heights = [], []
    modes: Counter[str] = Counter()
    formats: Counter[str] = Counter()
    same: dict[bytes, list[int]] = {}
    for done, found in enumerate(_decoded(source, workers), 1):
        if progress is not None:
            progress(done, len(source))
        if found.error:
            key = source.keys[found.number]
            twice = key in report.unreadable  # two of several sources may use one name
            report.unreadable[f"{key} (sample {found.number})" if twice else key] = found.error
            continue
        widths.append(found.width)
        heights.append(found.height)
        modes[found.mode] += 1
        formats[found.format] += 1
        same.setdefault(found.digest, []).append(found.number)
        report.bytes += found.size
        report.animated += found.frames > 1
    report.unreadable = dict(sorted(report.unreadable.items()))
    sets = sorted(sorted(numbers) for numbers in same.values() if len(numbers) > 1)
    report.identical = [[source.keys[number] for number in numbers] for numbers in sets]
    report.widths, report.heights = Spread.of(widths), Spread.of(heights)
    report.modes, report.formats = dict(modes.most_common()), dict(formats.most_common())


def _decoded(source: Source, workers: int) -> Iterator[Picture]:
    """Every picture's facts, in any order."""
    chunks = (range(start, min(start + CHUNK, len(source))) for start in range(0, len(source), CHUNK))
    if not workers:
        for chunk in chunks:
            yield from (_picture(source, number) for number in chunk)
        return
    # A forked process has the source already; elsewhere it is sent once.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    waiting: set[Future[list[Picture]]] = set()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(source,)) as pool:
        try:
            for chunk in chunks:
                waiting.add(pool.submit(_chunk, chunk))
                if len(waiting) >= 4 * workers:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield from future.result()
            for future in waiting:
                yield from future.result()
        except BrokenProcessPool as error:
            raise DataError(
                f"{source.name}: a process that decodes pictures was killed or crashed (out of memory, or a "
                "picture that its decoder can't survive): run with workers=0 and a progress line to find it"
            ) from error


_SOURCE: list[Source] = []


def _begin(source: Source) -> None:
    _SOURCE[:] = [source]


def _chunk(numbers: range) -> list[Picture]:
    return [_picture(_SOURCE[0], number) for number in numbers]


def _picture(source: Source, number: int) -> Picture:
    key = source.keys[number]
    try:
        content = source[number].image
        width, height = decode_image(content, name=key).size
        with Image.open(io.BytesIO(content), formats=FORMATS) as raw:  # within the limits by now
            mode, kind, frames = raw.mode, raw.format or "", _frames(raw)
    except DataError as error:
        return Picture(number, error=str(error))
    digest = hashlib.sha256(content).digest()
    return Picture(number, digest, width, height, mode, kind, frames, len(content))


def _frames(image: Image.Image) -> int:
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # counting reads on past the first frame, the only one that is used
        return 2


def _check_texts(source: Source, report: Report) -> None:
    from vlm.data.tokenizers import wordpiece

    tokenizer = wordpiece()
    characters: list[int] = []
    tokens: list[int] = []
    counts: list[int] = []
    licences: Counter[str] = Counter()
    pictures: Counter[int] = Counter()
    shared: dict[int, str] = {}
    for start in range(0, len(source), 1024):
        texts: list[str] = []
        for place in range(start, min(start + 1024, len(source))):
            meta = source.meta(place)
            counts.append(len(meta["captions"]))
            licences[str(meta.get("licence") or meta.get("license") or "not given")] += 1
            own = {caption_id(caption): caption for caption in meta["captions"]}
            pictures.update(own.keys())
            shared |= {number: text for number, text in own.items() if number not in shared and pictures[number] > 1}
            texts += meta["captions"]
        characters += map(len, texts)
        tokens += _token_counts(tokenizer, texts)
    report.captions = len(characters)
    report.characters, report.tokens = Spread.of(characters), Spread.of(tokens)
    report.captions_per_picture = Spread.of(counts)
    report.licences = dict(licences.most_common())
    counted = sorted(((pictures[number], text) for number, text in shared.items()), key=lambda pair: -pair[0])
    report.shared_captions = {text: count for count, text in counted}


def _token_counts(tokenizer: Any, texts: list[str]) -> list[int]:
    # Sorted by length, since a batch is as wide as its longest text.
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    counts = [0] * len(texts)
    for start in range(0, len(order), 256):
        places = order[start : start + 256]
        mask = tokenizer([texts[place] for place in places], max_length=1 << 30).attention_mask
        for place, count in zip(places, mask.sum(dim=1).tolist(), strict=True):
            counts[place] = count
    return counts


def _counts(found: dict[str, int]) -> str:
    shown = [f"{name} {count:,}" for name, count in list(found.items())[: 2 * SHOWN]]
    return ", ".join(shown + ["..."] * (len(found) > 2 * SHOWN)) or "none"


def _times(found: dict[str, int]) -> list[str]:
    return [f"{text[:60]!r} at {count:,}" for text, count in list(found.items())[: SHOWN + 1]]


def _some(found: list[str]) -> str:
    if not found:
        return ""
    return " (" + "; ".join(found[:SHOWN] + ["..."] * (len(found) > SHOWN)) + ")"
