"""How good are captions? `vlm caption` by beam and nucleus search on drawings that no training saw, then their scores.

Runs `vlm caption` and `vlm eval captions` on a model and writes NAME.json (each figure with its interval, what captions
of other pictures get, and both commands) and NAME.md (a table) to results/.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluate_clip import markdown
from measure import machine, versions, write_results
from typer.testing import CliRunner

from vlm.apps.common import percent

HERE = Path(__file__).resolve().parent
SHARDS = {"web-test": "data/web-test-*.tar.gz", "human-train": "data/human-train-00003.tar.gz"}
"""Places of the pictures, from the repository's root; the second is training pictures, to compare with."""
SEARCHES = {"beams 3": "--strategy beam --beams 3", "nucleus 0.9": "--strategy nucleus --top-p 0.9"}
SHOWN = ("BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr-D")


def run_job(model: str, data: str, search: str) -> dict[str, Any]:
    """Captions of one data set, and the report of their scores, with both commands in it."""
    with tempfile.TemporaryDirectory() as folder:
        said, report = Path(folder) / "said.jsonl", Path(folder) / "report"
        place = HERE.parent / SHARDS[data]
        caption = f"caption {{}} --model {model} {SEARCHES[search]} --max-new-tokens 12 --output {{}}"
        score = f"eval captions {{}} --data {data} --missing skip --out {{}}"
        _vlm(caption.format(place, said))
        _vlm(score.format(said, report))
        found: dict[str, Any] = json.loads((report / "report.json").read_text("utf-8"))
    commands = [f"vlm {caption.format(SHARDS[data], 'said.jsonl')}", f"vlm {score.format('said.jsonl', 'report')}"]
    return {"commands": commands, "data": data, "search": search} | found | {"predictions": "said.jsonl"}


def _vlm(command: str) -> None:
    from vlm.apps.cli import app

    result = CliRunner().invoke(app, command.split(), catch_exceptions=False)
    if result.exit_code:
        sys.exit(f"vlm {command}: {result.output}")


def rows(jobs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A row for each data set and search: figures, then CIDEr-D of captions of other pictures."""
    found = []
    for job in jobs:
        figures = job["figures"]
        shown = [percent(figures[name]) for name in SHOWN]
        found.append(
            [job["data"], job["search"], str(job["pictures"]), *shown, f"{100 * figures['CIDEr-D']['chance']:.1f}"]
        )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="tiny-blip", help="anything that vlm.load takes")
    parser.add_argument("--data", nargs="*", default=list(SHARDS), choices=list(SHARDS))
    parser.add_argument("--name", default="", help="of the files; captions-MODEL by default")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args(arguments)
    jobs = [run_job(options.model, data, search) for data in options.data for search in SEARCHES]
    values = {
        "command": f"python benchmarks/captions.py --model {options.model}",
        "machine": machine("cpu"),
        "versions": versions("torch", "timm"),
        "jobs": jobs,
    }
    header = ["data", "search", "pictures", *(f"{name} x 100" for name in SHOWN), "CIDEr-D of another picture x 100"]
    write_results(
        options.out, options.name or f"captions-{Path(options.model).name}", values, markdown(header, rows(jobs))
    )


if __name__ == "__main__":
    main()
