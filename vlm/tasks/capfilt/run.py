"""CapFilt from end to end, in the order of BLIP's figure 3; each step goes on where it was stopped."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm.data.sources import Source, open_source
from vlm.errors import ConfigError
from vlm.files import write_text
from vlm.tasks.capfilt.check import check_filter
from vlm.tasks.capfilt.engines import check_ray, run_units
from vlm.tasks.capfilt.identity import settle, weights_digest
from vlm.tasks.capfilt.judge import Judge, need_heads
from vlm.tasks.capfilt.page import as_page
from vlm.tasks.capfilt.report import as_markdown, tally
from vlm.tasks.capfilt.settings import CapfiltConfig, Execution
from vlm.tasks.capfilt.training import Evaluation, Part, pretraining, train_once, tuning
from vlm.tasks.capfilt.units import Unit, find_units
from vlm.tasks.capfilt.work import DATA, JUDGED, Job, record_path
from vlm.train.distributed import Ranks
from vlm.weights.files import CONFIG
from vlm.weights.load import load
from vlm.weights.loaded import VisionLanguageModel

logger = logging.getLogger("vlm.capfilt")

Progress = Callable[[int, int], None]
"""Called with pictures done and pictures in all whenever a shard is written."""
NAMES = ("web", "human", "check", "model", "captioner", "judge", "pretrain")
"""Settings of which the content counts, not the name, and one that comes after everything else."""
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
            ``report.json``, ``report.md``, ``report.html``, ``pretrained`` (run of the new model).
        here: from `vlm.train.distributed.ranks`; a single rank.
        how: engine, batch size, workers, device.
        pretrain: whether to train a new model on the result.
        evaluation: what is measured while that one trains.
        progress: told of each shard.

    Raises:
        ConfigError: a setting, a set or weights are others than when `out` was begun, each named.
        MissingVerbError: a model lacks the head, which is named.
        DataError, WeightsError, TrainingError: as their messages say.
    """
    if here.count > 1:
        raise ConfigError("CapFilt runs as one process; for several machines or GPUs use engine ray")
    if how.engine == "ray":
        check_ray()
    sources = {"web": open_source(config.web), "human": open_source(config.human)}
    _sweep(out)
    parts = _tune(config, out, here, sources)
    units = find_units(sources, config.shard_samples)
    job = Job(config, out, parts["captioner"], parts["judge"], how.batch_size, _device(how), how.workers)
    _work(job, units, sources, how, progress)
    report = _report(job, units, sources)
    if not pretrain:
        return Result(report, out / DATA, None)
    run = pretraining(config, out / DATA)
    settle(out / "pretrained.json", {"training": run}, what="the new model")
    return Result(report, out / DATA, train_once(run, out / "pretrained", here, evaluation))


def _tune(config: CapfiltConfig, out: Path, here: Ranks, sources: dict[str, Source]) -> dict[str, str]:
    """Step 1: folders of captioner (empty where none is wanted) and filter, made here unless they were given."""
    wanted: dict[Part, str] = {"captioner": config.captioner, "filter": config.judge}
    if not config.synthetic:
        del wanted["captioner"]
    missing: list[Part] = [part for part, given in wanted.items() if not given]
    settings = {name: value for name, value in vars(config).items() if name not in NAMES}
    began: dict[str, Any] = {"settings": settings, "data": _fingerprints(config, sources)}
    start = out / "start"
    runs = {}
    if missing:
        model = load(config.model, device="cpu")
        need_heads(model, *(["lm"] if "captioner" in missing else []), *(["itm"] if "filter" in missing else []))
        began["model"] = weights_digest(model.network)
        runs = {part: tuning(config, part, model, start) for part in missing}
        began["training"] = {part: replace(run, start=(), data=()) for part, run in runs.items()}
    settle(out / "capfilt.json", began, what="this CapFilt")
    if missing and not (start / CONFIG).is_file():
        model.save(start)
    made = {part: str(train_once(run, out / part, here)) for part, run in runs.items()}
    places = {part: made.get(part, given) for part, given in wanted.items()}
    models = {part: load(place, device="cpu") for part, place in places.items()}
    for part, one in models.items():
        need_heads(one, "lm" if part == "captioner" else "itm")
    digests = {str(part): weights_digest(one.network) for part, one in models.items()}
    settle(out / "models.json", digests, what="the texts")
    return {"captioner": places.get("captioner", ""), "judge": places["filter"]}


def _work(job: Job, units: list[Unit], sources: dict[str, Source], how: Execution, progress: Progress | None) -> None:
    """Steps 2 to 4: caption, filter and write, shard by shard."""
    left = [unit for unit in units if not record_path(job.out, unit).is_file()]
    total = sum(unit.stop - unit.start for unit in units)
    done = total - sum(unit.stop - unit.start for unit in left)
    logger.info("%d of %d shards are left to caption and filter", len(left), len(units))
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
    report = found.counts | {"filter": _filter_check(job, sources["human"]), "settings": settings | switches}
    write_text(out / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_text(out / "report.md", as_markdown(report))
    write_text(out / "report.html", as_page(found.shown, sources["web"]))
    return report


def _filter_check(job: Job, human: Source) -> dict[str, Any]:
    """The filter on exchanged texts; made once."""
    path, config = job.out / "filter.json", job.config
    if not path.is_file():
        source = open_source(config.check) if config.check else human
        judge: VisionLanguageModel = load(job.judge, device=job.device)
        check = check_filter(
            Judge(judge), source, threshold=config.threshold, pictures=config.check_pictures, seed=config.seed,
            batch_size=job.batch_size, workers=job.workers,
        )  # fmt: skip
        write_text(path, json.dumps(check.as_dict(), indent=1, ensure_ascii=False) + "\n")
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def _fingerprints(config: CapfiltConfig, sources: dict[str, Source]) -> dict[str, str]:
    found = {kind: source.fingerprint() for kind, source in sources.items()}
    if config.check:
        found["check"] = open_source(config.check).fingerprint()
    return found


def _device(how: Execution) -> str | None:
    return None if how.device == "auto" else how.device


def _sweep(out: Path) -> None:
    """Take away what a killed process left under temporary names."""
    for folder in (out, out / DATA, out / JUDGED):
        for path in folder.glob(".tmp-*"):
            if path.is_file():
                path.unlink()
