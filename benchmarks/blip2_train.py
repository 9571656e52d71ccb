"""Training speed and memory of BLIP-2's two stages, and what the language model's weights in fewer bits change.

Whole training steps of a recipe (forward, loss, backward, optimiser) on its own data, by the engine's own step; each
variant in a process of its own, which makes the same batches with the same seed. See README.md here.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import listed, llm_mb, machine, median_interval, peak_mb, reset_peak, timed, versions, write_results

RESULTS = Path(__file__).resolve().parent / "results"
STAGES = ("blip2", "blip2-llm")
WEIGHTS = ("fp32", "bf16", "int8", "nf4")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every variant in a process of its own, and write the results."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(words)
    if options.run:
        print(json.dumps(measure(options)))
        return
    variants = [("blip2", "")] if "blip2" in options.stage else []
    variants += [("blip2-llm", kind) for kind in options.weights] if "blip2-llm" in options.stage else []
    runs = [apart(stage, kind, words) for stage, kind in variants]
    result = {
        "command": shlex.join(["python", "benchmarks/blip2_train.py", *words]), "config": options.config,
        "device": options.device, "machine": machine(options.device), "versions": versions("torch", "transformers"),
        "steps": options.steps, "rounds": options.rounds, "runs": runs,
    }  # fmt: skip
    name = options.name or f"blip2_train-{Path(options.config).stem}-{options.device.split(':')[0]}"
    write_results(options.out, name, result, markdown(result))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=["fp32", "int8"], help="of the language model")
    parser.add_argument("--config", default="tiny", help="recipe of both stages, or a YAML file of one")
    parser.add_argument("--set", nargs="*", default=[], help="KEY=VALUE of both recipes")
    parser.add_argument("--set-first", nargs="*", default=[], help="KEY=VALUE of stage 1 alone")
    parser.add_argument("--set-second", nargs="*", default=[], help="KEY=VALUE of stage 2 alone")
    parser.add_argument("--steps", type=int, default=8, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch, 0 for its own choice")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", help="file name of the results, without its ending")
    parser.add_argument("--run", nargs=2, metavar=("STAGE", "WEIGHTS"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name in ("steps", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return options


def apart(stage: str, kind: str, words: Sequence[str]) -> dict[str, Any]:
    """`measure` of a variant in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), *words, "--run", stage, kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{stage} {kind}: measuring failed\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Speed of each round, peak memory, losses, and how large the language model is."""
    import torch

    stage, kind = options.run
    if options.threads:
        torch.set_num_threads(options.threads)
    network, batches, optimizer, context = prepare(options, stage, kind)
    before = peak_mb(options.device)
    reset_peak(options.device)
    losses: list[float] = []

    def step(number: int) -> None:
        losses.append(make_step(network, batches[number], optimizer, context, number))

    seconds = []
    for turn in range(options.rounds + 1):  # the first warms up
        numbers = range(turn * options.steps, (turn + 1) * options.steps)
        seconds.append(timed(step, numbers, options.device))
    cuts = [batches[n : n + options.steps] for n in range(options.steps, len(batches), options.steps)]
    rates = {
        "samples": [sum(map(len, cut)) / s for cut, s in zip(cuts, seconds[1:], strict=True)],
        "tokens": [sum(map(tokens_of, cut)) / s for cut, s in zip(cuts, seconds[1:], strict=True)],
    }
    llm = getattr(network, "llm", None)
    count = {
        "all": sum(p.numel() for p in network.parameters()),
        "trained": sum(p.numel() for p in network.parameters() if p.requires_grad),
    }
    return {
        "stage": stage, "weights": kind, "batch": len(batches[0]), "seconds": seconds[1:], "losses": losses,
        "per_second": {name: {"each": each} | median_interval(each) for name, each in rates.items()},
        "before_mb": before, "peak_mb": peak_mb(options.device), "parameters": count,
        "llm_mb": 0.0 if llm is None else llm_mb(llm),
    }  # fmt: skip


def tokens_of(batch: Any) -> int:
    """Real tokens of a batch's texts."""
    return int(batch.tokens.attention_mask.sum())


def make_step(network: Any, batch: Any, optimizer: Any, context: Any, number: int) -> float:
    """The training step of that number, on a batch; its loss."""
    from vlm.train.step import backward

    values = backward(network, batch, context, step=number, loss_scale=1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return values["loss"]


def prepare(options: argparse.Namespace, stage: str, kind: str) -> tuple[Any, list[Any], Any, Any]:
    """A recipe's network, its batches for all steps, optimiser and step context."""
    import itertools

    import torch

    from vlm.data.loader import make_loader
    from vlm.data.sources import open_source
    from vlm.train.config import load_config, named_config
    from vlm.train.run import begun_network, make_prompts, make_tokenizer, make_transform, run_kind

    changes = [*options.set, *(options.set_first if stage == "blip2" else options.set_second)]
    changes += [f"model.llm.weights={kind}"] if kind else []
    config: Any = load_config(run_kind(stage), named_config(stage, options.config), changes)
    device = torch.device(options.device)
    network: Any = begun_network(config).to(device).train()
    optimizer, context = trainer(network, config.train, device)
    source, tokenizer, transform = open_source(config.data), make_tokenizer(config), make_transform(config)
    count = options.steps * (options.rounds + 1)
    epochs = (
        make_loader(source, config.loader, tokenizer=tokenizer, transform=transform, epoch=epoch,
                    prompts=make_prompts(config.model))
        for epoch in itertools.count()
    )  # fmt: skip
    made = itertools.islice(itertools.chain.from_iterable(epochs), count)
    batches = [batch.to(device) for batch in made]  # reading pictures isn't measured
    return network, batches, optimizer, context


def trainer(network: Any, train: Any, device: Any) -> tuple[Any, Any]:
    """Optimiser and step context of a network on one device, as a recipe's `train` has them; freezes what it says."""
    import contextlib

    import torch

    from vlm.train.distributed import Ranks
    from vlm.train.engine import pick_precision
    from vlm.train.optim import freeze, make_optimizer
    from vlm.train.step import StepContext

    freeze(network, train.optim.freeze)
    precision = pick_precision(train.precision, device)

    def autocast() -> Any:
        if precision is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=precision)

    context = StepContext(Ranks(0, 1, device), network, autocast, seed=0, accumulate=train.accumulate)
    return make_optimizer(network, train.optim), context


def markdown(result: dict[str, Any]) -> str:
    """The result as a small page."""
    lines = [
        f"# Training BLIP-2, recipe `{Path(result['config']).stem}`, {result['device']}",
        "",
        "| stage | language model's weights | batch | samples/s | tokens/s | peak memory, MB | language model, MB | "
        "parameters trained of all, M | mean loss of the last round |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in result["runs"]:
        cells = [f"{run['per_second'][name]['median']:,.1f} [{run['per_second'][name]['low']:,.1f}, "
                 f"{run['per_second'][name]['high']:,.1f}]" for name in ("samples", "tokens")]  # fmt: skip
        last = run["losses"][-result["steps"] :]
        lines.append(
            f"| {1 if run['stage'] == 'blip2' else 2} | {run['weights'] or '-'} | {run['batch']} | {' | '.join(cells)} "
            f"| {run['peak_mb']:,.0f} | {run['llm_mb']:,.0f} | {run['parameters']['trained'] / 1e6:,.1f} of "
            f"{run['parameters']['all'] / 1e6:,.1f} | {sum(last) / len(last):.4f} |"
        )
    first = result["runs"][0]["per_second"]["samples"]
    lines += [
        "",
        f"Medians of {result['rounds']} rounds of {result['steps']} whole steps, with {100 * first['coverage']:.0f} % "
        "intervals; each variant in a process of its own, on the same batches. Reading pictures isn't measured. Tokens "
        "are the texts' own, without the visual prompt. The peak is that of the process while it trains (of the "
        "allocated tensors on a GPU); numbers in int8 are not counted as parameters, those in nf4 by two.",
        "",
        f"{result['machine']}; " + listed(result["versions"]) + ".",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
