"""Captions measured against references: files are read and matched, scores get intervals."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from vlm.data.samples import Problems
from vlm.data.sources import Source
from vlm.data.tables import CAPTION_COLUMNS, IMAGE_COLUMNS, TABLES, table_rows
from vlm.errors import ConfigError, DataError, nearest
from vlm.tasks.caption_metrics import bleu, bleu_counts, cider_d, rouge_l
from vlm.tasks.caption_tokens import caption_words
from vlm.tasks.metrics import Figure, bootstrap, bootstrap_sums

logger = logging.getLogger("vlm.tasks")

NAMES = (*IMAGE_COLUMNS, "key")
"""Columns that name a picture, in a table or, as a key, in a shard."""
MISSING = ("error", "skip", "empty")
BLEU = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")
ROUGE, CIDER = "ROUGE-L", "CIDEr-D"


@dataclass(frozen=True)
class References:
    """What people wrote of each picture."""

    name: str
    captions: Mapping[str, Sequence[str]]
    """By the picture's name, at least one each."""
    groups: Sequence[str] | None = None
    """For each picture, what hangs together, such as its concept; None where each stands alone."""


@dataclass(frozen=True)
class CaptionReport:
    """Scores over pictures."""

    predictions: str
    references: str
    figures: dict[str, Figure]
    """By measure; `chance` is what captions of other pictures get. CIDEr-D goes from 0 to 10, the others to 1."""
    pictures: list[dict[str, Any]]
    """Each picture's name, caption, references and scores."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Reason to count."""

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        figures = {name: figure.as_dict() for name, figure in self.figures.items()}
        return {
            "predictions": self.predictions, "references": self.references, "pictures": len(self.pictures),
            "figures": figures, "left_out": self.left_out,
        }  # fmt: skip


def read_predictions(path: Path) -> tuple[dict[str, str], int]:
    """The caption of each picture, from JSON lines or a table, and how many further captions it had.

    A picture's name stands under ``image``, ``path``, ``key`` or the like, its caption under ``caption`` or ``text``;
    of several, as `vlm caption` writes them, the first counts: of a list under ``captions``, of texts or of objects
    with a ``caption``, and of rows with a ``rank`` that of rank 1, which comes first. A caption may be empty. Raises
    DataError naming the row where a picture comes twice or a row can't be read.
    """
    captions: dict[str, str] = {}
    seen: dict[str, int] = {}
    further, problems = 0, Problems()
    for number, row in table_rows(_table(path), problems, names=NAMES):
        name = _name(row, path, number)
        texts = _texts(row, path, number)
        if name in seen:
            if str(row.get("rank", "1")) == "1":
                raise DataError(f"{path}, row {number}: {name} has a caption in row {seen[name]} already; keep one")
            further += 1
            continue
        captions[name], seen[name] = next(iter(texts), ""), number
        further += max(0, len(texts) - 1)
    _check(problems, path)
    if not captions:
        raise DataError(f"{path}: holds no captions; expected one row for each picture")
    return captions, further


def read_references(path: Path) -> References:
    """References from JSON lines or a table: a caption a row, or a list of them; rows of one picture add up.

    Raises DataError naming the row that can't be read.
    """
    captions: dict[str, list[str]] = {}
    problems = Problems()
    for number, row in table_rows(_table(path), problems, names=NAMES):
        captions.setdefault(_name(row, path, number), []).extend(_texts(row, path, number))
    _check(problems, path)
    if not captions:
        raise DataError(f"{path}: holds no references; expected pictures with captions")
    return References(str(path), captions)


def source_references(source: Source) -> References:
    """The captions of pictures with texts, by key; pictures of one concept hang together."""
    if len(set(source.keys)) < len(source):
        raise DataError(f"{source.name}: holds several pictures of one name, so captions can't be told apart")
    captions = {key: source.meta(number)["captions"] for number, key in enumerate(source.keys)}
    return References(source.name, captions, list(source.concepts))


def evaluate_captions(
    predictions: Mapping[str, str],
    references: References,
    *,
    name: str = "",
    missing: str = "error",
    draws: int = 2000,
    seed: int = 0,
) -> CaptionReport:
    """BLEU-1 to 4, ROUGE-L and CIDEr-D of captions, with 95 % bootstrap intervals.

    Names are matched behind the references' own name where some stand so (``FOLDER/cat.png`` for a folder's
    ``cat.png``), else as they are, else as in a shard (``SHARD.tar:KEY.png``) with or without ending, else as file
    names with or without ending: by the first of these that matches the most pictures and tells all apart.
    CIDEr-D's weights are those of the pictures that are scored, also inside the bootstrap; it is left out for a
    single picture.

    Args:
        predictions: by picture, one caption each.
        references: what they are compared with.
        name: of the predictions, for the report.
        missing: pictures without a caption: ``error``, ``skip`` them, or count an ``empty`` caption.
        draws: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        DataError: no picture is in both, or some lack a caption or a reference with a word.
    """
    if missing not in MISSING:
        raise ConfigError(f"missing {missing!r}{nearest(missing, MISSING)}: expected one of {', '.join(MISSING)}")
    own = _match(predictions, references)
    lacking = [key for key in references.captions if key not in own]
    if lacking and missing == "error":
        raise DataError(
            f"{name or 'predictions'}: {len(lacking)} of {len(references.captions)} pictures of {references.name} have "
            f"no caption, such as {lacking[0]}; write them, or choose --missing skip or empty"
        )
    keys = [key for key in references.captions if key in own or missing == "empty"]
    captions = [own.get(key, "") for key in keys]
    words = [caption_words(caption) for caption in captions]
    texts = [_wordy(key, references) for key in keys]
    groups = None
    if references.groups is not None:
        concept = dict(zip(references.captions, references.groups, strict=True))
        groups = np.array([concept[key] for key in keys])
    figures, scores = _figures(words, texts, groups, draws, seed)
    pictures = [
        {"image": key, "caption": caption, "references": list(references.captions[key])}
        | {measure: float(values[number]) for measure, values in scores.items()}
        for number, (key, caption) in enumerate(zip(keys, captions, strict=True))
    ]
    left_out = {
        "pictures without a caption": 0 if missing == "empty" else len(lacking),
        "pictures whose missing caption counts as empty": len(lacking) if missing == "empty" else 0,
        "captions of pictures that aren't in the references": len(predictions) - len(own),
    }
    found = {reason: count for reason, count in left_out.items() if count}
    return CaptionReport(name, references.name, figures, pictures, found)


def _figures(
    words: list[list[str]], texts: list[list[list[str]]], groups: np.ndarray | None, draws: int, seed: int
) -> tuple[dict[str, Figure], dict[str, np.ndarray]]:
    """Figures by measure, and the scores of each picture."""
    # Captions handed round one place: what a caption gets from the references of another picture.
    foreign = words[1:] + words[:1]
    counts = bleu_counts(words, texts)
    low, high = bootstrap_sums(counts, bleu, groups=groups, draws=draws, seed=seed)
    own, chance = (bleu(rows.sum(axis=0)) for rows in (counts, bleu_counts(foreign, texts)))
    figures = {
        measure: Figure(float(own[n]), float(low[n]), float(high[n]), float(chance[n]), len(words))
        for n, measure in enumerate(BLEU)
    }
    scores = {BLEU[-1]: np.array([bleu(row)[-1] for row in counts])}
    for measure, score in ((ROUGE, rouge_l), (CIDER, cider_d)):
        if measure == CIDER and len(words) < 2:
            logger.warning("%s needs at least 2 pictures and is left out", CIDER)
            continue
        scores[measure] = values = score(words, texts)
        interval = bootstrap(values, groups=groups, draws=draws, seed=seed)
        figures[measure] = Figure(float(values.mean()), *interval, float(score(foreign, texts).mean()), len(words))
    return figures, scores


_SHARD = re.compile(r"^.*\.(?:tar|tgz|tar\.gz):")
_NAMINGS: tuple[Callable[[str], str], ...] = (
    lambda name: name,
    lambda name: _SHARD.sub("", name),
    lambda name: str(PurePosixPath(_SHARD.sub("", name)).with_suffix("")),
    lambda name: PurePosixPath(name).name,
    lambda name: PurePosixPath(name).stem,
)
"""How pictures may be called in both: as they are, inside a shard, and that without ending, as keys are; by file."""


def _match(predictions: Mapping[str, str], references: References) -> dict[str, str]:
    """Captions by the references' names."""
    # A folder's pictures have the names that they have in it.
    inside = {f"{references.name}/{key}": key for key in references.captions}
    found = {key: predictions[name] for name, key in inside.items() if name in predictions}
    if found:
        return found  # a looser naming could take another folder's picture
    for plain in _NAMINGS:
        theirs = {plain(key): key for key in references.captions}
        ours = {plain(key): text for key, text in predictions.items()}
        if len(theirs) < len(references.captions) or len(ours) < len(predictions):
            break  # two pictures would be one
        matched = {key: ours[short] for short, key in theirs.items() if short in ours}
        found = matched if len(matched) > len(found) else found
    if not found:
        raise DataError(
            f"no picture is both in the predictions (such as {next(iter(predictions))}) and in {references.name} "
            f"(such as {next(iter(references.captions))}); name pictures alike in both"
        )
    return found


def _wordy(key: str, references: References) -> list[list[str]]:
    """The words of a picture's references that have some."""
    found = [words for text in references.captions[key] if (words := caption_words(text))]
    if not found:
        raise DataError(f"{references.name}: no reference for {key} holds a word; write one or drop the picture")
    return found


def _table(path: Path) -> Path:
    if path.suffix.lower() not in TABLES:
        raise DataError(f"{path}: expected a file that ends in {', '.join(TABLES)}")
    return path


def _name(row: Mapping[str, Any], path: Path, number: int) -> str:
    name = row["image"]
    if not isinstance(name, str | int) or not str(name).strip():
        raise DataError(f"{path}, row {number}: no picture is named, expected one under {' or '.join(NAMES)}")
    return Path(str(name).strip()).as_posix()


def _texts(row: Mapping[str, Any], path: Path, number: int) -> list[str]:
    found = next((row[column] for column in CAPTION_COLUMNS if row.get(column) is not None), None)
    listed = [found] if isinstance(found, str) else found
    texts = (
        [one.get("caption") if isinstance(one, dict) else one for one in listed] if isinstance(listed, list) else None
    )
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{path}, row {number}: no caption, expected a text under {' or '.join(CAPTION_COLUMNS)}")
    return texts


def _check(problems: Problems, path: Path) -> None:
    if problems.total:
        raise DataError(f"{path}: {problems.summary()}")
