"""Texts and scores of an earlier CapFilt, kept or dropped anew: no model is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm.data.sources import Source
from vlm.errors import ConfigError, DataError
from vlm.tasks.capfilt.identity import differences, noted
from vlm.tasks.capfilt.settings import CapfiltConfig
from vlm.tasks.capfilt.units import MEND, Row, Unit
from vlm.tasks.capfilt.work import (
    BEGUN,
    EXCHANGED,
    Job,
    Judged,
    Text,
    keeps,
    open_sets,
    read_record,
    record_path,
    write_unit,
)

FREE = ("synthetic", "filtering", "threshold")
"""Settings that may be others than the earlier folder's."""
ADVICE = "capfilt.judged names the folder of a finished CapFilt"
SHOWN = 5
"""Missing shards that are named."""


class Rewriter:
    """The sets and an earlier folder's records, for any number of units; does what `Worker` does, without a model."""

    def __init__(self, job: Job, sources: dict[str, Source] | None = None) -> None:
        """sources: ``web`` and ``human``; opened by name if None."""
        self.job, self.sources = job, sources or open_sets(job.config)

    def run(self, units: Sequence[Unit]) -> Iterator[Unit]:
        """Work on units one after the other; each is given back when it is written.

        Raises DataError where a record or a set can't be read.
        """
        for unit in units:
            record = read_record(Path(self.job.config.judged), unit)
            rows = [self._row(unit, row) for row in record["rows"]]
            write_unit(self.job.out, unit, rows, [(one["key"], one["error"]) for one in record["unreadable"]])
            yield unit

    def _row(self, unit: Unit, found: Mapping[str, Any]) -> Judged:
        config = self.job.config
        texts = [
            Text(**text | {"kept": keeps(config, text["provenance"], text["itm"])})
            for text in found["texts"]
            if config.synthetic or text["provenance"] != "synthetic"
        ]
        try:
            sample = self.sources[unit.kind][found["number"]]
        except DataError as error:
            raise DataError(f"{error}; {MEND}") from error
        words = tuple(text.text for text in texts if text.provenance != "synthetic")
        return Row(found["number"], sample.key, sample.meta, sample.image, words), texts


def check_earlier(
    config: CapfiltConfig, began: Mapping[str, Any], given: Mapping[str, str], units: Sequence[Unit]
) -> dict[str, str]:
    """Make sure that the folder `config.judged` holds the texts that new work would give.

    Args:
        config: of the new folder.
        began: what its content depends on: ``settings``, ``data``, and ``model`` and ``training`` as far as named.
        given: digests of captioner and filter where those were named.
        units: all that must be there.

    Returns the digests of captioner and filter. Raises ConfigError, which names each difference, and DataError,
    which names what is missing of a folder that isn't finished.
    """
    folder = Path(config.judged)
    before = noted(folder / BEGUN, advice=ADVICE)
    if config.synthetic and not before.get("settings", {}).get("synthetic"):
        raise ConfigError(
            f"{folder}: no synthetic texts were written there; take them off here too, or take texts from elsewhere"
        )
    models = noted(folder / "models.json", advice=f"{ADVICE}: let that one finish")
    # Without synthetic texts it is all the same how they were written.
    free = FREE if config.synthetic else (*FREE, "generation")
    old, new = _compared(before, free), _compared(began, free)
    if "model" in began:
        old["model"], new["model"] = before.get("model"), began["model"]
        trained = before.get("training", {})
        old["training"] = {part: trained.get(part) for part in began["training"]}
        new["training"] = began["training"]
    old["weights"], new["weights"] = {part: models.get(part) for part in given}, given
    changed = differences(old, new)
    if changed:
        raise ConfigError(
            f"{folder}: its texts and scores are of other settings, data or weights; give the same, or let new ones be "
            "made. Different:\n" + "\n".join(changed)
        )
    missing = [unit.name for unit in units if not record_path(folder, unit).is_file()]
    missing += [] if (folder / EXCHANGED).is_file() else [EXCHANGED]
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise DataError(
            f"{folder}: isn't finished, {', '.join(missing[:SHOWN])}{more} missing; run what began it to its end"
        )
    return models


def _compared(values: Mapping[str, Any], free: Sequence[str]) -> dict[str, Any]:
    settings = {name: value for name, value in values.get("settings", {}).items() if name not in free}
    return {"settings": settings, "data": values.get("data", {})}
