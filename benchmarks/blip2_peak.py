"""Memory that BLIP-2's recipes take at their peak, measured, beside what their tensors are counted to take.

A caption is written of one picture, or one training step made, each in a process of its own. Weights are random and
made in place, in the shapes of the recipe and of the published language model; loading them isn't measured. What
wouldn't fit isn't run. See README.md here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from blip2_shapes import LLM_OF, NEW_TOKENS, Case, count, train, write
from measure import give_back, held_mb, listed, machine, peak_mb, reset_peak, versions, write_results

RESULTS = Path(__file__).resolve().parent / "results"
NAME = "blip2_peak"
SPARE = 1.0
"""GB beside the counted ones that something must have to be run: for imports and activations."""
RESERVE = 2.0
"""GB that stay free on the machine whatever is run, since others may run on it."""


def cases(recipe: str) -> list[Case]:
    """What is measured of a recipe."""
    first, second = "blip2", "blip2-llm"
    if recipe == "tiny":
        return [
            Case(recipe, first, "run"),
            Case(recipe, first, "train", batch=2),
            Case(recipe, first, "train", batch=64),
            *(Case(recipe, second, "run", kind) for kind in ("fp32", "int8")),
            Case(recipe, second, "train", "fp32", batch=2),
            Case(recipe, second, "train", "fp32", batch=64),
            Case(recipe, second, "train", "fp32", batch=64, recompute=True),
            Case(recipe, second, "train", "int8", batch=64),
        ]
    return [
        Case(recipe, first, "run"),
        Case(recipe, first, "train", batch=2),
        Case(recipe, second, "run", "fp32"),
        Case(recipe, second, "run", "bf16"),
        Case(recipe, second, "train", "fp32", batch=2),
        # Gradients of bf16 products are slow without AVX-512; hence so short a text.
        Case(recipe, second, "train", "bf16", batch=1, tokens=8),
        Case(recipe, second, "train", "int8", batch=2),
        Case(recipe, second, "run", "int8"),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what fits, each in a process of its own, and write the results."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(words)
    if options.run:
        print(json.dumps(measure(Case(**json.loads(options.run)), options)))
        return
    device = options.device.split(":")[0]
    name = NAME if device == "cpu" else f"{NAME}-{device}"
    result: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/blip2_peak.py", *words]),
        "device": options.device, "machine": machine(options.device), "threads": options.threads,
        "limit_gb": options.limit, "versions": versions("torch", "transformers"), "rows": [],
    }  # fmt: skip
    before = earlier(options.out / f"{name}.json") if options.go_on else {}
    for case in (case for recipe in options.recipe for case in cases(recipe)):
        counted = count(case)
        reason = refusal(counted / 1e9 + SPARE, options.limit, available(options.device))
        found = before.get(case) or ({"not_run": reason} if reason else apart(case, words, options.limit))
        result["rows"].append(asdict(case) | {"counted_bytes": counted} | found)
        write_results(options.out, name, result, markdown(result))  # what there is so far


def earlier(file: Path) -> dict[Case, dict[str, Any]]:
    """What a file of results has measured of each case; nothing without a file."""
    rows = json.loads(file.read_text("utf-8"))["rows"] if file.is_file() else []
    names = [field.name for field in fields(Case)]
    found = {Case(**{name: row[name] for name in names}): row for row in rows if "not_run" not in row}
    return {case: {name: row[name] for name in row if name.endswith("_mb")} for case, row in found.items()}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--recipe", nargs="+", choices=list(LLM_OF), default=list(LLM_OF))
    parser.add_argument("--limit", type=float, default=15.0, help="GB that nothing may need more than")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch, 0 for its own choice")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--go-on", action="store_true", help="keep what the results' file has measured already")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.limit <= 0:
        parser.error("--limit must be above 0")
    return options


def available(device: str) -> float:
    """GB that can be had now without anything being pushed out, of the machine's memory or the GPU's."""
    if device != "cpu":
        import torch

        return torch.cuda.mem_get_info(device)[0] / 1e9
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024 / 1e9


def refusal(needed: float, limit: float, free: float) -> str:
    """Why something that needs so many GB isn't run; empty when it fits."""
    if needed > limit:
        return f"not run: needs {needed:.1f} GB, more than the {limit:g} allowed"
    if needed > free - RESERVE:
        return f"not run: needs {needed:.1f} GB, {max(0.0, free - RESERVE):.1f} to be had"
    return ""


def apart(case: Case, words: Sequence[str], limit: float) -> dict[str, Any]:
    """`measure` of a case in a process of its own, which can't take more than the limit."""
    command = [sys.executable, str(Path(__file__).resolve()), *words, "--run", json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and ("allocate memory" in done.stderr or "MemoryError" in done.stderr):
        return {"not_run": f"not run to its end: building or running it takes more than the {limit:g} GB allowed"}
    if done.returncode:
        raise SystemExit(f"{case}: measuring failed\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(case: Case, options: argparse.Namespace) -> dict[str, float]:
    """Memory in MB with code and libraries alone, with the network too, and at the peak while it runs or is trained."""
    import torch

    if options.device == "cpu":
        hold_back(options.limit)
    if options.threads:
        torch.set_num_threads(options.threads)
    act = write if case.act == "run" else train
    with act(replace(case, small=True, batch=min(case.batch, 2)), options.device) as once:
        once()
    del once
    give_back()
    imports = held_mb(options.device)
    with act(case, options.device) as once:
        give_back()  # what making it took besides
        before = held_mb(options.device)
        if not reset_peak(options.device):
            raise SystemExit("/proc/self/clear_refs can't be written: peaks are measured on Linux")
        once()
    return {"imports_mb": imports, "before_mb": before, "peak_mb": peak_mb(options.device)}


def hold_back(limit: float) -> None:
    """Fail in this process rather than elsewhere: no more than so many GB, and the first to go when memory runs out."""
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (int(limit * 1e9),) * 2)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def markdown(result: Mapping[str, Any]) -> str:
    """The result as a small page."""
    lines = [
        f"# Memory of BLIP-2's recipes, measured, {result['device']}",
        "",
        "| recipe | stage | what | language model | other weights | counted, GB | measured peak, GB | "
        "beyond the counted, GB | imports, GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        stage = 1 if row["stage"] == "blip2" else 2
        what = "a caption" if row["act"] == "run" else f"a step of {row['batch']} x {row['tokens']} tokens"
        what += ", layers recomputed" if row["recompute"] else ""
        counted = row["counted_bytes"] / 1e9
        begin = f"| `{row['recipe']}` | {stage} | {what} | {row['weights'] or '-'} | {row['rest']} | {counted:.2f} | "
        if "not_run" in row:
            lines.append(f"{begin}{row['not_run']} | - | - |")
            continue
        peak, imports = (row["peak_mb"] - row["imports_mb"]) / 1e3, row["imports_mb"] / 1e3
        lines.append(f"{begin}{peak:.2f} | {peak - counted:.2f} | {imports:.2f} |")
    lines += [
        "",
        "Each row in a process of its own. Counted: weights, and in training gradients and AdamW's moments. The peak "
        "is that of the process less what it had with all libraries imported and a model of next to no size run (on a "
        "GPU: of the allocated tensors); beyond the counted are activations, the cache and, in captioning on a CPU, a "
        "second copy of a language model's head in fp32 that is tied to its embedding, laid out for oneDNN. A caption "
        f"has {NEW_TOKENS} tokens, of one picture by three beams; a step is one with the optimiser's moments there. "
        "Weights are random numbers in the shapes of the recipes and of their language models "
        f"({', '.join(f'`{recipe}`: {name}' for recipe, name in LLM_OF.items())}), made in place, so that loading "
        f"isn't in it. What needs more than {result['limit_gb']:g} GB, {SPARE:g} of it beside the counted, isn't run.",
        "",
        f"{result['machine']}, threads: {result['threads']}; " + listed(result["versions"]) + ".",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
