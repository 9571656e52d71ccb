"""CapFilt from end to end, in the order of BLIP's figure 3; each step goes on where it was stopped."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm.data.sources import Source, open_source
from vlm.errors import ConfigError, DataError
from vlm.files import held_alone, visible_names, write_text
from vlm.models.blip import BlipConfig
from vlm.tasks.capfilt.check import Exchanged, score_exchanged
from vlm.tasks.capfilt.engines import check_ray, run_units
from vlm.tasks.capfilt.identity import settle, weights_digest
from vlm.tasks.capfilt.judge import Judge, need_heads
from vlm.tasks.capfilt.page import as_page
from vlm.tasks.capfilt.report import as_markdown, tally
from vlm.tasks.capfilt.reuse import check_earlier
from vlm.tasks.capfilt.settings import CapfiltConfig, Execution
from vlm.tasks.capfilt.training import HEADS, Evaluation, Part, pretraining, train_once, tuning
from vlm.tasks.capfilt.units import Unit, find_units
from vlm.tasks.capfilt.work import BEGUN, DATA, EXCHANGED, JUDGED, Job, open_sets, record_path
from vlm.train.distributed import Ranks
from vlm.train.run import RunConfig
from vlm.weights.files import CONFIG
from vlm.weights.load import load
from vlm.weights.loaded import VisionLanguageModel

logger = logging.getLogger("vlm.capfilt")

Progress = Callable[[int, int], None]
"""Called with pictures done and pictures in all whenever a shard is written."""
NAMES = (
    *("web", "human", "check", "model", "captioner", "judge", "judged"),
    *("captioner_training", "judge_training", "tune"),
)
"""Settings of which the content counts, not the name."""
START = "start"
"""Folder of the pre-trained model that captioner and filter are made of."""
LAST = ("training", "pretrain")
"""Settings of the new model, which comes last."""
SHOWN = 24
"""Pictures on the page."""


@dataclass(frozen=True)
class Result:
    """Where CapFilt's results lie."""

    report: dict[str, Any]
    data: Path
    """Folder of the new shards, for `open_source`."""
    model: Path | None
    """The new model's folder; None where it was left out."""


def run_capfilt(
    config: CapfiltConfig,
    out: Path,
    here: Ranks,
    *,
    how: Execution = Execution(),  # noqa: B008 (frozen)
    pretrain: bool = True,
    evaluation: Evaluation | None = None,
    progress: Progress | None = None,
) -> Result:
    """Run all steps into the folder `out`, or what is left of them (BLIP §3.3).

    Args:
        config: what the result depends on.
        out: ``captioner`` and ``filter`` (runs), ``data`` (shards), ``judged`` (all texts with their scores),
            ``exchanged.json`` (the filter's scores of exchanged texts), ``report.json``, ``report.md``,
            ``report.html``, ``pretrained`` (run of the new model).
        here: from `vlm.train.distributed.ranks`; a single rank.
        how: engine, batch size, workers, device.
        pretrain: whether to train a new model on the result.
        evaluation: what is measured on validation sets while models train.
        progress: told of each shard.

    Raises:
        ConfigError: a setting, a set or weights are others than when `out` was begun, each named; or `out` holds other
            files.
        MissingVerbError: a model lacks the head, which is named.
        DataError: another process works in `out`, or `config.judged` isn't finished; and like WeightsError and
            TrainingError as the message says.
    """
    if here.count > 1:
        raise ConfigError("CapFilt runs as one process; for several machines or GPUs use engine ray")
    if how.engine == "ray":
        check_ray()
    new = pretraining(config, out / DATA) if pretrain else None  # a wrong setting shows before the work
    if config.judged and Path(config.judged).resolve() == out.resolve():
        raise ConfigError(f"{out}: can't take texts from itself; choose another folder, or leave capfilt.judged out")
    _check_out(out)
    sources = open_sets(config)
    with held_alone(out):
        _sweep(out)
        units = find_units(sources, config.shard_samples)
        start = _begin(config, out, sources)
        if config.judged:
            captioner = judge = ""
            _take(config, out, start, units)
        else:
            captioner, judge = _tune(config, out, start, here, evaluation)
        job = Job(config, out, captioner, judge, how.batch_size, how.device, how.workers)
        _work(job, units, sources, how, progress)
        report = _report(job, units, sources)
        if new is None:
            return Result(report, out / DATA, None)
        settle(out / "pretrained.json", {"training": replace(new, data=())}, what="the new model")
        return Result(report, out / DATA, train_once(new, out / "pretrained", here, evaluation))


@dataclass(frozen=True)
class _Start:
    """Captioner and filter before anything is done."""

    wanted: dict[Part, str]
    """What was given for each; no captioner where no texts are written."""
    models: dict[Part, VisionLanguageModel]
    """Those that were given, and the pre-trained model for those that are made here."""
    runs: dict[Part, RunConfig[BlipConfig]]
    """Fine-tunings of those that are made here."""
    began: dict[str, Any]
    """What the folder's content depends on, as far as it is named."""


def _check_out(out: Path) -> None:
    """Raises ConfigError for a folder of something else, such as one of the sets."""
    if not out.is_dir():
        return
    try:
        names = visible_names(out)
    except OSError as problem:
        raise DataError(f"{out}: can't be read ({problem.strerror or problem}); choose another folder") from problem
    if names and BEGUN not in names:
        raise ConfigError(
            f"{out}: holds other files (such as {names[0]}) and no CapFilt that was begun; choose a new or empty folder"
        )


def _begin(config: CapfiltConfig, out: Path, sources: dict[str, Source]) -> _Start:
    """Look at all that was named; nothing is written, so that a refusal leaves the folder free for other settings."""
    wanted: dict[Part, str] = {"captioner": config.captioner, "filter": config.judge}
    if not config.synthetic:
        del wanted["captioner"]
    models = {part: load(given, device="cpu") for part, given in wanted.items() if given}
    missing = [part for part in wanted if part not in models] if config.model else []
    settings = {name: value for name, value in vars(config).items() if name not in (*NAMES, *LAST)}
    began: dict[str, Any] = {"settings": settings, "data": _fingerprints(config, sources)}
    runs = {}
    if missing:
        first = load(config.model, device="cpu")
        need_heads(first, *(head for part in missing for head in HEADS[part]))
        models |= dict.fromkeys(missing, first)
        runs = {part: tuning(config, part, first, out / START) for part in missing}
        began["model"] = weights_digest(first.network)
        began["training"] = {part: replace(run, start=(), data=()) for part, run in runs.items()}
    for part, model in models.items():
        need_heads(model, *HEADS[part])
    if "captioner" in models:
        _check_length(models["captioner"], config)
    return _Start(wanted, models, runs, began)


def _tune(
    config: CapfiltConfig, out: Path, start: _Start, here: Ranks, evaluation: Evaluation | None
) -> tuple[str, str]:
    """Step 1: folders of captioner (empty where none is wanted) and filter, made here unless they were given."""
    settle(out / BEGUN, start.began, what="this CapFilt")
    if start.runs and not (out / START / CONFIG).is_file():
        start.models[next(iter(start.runs))].save(out / START)
    made = {part: str(train_once(run, out / part, here, evaluation)) for part, run in start.runs.items()}
    places = start.wanted | made
    models = start.models | {part: load(place, device="cpu") for part, place in made.items()}
    settle(out / "models.json", {part: weights_digest(models[part].network) for part in places}, what="the texts")
    return places.get("captioner", ""), places["filter"]


def _take(config: CapfiltConfig, out: Path, start: _Start, units: list[Unit]) -> None:
    """Step 1 where an earlier folder's texts and scores are taken: make sure that they are the ones wanted here."""
    given: dict[str, str] = {
        part: weights_digest(start.models[part].network) for part, name in start.wanted.items() if name
    }
    models = check_earlier(config, start.began, given, units)
    settle(out / BEGUN, start.began, what="this CapFilt")
    settle(out / "models.json", {part: models.get(part) for part in start.wanted}, what="the texts")
    if not (out / EXCHANGED).is_file():
        write_text(out / EXCHANGED, (Path(config.judged) / EXCHANGED).read_text("utf-8"))


def _check_length(captioner: VisionLanguageModel, config: CapfiltConfig) -> None:
    """Raises ConfigError where the captioner can't write texts as long as they may be."""
    network: Any = captioner.network
    given, limit = 1 + len(network.config.prompt_ids), network.config.text.context_length
    if given + config.generation.max_new_tokens > limit:
        raise ConfigError(
            f"{captioner.name}: {given} tokens and max_new_tokens {config.generation.max_new_tokens} are more than its "
            f"texts can have, {limit}; lower max_new_tokens"
        )


def _work(job: Job, units: list[Unit], sources: dict[str, Source], how: Execution, progress: Progress | None) -> None:
    """Steps 2 to 4: caption, filter and write, shard by shard."""
    left = [unit for unit in units if not record_path(job.out, unit).is_file()]
    total = sum(unit.stop - unit.start for unit in units)
    done = total - sum(unit.stop - unit.start for unit in left)
    logger.info("%d of %d shards are left", len(left), len(units))
    if progress is not None:
        progress(done, total)
    for unit in run_units(job, left, sources, how):
        done += unit.stop - unit.start
        if progress is not None:
            progress(done, total)


def _report(job: Job, units: list[Unit], sources: dict[str, Source]) -> dict[str, Any]:
    """Step 5: what was kept, how good the filter is, and a page to look at."""
    config, out = job.config, job.out
    problems = {kind: source.problems for kind, source in sources.items()}
    found = tally(out, units, problems, seed=config.seed, shown=SHOWN)
    settings = {"threshold": config.threshold, "seed": config.seed, "generation": vars(config.generation)}
    switches = {"synthetic": config.synthetic, "filtering": config.filtering}
    taken = {"judged": config.judged} if config.judged else {}
    report = found.counts | {"filter": _filter_check(job, sources["human"]), "settings": settings | switches | taken}
    write_text(out / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_text(out / "report.md", as_markdown(report))
    write_text(out / "report.html", as_page(found.shown, sources["web"]))
    return report


def _filter_check(job: Job, human: Source) -> dict[str, Any]:
    """The filter on exchanged texts, which it scores once."""
    path, config = job.out / EXCHANGED, job.config
    if not path.is_file():
        source = open_source(config.check) if config.check else human
        judge: VisionLanguageModel = load(job.judge, device=job.device)
        scored = score_exchanged(
            Judge(judge), source, pictures=config.check_pictures, seed=config.seed, batch_size=job.batch_size,
            workers=job.workers,
        )  # fmt: skip
        known = {"trained_on": _trained_on(config)}
        write_text(path, json.dumps(vars(scored) | known, ensure_ascii=False) + "\n")
    found = json.loads(path.read_text("utf-8"))
    known = {"trained_on": found.pop("trained_on")}
    return Exchanged(**found).at(config.threshold).as_dict() | known


def _trained_on(config: CapfiltConfig) -> bool:
    """Whether the filter was fine-tuned here on what it is measured on."""
    return not config.judge and (not config.check or bool(set(config.check) & set(config.human)))


def _fingerprints(config: CapfiltConfig, sources: dict[str, Source]) -> dict[str, str]:
    found = {kind: source.fingerprint() for kind, source in sources.items()}
    if config.check:
        found["check"] = open_source(config.check).fingerprint()
    return found


def _sweep(out: Path) -> None:
    """Take away what a killed process left under temporary names."""
    for folder in (out, out / DATA, out / JUDGED):
        for path in folder.glob(".tmp-*"):
            if path.is_file():
                path.unlink()
