"""The stages beside each other on data that none of them saw: zero-shot, retrieval with and without re-ranking, ITM.

Runs `vlm eval` commands on the model of each stage and writes stages.json (each figure with its interval, chance
value and command) and stages.md (a table) to results/, or under another name.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from evaluate_clip import HERE, markdown, run_job
from measure import machine, versions, write_results

from vlm.apps.common import percent

NAME = "stages"
SMALL = "eval retrieval -d web-test --gallery 100 --galleries 3"
LARGE = "eval retrieval -d web-test --distractors web-val --gallery 500 --galleries 3"
ZERO_SHOT = {
    "unseen artist, no flags": "eval zero-shot -d unseen-artist --no-flags",
    "unseen concept": "eval zero-shot -d unseen-concept",
}
MATCHING = {"own text or a foreign one": "eval matching -d web-test"}


def jobs_of(family: str) -> dict[str, str]:
    """What a family can be asked, by the rows of the table."""
    if family == "clip":
        return ZERO_SHOT | {"clip art, 100": SMALL, "clip art, 500": LARGE}
    if family == "vilt":  # it runs the whole network on each pair: a gallery of 500 is 250,000 of them
        return MATCHING | {"clip art, 100": SMALL}
    reranked = {
        "clip art, 100": f"{SMALL} --rerank 100 --score itm",
        "clip art, 500": f"{LARGE} --rerank 64 --score itm",
    }
    return ZERO_SHOT | MATCHING | reranked


def rows_of(stage: str, jobs: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Rows of the table: stage, data, measure, figure, chance."""
    rows = []
    for name, job in jobs.items():
        found = {measure: figure for measure, figure in job.items() if measure.startswith("top-")}
        found |= {measure: job[measure] for measure in ("accuracy", "order") if measure in job}
        found |= _recall(job, f"by {job.get('score', '').upper()}")
        if "rerank" in job:
            found |= _recall(job["rerank"], f"{job['rerank']['k']} re-ranked by ITM")
        rows += [
            [stage, name, measure, percent(figure), f"{100 * figure['chance']:.2f}"]
            for measure, figure in found.items()
        ]
    return rows


def _recall(job: dict[str, Any], how: str) -> dict[str, Any]:
    return {
        f"{way.replace('_', ' ')} {measure}, {how}": figure
        for way, at in job.get("recall", {}).items()
        for measure, figure in at.items()
    }


def main() -> None:
    """Measure and write."""
    import vlm

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="+", help="one for each stage: anything that vlm.load takes")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--name", default=NAME, help="file name of the results, without its ending")
    options = parser.parse_args()
    named = ["--name", options.name] if options.name != NAME else []
    families: dict[str, tuple[str, str]] = {}
    for place in options.models:
        model = vlm.load(place, device="cpu")
        if model.name in families:
            sys.exit(f"{place}: a second model called {model.name!r}; give it another name in its config.json")
        families[model.name] = (place, model.family)
    found: dict[str, Any] = {}
    rows: list[list[str]] = []
    for name, (place, family) in families.items():
        found[name] = {data: run_job(job, place) for data, job in jobs_of(family).items()}
        rows += rows_of(name, found[name])
        values = {
            "command": shlex.join(["python", "benchmarks/evaluate_stages.py", *options.models, *named]),
            "machine": machine("cpu"),
            "versions": versions("torch", "timm"),
            "stages": found,
        }
        header = ["model", "data", "measure", "% [95 % interval]", "chance %"]
        write_results(options.out, options.name, values, markdown(header, rows))  # what a later failure must leave


if __name__ == "__main__":
    main()
