"""What the text tower's start from MiniLM is worth: the same short training from it and from random numbers.

Trains the packaged `tiny` recipe for equal steps, seeds, data and order with each start, then measures both on
what neither saw; writes start_of_text.json and start_of_text.md to results/. Runs in --work can be resumed:
a finished one is measured, an unfinished one goes on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from evaluate_clip import JOBS, markdown, run_job
from measure import machine, versions, write_results

from vlm.apps.common import percent

HERE = Path(__file__).resolve().parent
STARTS = {
    "minilm": [],
    # From random numbers nothing may stay frozen, and the whole tower learns at the full rate.
    "random": ["start=[]", "train.optim.freeze=[]", "train.optim.lr_scale={}"],
}
ARTIST, CONCEPT, CLIP_ART = "unseen artist, no flags", "unseen concept", "clip art, galleries of 500"
COLUMNS = {
    "unseen artist top-1": (ARTIST, "top-1"),
    "top-5": (ARTIST, "top-5"),
    "unseen concept top-1": (CONCEPT, "top-1"),
    "top-5 ": (CONCEPT, "top-5"),
    "clip art: text to image R@5": (CLIP_ART, "recall", "text_to_image", "R@5"),
    "image to text R@5": (CLIP_ART, "recall", "image_to_text", "R@5"),
}


def train(run: Path, settings: list[str]) -> None:
    """Train, or go on with, one run."""
    command = [sys.executable, "-m", "vlm.apps.cli", "train", "clip", "--out", str(run)]
    rest = ["--resume"] if (run / "config.yaml").is_file() else ["--config", "tiny", *settings]
    subprocess.run([*command, *rest], check=True)


def figure_at(jobs: dict[str, Any], path: tuple[str, ...]) -> dict[str, float]:
    """The figure that names lead to, from outside in."""
    found: Any = jobs
    for name in path:
        found = found[name]
    return dict(found)


def main() -> None:
    """Train, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--work", type=Path, default=Path("runs"), help="where runs go")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    found, rows = [], []
    for seed in options.seeds:
        for start, changes in STARTS.items():
            run = options.work / f"start-{start}-{options.steps}-{seed}"
            settings = [f"train.steps={options.steps}", f"train.seed={seed}", f"train.precision={options.precision}"]
            if not (run / "model" / "config.json").is_file():
                train(run, [*settings, *changes])
            jobs = {name: run_job(JOBS[name], str(run)) for name in (ARTIST, CONCEPT, CLIP_ART)}
            found.append({"start": start, "seed": seed, "settings": settings + changes, "jobs": jobs})
            rows.append([start, str(seed), *(percent(figure_at(jobs, path)) for path in COLUMNS.values())])
    seeds = " ".join(map(str, options.seeds))
    values = {
        "command": f"python benchmarks/start_of_text.py --steps {options.steps} --seeds {seeds} "
        f"--precision {options.precision}",
        "machine": machine("cpu"),
        "versions": versions("torch", "timm"),
        "runs": found,
    }
    text = markdown(["text starts from", "seed", *COLUMNS], rows)
    write_results(options.out, "start_of_text", values, text)


if __name__ == "__main__":
    main()
