"""Caption and filter the pictures of a unit, and write what is kept: all that an engine runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.data.images import picture_suffix
from vlm.data.samples import OWN
from vlm.data.shards import ShardWriter
from vlm.data.sources import Source, open_source
from vlm.errors import DataError
from vlm.files import write_text
from vlm.models.packed import pack_linears
from vlm.tasks.capfilt.judge import Judge, Verdict
from vlm.tasks.capfilt.settings import CapfiltConfig
from vlm.tasks.capfilt.units import KINDS, Pictures, Reading, Row, Unit, read_units
from vlm.tasks.caption import Captioner
from vlm.weights.load import load

BEGUN = "capfilt.json"
"""What a folder was begun with."""
DATA, JUDGED, EXCHANGED = "data", "judged", "exchanged.json"
"""Of a folder: the shards, the records, and the filter's scores of exchanged texts."""
TEXT_FIELDS = ("captions", "caption", "text", "title", "web", "tags", "name", "description")
"""Fields of a web sample that hold texts which nobody judged: a loader might train on them."""
DIGITS = 6
"""Of the scores that are written."""


@dataclass(frozen=True)
class Job:
    """What a process needs to work on units; small, so that it can be sent anywhere."""

    config: CapfiltConfig
    out: Path
    captioner: str
    """Empty where no texts are written, or earlier ones are taken."""
    judge: str
    """Empty where earlier scores are taken."""
    batch_size: int
    device: str = "auto"
    workers: int = 0


@dataclass(frozen=True)
class Text:
    """A text of a picture, and what became of it."""

    text: str
    provenance: str
    """web, synthetic or human."""
    itm: float | None
    itc: float | None
    kept: bool

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dict(vars(self))


Judged = tuple[Row, list[Text]]


class Worker:
    """Both models and the sets, held for any number of units."""

    def __init__(self, job: Job, sources: dict[str, Source] | None = None) -> None:
        """sources: ``web`` and ``human``; opened by name if None."""
        self.job, config = job, job.config
        self.sources = sources or open_sets(config)
        judge = load(job.judge, device=job.device)
        self.judge, transforms = Judge(judge), [judge.transform]
        self.captioner: Captioner | None = None
        if job.captioner:
            model = load(job.captioner, device=job.device)
            self.captioner = Captioner(model, config.generation, seed=config.seed, batch_size=job.batch_size)
            pack_linears(model.network)
            transforms.insert(0, model.transform)
        pack_linears(judge.network)
        different = tuple(dict.fromkeys(transforms))
        self.reading = Reading(self.sources, different, job.batch_size, config.web_field, job.workers)
        self._places = [different.index(transform) for transform in transforms]

    def run(self, units: Sequence[Unit]) -> Iterator[Unit]:
        """Work on units one after the other; each is given back when it is written."""
        rows: list[Judged] = []
        skipped: list[tuple[str, str]] = []
        for batch in read_units(self.reading, units):
            rows += self.judged(batch)
            skipped += batch.skipped
            if batch.last:
                write_unit(self.job.out, batch.unit, rows, skipped)
                yield batch.unit
                rows, skipped = [], []

    def judged(self, batch: Pictures) -> list[Judged]:
        """Each picture of a batch with its texts, found and written, and what became of them."""
        if not batch.rows:
            return []
        kind, texts = batch.unit.kind, [list(row.texts) for row in batch.rows]
        written = kind == "web" and self.captioner is not None
        if written:
            keys = [row.key for row in batch.rows]
            found = self.captioner.caption_pixels(batch.pixels[self._places[0]], keys)  # type: ignore[union-attr]
            texts = [[*some, captions[0].text] for some, captions in zip(texts, found, strict=True)]
        verdicts = self.judge.verdicts(batch.pixels[self._places[-1]], texts)
        out = []
        for row, some, judged in zip(batch.rows, texts, verdicts, strict=True):
            kinds = [kind] * len(row.texts) + (["synthetic"] if written else [])
            out.append((row, [self._text(*one) for one in zip(some, kinds, judged, strict=True)]))
        return out

    def _text(self, text: str, provenance: str, verdict: Verdict | None) -> Text:
        itm, itc = (None, None) if verdict is None else (round(score, DIGITS) for score in verdict)
        return Text(text, provenance, itm, itc, keeps(self.job.config, provenance, itm))


def open_sets(config: CapfiltConfig) -> dict[str, Source]:
    """The sets by kind, ``web`` and ``human``; every web picture gets a caption, also one that came with no text."""
    return {kind: open_source(getattr(config, kind), textless=kind == "web") for kind in KINDS}


def keeps(config: CapfiltConfig, provenance: str, itm: float | None) -> bool:
    """Whether a text is kept, by its matched probability as it is written; an empty text, which has none, never is."""
    if itm is None:
        return False
    return provenance == "human" or not config.filtering or itm > config.threshold


def write_unit(out: Path, unit: Unit, rows: Sequence[Judged], skipped: Sequence[tuple[str, str]]) -> None:
    """Write a unit's shard, then the record of all its texts, whose presence says that it is finished.

    A picture of which nothing is kept is in the record alone; a unit of which nothing is kept has no shard.
    """
    ordered = sorted(rows, key=lambda one: one[0].number)
    pattern = str(out / DATA / f"{unit.kind}-{{:05d}}.tar")
    with ShardWriter(pattern, samples=max(1, unit.stop - unit.start), first=unit.number) as writer:
        for row, texts in ordered:
            kept = [text for text in texts if text.kept]
            if kept:
                meta = _described(unit, row, kept)
                writer.write(f"{unit.kind}-{row.number:09d}", row.image, picture_suffix(row.image), meta)
    record = {
        "unit": unit.name,
        "pictures": unit.stop - unit.start,
        "unreadable": [{"key": key, "error": error} for key, error in sorted(skipped)],
        "rows": [
            {"number": row.number, "key": row.key, "texts": [text.as_dict() for text in texts]}
            for row, texts in ordered
        ],
    }
    write_text(record_path(out, unit), json.dumps(record, ensure_ascii=False) + "\n")


def record_path(out: Path, unit: Unit) -> Path:
    """Where a unit's record is, once it is finished."""
    return out / JUDGED / f"{unit.name}.json"


def read_record(out: Path, unit: Unit) -> dict[str, Any]:
    """A finished unit's record. Raises DataError where it can't be read."""
    path = record_path(out, unit)
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: can't be read ({error}); delete it, and what made it makes it again") from error
    return found


def _described(unit: Unit, row: Row, kept: Sequence[Text]) -> dict[str, Any]:
    """JSON of a picture that is kept: what was known of it, but texts of the web only where they were judged."""
    dropped = TEXT_FIELDS if unit.kind == "web" else ("captions",)
    meta = {name: value for name, value in row.meta.items() if name not in dropped}
    if str(meta.get("concept", "")).startswith(OWN):
        del meta["concept"]
    captions = list(dict.fromkeys(text.text.strip() for text in kept))
    texts = [{name: value for name, value in text.as_dict().items() if name != "kept"} for text in kept]
    return {**meta, "key": row.key, "captions": captions, "texts": texts}
