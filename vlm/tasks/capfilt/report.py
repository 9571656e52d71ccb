"""What CapFilt kept: counts, shares and the filter's precision as JSON and Markdown."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm.data.samples import Problems, stable_id
from vlm.tasks.capfilt.units import Unit
from vlm.tasks.capfilt.work import read_record
from vlm.tasks.caption import Summary
from vlm.tasks.metrics import share

PROVENANCES = ("web", "synthetic", "human")
EXAMPLES = 20
"""Unreadable pictures that are named."""


@dataclass
class _Count:
    total: int = 0
    kept: int = 0
    itm: float = 0.0
    judged: int = 0
    different: set[int] = field(default_factory=set)
    summary: Summary = field(default_factory=Summary)

    def add(self, text: Mapping[str, Any]) -> None:
        self.total += 1
        self.summary.add(text["text"])
        self.different.add(stable_id(text["text"]))
        if text["itm"] is not None:
            self.judged += 1
            self.itm += text["itm"]
        self.kept += bool(text["kept"])

    def as_dict(self) -> dict[str, Any]:
        kept = share([True] * self.kept + [False] * (self.total - self.kept), 0.0).as_dict()
        del kept["chance"]
        return {
            "texts": self.total,
            "kept": self.kept,
            "kept_share": kept,
            "different": len(self.different),
            "mean_itm": round(self.itm / self.judged, 6) if self.judged else None,
            "words": round(self.summary.length, 4),
            "repetition": round(self.summary.repetition, 6),
        }


@dataclass(frozen=True)
class Tally:
    """Counts over all units, and some rows to be shown."""

    counts: dict[str, Any]
    shown: list[dict[str, Any]]
    """Rows of web records, chosen by the seed."""


def tally(out: Path, units: Iterable[Unit], problems: Mapping[str, Problems], *, seed: int, shown: int) -> Tally:
    """Count what the records of all units say; one record is held at a time.

    problems: of each source, what was left out when it was opened.
    """
    counts = {name: _Count() for name in PROVENANCES}
    kinds = {kind: {"pictures": 0, "with_kept_text": 0, "without_text": 0, "unreadable": 0} for kind in problems}
    unreadable: list[dict[str, str]] = []
    chosen: list[tuple[int, int, dict[str, Any]]] = []
    for unit in units:
        record, kind = read_record(out, unit), kinds[unit.kind]
        kind["pictures"] += record["pictures"]
        kind["unreadable"] += len(record["unreadable"])
        unreadable += record["unreadable"][: max(0, EXAMPLES - len(unreadable))]
        for row in record["rows"]:
            kind["with_kept_text"] += any(text["kept"] for text in row["texts"])
            kind["without_text"] += all(text["provenance"] == "synthetic" for text in row["texts"])
            for text in row["texts"]:
                counts[text["provenance"]].add(text)
            if unit.kind == "web":
                place = -stable_id(f"{seed}/page/{row['key']}")  # the largest of these is thrown out first
                heapq.heappush(chosen, (place, -row["number"], row))
                if len(chosen) > shown:
                    heapq.heappop(chosen)
    texts = {name: count.as_dict() for name, count in counts.items() if count.total}
    left_out = {kind: found.as_dict() for kind, found in problems.items() if found.total}
    found = {"pictures": kinds, "texts": texts, "unreadable": unreadable, "left_out_on_opening": left_out}
    return Tally(found, [row for *_, row in sorted(chosen, key=lambda one: one[:2], reverse=True)])


def as_markdown(report: Mapping[str, Any]) -> str:
    """The report as tables."""
    lines = ["# CapFilt", ""]
    lines += _table(
        ["pictures", "read", "unreadable", "came without a text", "with a kept text"],
        [
            [
                kind, found["pictures"] - found["unreadable"], found["unreadable"], found["without_text"],
                found["with_kept_text"],
            ]
            for kind, found in report["pictures"].items()
        ],
    )  # fmt: skip
    lines += [""]
    lines += _table(
        ["texts", "all", "different", "kept", "kept, %", "mean ITM", "words", "repeated pairs, %"],
        [
            [
                name, found["texts"], found["different"], found["kept"], _percent(found["kept_share"]),
                "-" if found["mean_itm"] is None else f"{found['mean_itm']:.3f}", f"{found['words']:.1f}",
                f"{100 * found['repetition']:.1f}",
            ]
            for name, found in report["texts"].items()
        ],
    )  # fmt: skip
    if report["settings"].get("judged"):
        lines += ["", f"Texts and scores are those of {report['settings']['judged']}."]
    check = report["filter"]
    known = " (which it was fine-tuned on, so it knows them: see --check)" if check["trained_on"] else ""
    lines += ["", f"The filter on {check['data']}{known}, half of whose texts were exchanged between pictures:", ""]
    names = {"precision": "dropped texts that were exchanged", "recall": "exchanged texts that were dropped"}
    names["own_kept"] = "own texts that were kept"
    lines += _table(
        ["figure", "what", "%", "of", "chance, %"],
        [
            [name, what, _percent(check[name]), check[name]["count"], f"{100 * check[name]['chance']:.1f}"]
            for name, what in names.items()
        ],
    )
    for one in report["unreadable"]:
        lines += ["", f"Unreadable: {one['error']}"]
    for kind, found in report["left_out_on_opening"].items():
        reasons = "; ".join(f"{count} x {reason}" for reason, count in found["counts"].items())
        lines += ["", f"Left out of the {kind} set on opening: {reasons}"]
    return "\n".join(lines) + "\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]


def _percent(figure: Mapping[str, float]) -> str:
    if not figure["count"]:
        return "-"
    return f"{100 * figure['value']:.1f} [{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]"
