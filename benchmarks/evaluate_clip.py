"""What a CLIP of ours recognises on data that it never saw: every figure that README and model card quote.

Runs the `vlm eval` commands of JOBS on a model, one after the other, and writes NAME.json (each figure with its
interval, chance value and command) and NAME.md (tables) to results/.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import machine, versions, write_results
from typer.testing import CliRunner

from vlm.apps.common import percent

HERE = Path(__file__).resolve().parent
JOBS: dict[str, str] = {
    "unseen artist": "eval zero-shot -d unseen-artist",
    "unseen artist, no flags": "eval zero-shot -d unseen-artist --no-flags",
    "unseen concept": "eval zero-shot -d unseen-concept",
    "training pictures": "eval zero-shot -d human-train",
    "clip art, galleries of 500": "eval retrieval -d web-test --distractors web-val --gallery 500",
    "prompts": "eval prompts -d unseen-artist --no-flags --sets none,drawing,drawings,imagenet",
}


def run_job(command: str, model: str) -> dict[str, Any]:
    """The report of one `vlm` command, with the command in it."""
    from vlm.apps.cli import app

    with tempfile.TemporaryDirectory() as folder:
        result = CliRunner().invoke(app, [*command.split(), "-m", model, "-o", folder], catch_exceptions=False)
        if result.exit_code:
            sys.exit(f"vlm {command} -m {model}: {result.output}")
        report = json.loads((Path(folder) / "report.json").read_text("utf-8"))
    return {"command": f"vlm {command} -m {model}"} | report


def figure_rows(jobs: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Rows of the table of figures: data, measure, figure, chance, times chance."""
    rows = []
    for name, job in jobs.items():
        found = {measure: figure for measure, figure in job.items() if measure.startswith("top-")}
        for way, at in job.get("recall", {}).items():
            found |= {f"{way.replace('_', ' ')} {measure}": figure for measure, figure in at.items()}
        for measure, figure in found.items():
            times = figure["value"] / figure["chance"]
            rows.append([name, measure, percent(figure), f"{100 * figure['chance']:.2f}", f"{times:.0f}"])
    return rows


def prompt_rows(job: dict[str, Any]) -> list[list[str]]:
    """Rows of the table of template sets."""
    first = job["rows"][0]["templates"]
    measures = [name for name in job["rows"][0] if name.startswith("top-") and "against" not in name]
    return [
        [row["templates"], str(row["count"])]
        + [text for name in measures for text in (percent(row[name]), percent(row[f"{name} against {first}"]))]
        for row in job["rows"]
    ]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="tiny-clip", help="anything that vlm.load takes")
    parser.add_argument("--name", default="", help="of the files; the model's own by default")
    parser.add_argument("--only", nargs="*", default=list(JOBS), choices=list(JOBS), help="jobs to run")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    jobs = {name: run_job(JOBS[name], options.model) for name in options.only}
    name = options.name or Path(options.model).name
    values = {
        "command": f"python benchmarks/evaluate_clip.py --model {options.model}",
        "machine": machine("cpu"),
        "versions": versions("torch", "timm"),
        "jobs": jobs,
    }
    text = markdown(["data", "measure", "% [95 % interval]", "chance %", "times chance"], figure_rows(jobs))
    if "prompts" in jobs:
        header = ["templates", "count", "top-1 %", "against none", "top-5 %", "against none"]
        text += "\n" + markdown(header, prompt_rows(jobs["prompts"]))
    write_results(options.out, name, values, text)


if __name__ == "__main__":
    main()
