"""What fewer bits of the language model's weights change in what a BLIP-2 says: loss of the same captions, and size.

The same trained Q-Former and projection before the language model held as fp32, int8 and nf4. See README.md here.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import listed, llm_mb, machine, versions, write_results

RESULTS = Path(__file__).resolve().parent / "results"
WEIGHTS = ("fp32", "bf16", "int8", "nf4")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each kind of weights, and write the results."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(words)
    result = {
        "command": shlex.join(["python", "benchmarks/blip2_bits.py", *words]), "model": options.model,
        "data": options.data, "device": options.device, "machine": machine(options.device),
        "versions": versions("torch", "transformers"), "runs": [measure(options, kind) for kind in options.weights],
    }  # fmt: skip
    name = options.name or f"blip2_bits-{Path(options.model).name}-{options.device.split(':')[0]}"
    write_results(options.out, name, result, markdown(result))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="tiny-blip2", help="a shipped second stage, or the folder of one")
    parser.add_argument("--data", default="web-test", help="pictures with captions, anything that vlm takes as data")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=["fp32", "int8", "nf4"])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch, 0 for its own choice")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", help="file name of the results, without its ending")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Loss a token and share of foreseen tokens of all captions, and the language model's bytes."""
    import torch

    from vlm.data.sources import open_source
    from vlm.tasks.language import evaluate_language
    from vlm.weights.load import load, run_model
    from vlm.weights.shipped import shipped_folder

    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "model"
        given = shipped_folder(options.model) or Path(options.model)
        shutil.copytree(run_model(given) or given, copy)
        settings = json.loads((copy / "config.json").read_text("utf-8"))
        settings["config"]["llm"]["weights"] = kind
        (copy / "config.json").write_text(json.dumps(settings), "utf-8")
        model = load(copy, device=options.device)
        report = evaluate_language(model, open_source(options.data))
    network: Any = model.network
    return {"weights": kind, "llm_mb": llm_mb(network.llm), **report.figures(), "tokens": report.tokens}


def markdown(result: dict[str, Any]) -> str:
    """The result as a small page."""
    lines = [
        f"# `{result['model']}` on `{result['data']}`, its language model in fewer bits, {result['device']}",
        "",
        "| language model's weights | language model, MB | loss a token | next tokens foreseen, % |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {run['weights']} | {run['llm_mb']:,.0f} | {run['lm_loss']:.3f} | {100 * run['lm_accuracy']:.1f} |"
        for run in result["runs"]
    ]
    lines += [
        "",
        f"The same {result['runs'][0]['tokens']:,} tokens of captions, in nats. {result['machine']}; "
        + listed(result["versions"]) + ".",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
