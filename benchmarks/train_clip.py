"""Training speed of our CLIP against open_clip's: samples per second of whole steps, and peak memory.

Both have the same shape, batch, captions and optimiser, and take turns on the same samples in one process.
Ours runs the engine's own step and pads texts to the longest of a batch from length buckets, as in training;
open_clip pads to 77 tokens and uses its own loss, as in its training. See README.md here.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clip_sides import (
    CONTEXT,
    PRESETS,
    Shape,
    count,
    make_material,
    open_clip_network,
    open_clip_side,
    our_network,
    our_side,
)
from measure import listed, machine, median_interval, peak_mb, timed, versions, write_results

RESULTS = Path(__file__).resolve().parent / "results"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure memory of each side in a process of its own, then speed in turns, and write the results."""
    options = parse(arguments)
    if options.side:
        print(json.dumps(measure_memory(options)))
        return
    memory = {side: memory_of(side, options) for side in ("ours", "open_clip")}
    words = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "benchmarks/train_clip.py", *words])
    result = {"command": command} | measure_speed(options) | {"memory": memory}
    name = options.name or f"train_clip-{options.preset}-{result['device']}"
    write_results(options.out, name, result, markdown(result))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tiny")
    parser.add_argument("--rounds", type=int, default=9, help="times that each side has its turn")
    parser.add_argument("--steps", type=int, default=4, help="steps in a turn")
    parser.add_argument("--batch", type=int, default=0, help="0 for the preset's")
    parser.add_argument("--data", default="human-train,web-train", help="source of the captions")
    parser.add_argument("--captions", type=Path, help="text file, a caption a line, instead of --data")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of torch, 0 for its own choice")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", help="file name of the results, without its ending")
    parser.add_argument("--side", choices=["ours", "open_clip"], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name in ("rounds", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return options


def memory_of(side: str, options: argparse.Namespace) -> dict[str, float]:
    """Peak memory of a side's training, from a process that does nothing else."""
    command = [sys.executable, str(Path(__file__).resolve()), "--side", side, "--preset", options.preset]
    command += ["--batch", str(options.batch), "--data", options.data, "--device", options.device]
    command += ["--precision", options.precision, "--threads", str(options.threads)]
    command += ["--steps", str(options.steps)]
    command += ["--captions", str(options.captions)] if options.captions else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side}: measuring memory failed\n{done.stderr}")
    values: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return values


def measure_memory(options: argparse.Namespace) -> dict[str, float]:
    """MB at the peak of some steps, and before the first, when network and optimiser stand."""
    import torch

    shape = prepare(options)
    material = make_material(options, shape, batches=options.steps)
    step = (our_side if options.side == "ours" else open_clip_side)(options, shape, material)
    before = peak_mb(options.device)
    if options.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    for number in range(options.steps):
        step(number)
    return {"before_mb": before, "peak_mb": peak_mb(options.device)}


def prepare(options: argparse.Namespace) -> Shape:
    """Set seed and threads; the preset with the batch asked for."""
    import torch

    torch.manual_seed(0)
    if options.threads:
        torch.set_num_threads(options.threads)
    shape = PRESETS[options.preset]
    return Shape(**asdict(shape) | {"batch": options.batch or shape.batch})


def measure_speed(options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of both sides on the same batches; who goes first alternates."""
    import torch

    shape = prepare(options)
    material = make_material(options, shape, batches=options.steps * options.rounds)
    sides = {
        "ours": our_side(options, shape, material),
        "open_clip": open_clip_side(options, shape, material),
    }
    for step in sides.values():  # warm-up, with the widest memory of both
        step(0)
        step(0)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(options.rounds):
        numbers = range(turn * options.steps, (turn + 1) * options.steps)
        for name in sorted(sides, reverse=bool(turn % 2)):
            seconds[name].append(timed(sides[name], numbers, options.device))
    samples = shape.batch * options.steps
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["open_clip"], strict=True)]
    real = [int(batch.tokens.attention_mask.sum()) / len(batch) for batch in material.ours]
    return {
        "preset": options.preset,
        "shape": asdict(shape),
        "device": torch.device(options.device).type,
        "machine": machine(options.device),
        "threads": torch.get_num_threads(),
        "precision": options.precision,
        "versions": versions("torch", "timm", "open_clip_torch"),
        "parameters": {"ours": count(our_network(shape)), "open_clip": count(open_clip_network(shape))},
        "tokens": {
            "real": statistics.fmean(real),
            "ours": statistics.fmean(batch.tokens.input_ids.shape[1] for batch in material.ours),
            "open_clip": CONTEXT,
        },
        "rounds": options.rounds,
        "steps_of_a_round": options.steps,
        "seconds": seconds,
        "samples_per_second": {name: samples / statistics.median(took) for name, took in seconds.items()},
        "ratio": {"each": ratios} | median_interval(ratios),
    }


def markdown(result: dict[str, Any]) -> str:
    """The result as a small page."""
    shape, ratio, tokens = result["shape"], result["ratio"], result["tokens"]
    rows = [
        (
            label,
            f"{result['samples_per_second'][side]:.1f}",
            f"{result['memory'][side]['peak_mb']:,.0f}",
            f"{result['memory'][side]['peak_mb'] - result['memory'][side]['before_mb']:,.0f}",
            f"{tokens[side]:.1f}",
            f"{result['parameters'][side]:,}",
        )
        for side, label in (("ours", "vlm"), ("open_clip", "open_clip"))
    ]
    lines = [
        f"# CLIP training step, `{result['preset']}`, batch {shape['batch']}, {result['precision']}",
        "",
        "| | samples/s | peak memory, MB | of it in the steps, MB | text length | parameters |",
        "|---|---|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        f"vlm is **{ratio['median']:.2f}** times as fast (median of {result['rounds']} rounds in turns of "
        f"{result['steps_of_a_round']} steps; {100 * ratio['coverage']:.0f} % interval {ratio['low']:.2f} to "
        f"{ratio['high']:.2f}). A caption has {tokens['real']:.1f} real tokens on average.",
        "",
        f"{result['machine']}, {result['threads']} threads; " + listed(result["versions"]) + ".",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
