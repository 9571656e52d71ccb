"""Does a model's heat point at what the text names? `vlm eval pointing` by each of its methods, on several sets.

Writes NAME.json (each figure with its interval and command, beside random weights') and NAME.md to results/.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluate_clip import markdown, run_job
from measure import machine, versions, write_results

from vlm.apps.common import percent

HERE = Path(__file__).resolve().parent
DATA = ("unseen-artist", "web-val", "human-train")


def rows(jobs: list[dict[str, Any]]) -> list[list[str]]:
    """A row for each data set and method: hits and heat, of the model and of random weights."""
    found = []
    for job in jobs:
        control = job["random weights"]
        figures = [job["hits"], control["hits"], job["heat"], control["heat"]]
        found.append([job["data"], job["method"], str(job["collages"]), *map(percent, figures)])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write."""
    import vlm
    from vlm.tasks.heat import methods

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="tiny-clip", help="anything that vlm.load takes")
    parser.add_argument("--data", nargs="*", default=list(DATA), help="sets that the collages are made of")
    parser.add_argument("--collages", type=int, default=300)
    parser.add_argument("--name", default="", help="of the files; pointing-MODEL by default")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args(arguments)
    jobs = [
        run_job(f"eval pointing -d {data} --collages {options.collages} --method {method}", options.model)
        for data in options.data
        for method in methods(vlm.load(options.model))
    ]
    words = sys.argv[1:] if arguments is None else arguments
    values = {
        "command": shlex.join(["python", "benchmarks/pointing.py", *words]),
        "machine": machine("cpu"),
        "versions": versions("torch", "timm"),
        "jobs": jobs,
    }
    header = ["data", "method", "collages", "hottest patch right, %", "with random weights"]
    header += ["heat in the right picture, %", "with random weights"]
    name = options.name or f"pointing-{Path(options.model).name}"
    write_results(options.out, name, values, markdown(header, rows(jobs)))


if __name__ == "__main__":
    main()
