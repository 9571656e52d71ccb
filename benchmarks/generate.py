"""Captions with `vlm` beside `transformers`' BlipForConditionalGeneration.generate: same weights, same tokens.

ViT-B/384 and a base text decoder with random weights; each text is forced to its full length, so that both sides
write as many tokens. Both take turns in one process, the picture part and the decoding part timed apart; peak memory
is that of a process of its own for each side and search. See README.md here.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import listed, machine, median_interval, peak_mb, reset_peak, versions, write_results
from torch import Tensor, nn

RESULTS = Path(__file__).resolve().parent / "results"
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    # The heads of the published base models; transformers' own default differs.
    "base": {"vision_config": {"image_size": 384}, "text_config": {"num_attention_heads": 12, "vocab_size": 30524}},
    "tiny": {
        "vision_config": {"image_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                          "num_attention_heads": 2},
        "text_config": {"num_attention_heads": 2, "vocab_size": 30524, "hidden_size": 64, "intermediate_size": 128,
                        "encoder_hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 64},
    },
}  # fmt: skip
SIDES = ("vlm", "transformers")
Run = Callable[[Tensor], Tensor]
"""Pixels (B, 3, H, W) to new tokens (B, L)."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Check that tokens are identical, measure, and write the results."""
    options = parse(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    torch.set_num_threads(options.threads or torch.get_num_threads())
    if options.memory:
        print(json.dumps(memory_here(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        make_weights(options.preset, options.folder)
        result = {"command": shlex.join(["python", "benchmarks/generate.py", *words])} | measure(options)
    name = options.name or f"generate-{options.preset}-cpu"
    write_results(options.out, name, result, markdown(result))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", choices=list(SIZES), default="base", help="sizes of the model")
    parser.add_argument("--batch", type=int, default=4, help="pictures at once")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens of each text")
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 3], help="1 is greedy search")
    parser.add_argument("--rounds", type=int, default=7, help="times that each side has its turn")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch, 0 for its own choice")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", help="file name of the results, without its ending")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--memory", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name in ("batch", "tokens", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return options


def make_weights(preset: str, folder: Path) -> None:
    """A folder for each side with the same weights, larger than at the start, so that tokens differ."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    from vlm.weights.load import load

    torch.manual_seed(0)
    model: Any = BlipForConditionalGeneration(BlipConfig(**SIZES[preset]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter) * 0.01)
        # Else each token would only repeat the one before: the embedding is the last matrix too.
        model.text_decoder.bert.embeddings.position_embeddings.weight.normal_(std=0.5)
    model.save_pretrained(folder / "transformers")
    load(folder / "transformers", device="cpu").save(folder / "vlm")


def random_pixels(options: argparse.Namespace) -> Tensor:
    """(B, 3, H, W): their content costs no time."""
    side = SIZES[options.preset]["vision_config"]["image_size"]
    return torch.randn(options.batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def load_side(side: str, folder: Path) -> tuple[Any, nn.Module]:
    """A side's model and its image encoder; ours as `vlm caption` has it, layers packed.

    Each side is imported alone, so that a process of its own holds nothing of the other.
    """
    if side == "transformers":
        from transformers import BlipForConditionalGeneration

        theirs: Any = BlipForConditionalGeneration.from_pretrained(folder / side).eval().requires_grad_(False)
        return theirs, theirs.vision_model
    from vlm.models.packed import pack_linears
    from vlm.weights.load import load

    model = load(folder / side, device="cpu")
    pack_linears(model.network)
    return model, model.network.image  # type: ignore[return-value]


def make_run(side: str, model: Any, beams: int, tokens: int) -> Run:
    """Search with a side's own `generate`."""
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens - 1}
    if side == "transformers":
        return lambda pixels: model.generate(pixels, num_beams=beams, do_sample=False, **settings)[:, 1:]
    from vlm.generate import GenerationConfig

    config = GenerationConfig("beam", beams=beams, **settings)
    return lambda pixels: model.generate(pixels, config=config).ids[:, 0]


@torch.inference_mode()
def memory_here(options: argparse.Namespace) -> dict[str, float]:
    """Peak memory of this process in MB: of loading, and of searches when the model is there.

    The second search counts, since `transformers` maps its weights and reads them in the first one.
    """
    model, _ = load_side(options.memory, options.folder)
    loading, run = peak_mb("cpu"), make_run(options.memory, model, options.beams[0], options.tokens)
    run(random_pixels(options))
    reset_peak()
    run(random_pixels(options))
    return {"loading": loading, "searching": peak_mb("cpu")}


def memory_apart(side: str, beams: int, options: argparse.Namespace) -> dict[str, float]:
    """`memory_here` of a process of its own."""
    values = {
        "--memory": side, "--folder": options.folder, "--preset": options.preset, "--batch": options.batch,
        "--tokens": options.tokens, "--beams": beams, "--threads": options.threads,
    }  # fmt: skip
    words = [str(word) for pair in values.items() for word in pair]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


class Watch:
    """Times a search and, by a hook on the image encoder, its picture part."""

    def __init__(self, encoder: nn.Module) -> None:
        self.seen = 0.0
        encoder.register_forward_hook(self._see)

    def _see(self, *_: Any) -> None:
        self.seen = time.perf_counter()

    def time(self, run: Run, pixels: Tensor) -> dict[str, float]:
        """Seconds of the picture, of decoding, and of both."""
        start = time.perf_counter()
        run(pixels)
        end = time.perf_counter()
        return {"picture": self.seen - start, "decoding": end - self.seen, "whole": end - start}


@torch.inference_mode()
def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both parts on both sides, for each number of beams, and peak memory."""
    memory = {str(b): {side: memory_apart(side, b, options) for side in SIDES} for b in options.beams}
    models = {side: load_side(side, options.folder) for side in SIDES}
    watches = {side: Watch(encoder) for side, (_, encoder) in models.items()}
    pixels = random_pixels(options)
    searches: dict[str, Any] = {}
    for beams in options.beams:
        runs = {side: make_run(side, model, beams, options.tokens) for side, (model, _) in models.items()}
        different = check_tokens({side: run(pixels) for side, run in runs.items()}, options.tokens)
        turns: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for turn in range(options.rounds):
            for side in sorted(SIDES, reverse=bool(turn % 2)):
                turns[side].append(watches[side].time(runs[side], pixels))
        searches[str(beams)] = compare(turns) | {"different_tokens": different, "memory_mb": memory[str(beams)]}
    return {
        "preset": options.preset, "batch": options.batch, "new_tokens": options.tokens, "rounds": options.rounds,
        "machine": machine("cpu"), "threads": torch.get_num_threads(), "versions": versions("torch", "transformers"),
        "pixels": pixels.shape[-1], "searches": searches,
    }  # fmt: skip


def check_tokens(found: dict[str, Tensor], length: int) -> int:
    """How many different tokens the texts hold; raises AssertionError when the sides' tokens aren't identical."""
    ours, theirs = (found[side] for side in SIDES)
    if ours.shape[1] != length or not torch.equal(ours, theirs):
        raise AssertionError(f"the tokens differ: {ours.tolist()} and {theirs.tolist()}")
    different = len(ours.unique())
    if different < 3:
        raise AssertionError("all texts repeat one token, so that equal ones say nothing")
    return different


def compare(turns: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """By part: each turn's seconds on both sides, and the ratio theirs / ours with its interval."""
    found = {}
    for part in ("picture", "decoding", "whole"):
        seconds = {side: [turn[part] for turn in turns[side]] for side in SIDES}
        ratios = [theirs / ours for ours, theirs in zip(*(seconds[side] for side in SIDES), strict=True)]
        medians = {side: median_interval(values)["median"] for side, values in seconds.items()}
        found[part] = {"seconds": seconds, "median": medians, "ratio": {"each": ratios} | median_interval(ratios)}
    return {"parts": found}


def markdown(result: dict[str, Any]) -> str:
    """The result as a small page."""
    lines = [
        f"# Captions of {result['batch']} pictures, {result['new_tokens']} new tokens, BLIP `{result['preset']}` at "
        f"{result['pixels']} pixels, CPU, fp32",
        "",
        "| search | part | vlm, s | transformers, s | times as fast |",
        "|---|---|---|---|---|",
    ]
    memory, coverage = [], 0.0
    for beams, search in result["searches"].items():
        name = "greedy" if beams == "1" else f"beams {beams}"
        for part, values in search["parts"].items():
            ratio, median = values["ratio"], values["median"]
            coverage = ratio["coverage"]
            lines.append(
                f"| {name} | {part} | {median['vlm']:.2f} | {median['transformers']:.2f} | "
                f"**{ratio['median']:.2f}** [{ratio['low']:.2f}, {ratio['high']:.2f}] |"
            )
        peaks = {side: search["memory_mb"][side] for side in SIDES}
        memory.append(
            f"{name} {peaks['vlm']['searching']:,.0f} MB beside {peaks['transformers']['searching']:,.0f} MB "
            f"(in loading {peaks['vlm']['loading']:,.0f} and {peaks['transformers']['loading']:,.0f})"
        )
    lines += [
        "",
        f"Both sides wrote the same tokens. Medians of {result['rounds']} rounds in turns in one process, ratios with "
        f"{100 * coverage:.0f} % intervals. The picture part is the image encoder; decoding holds the projection of "
        "the image's keys and values. Linear layers of vlm are laid out for oneDNN, as `vlm caption` does once when "
        "it has loaded the model.",
        "",
        f"Highest memory of a process of its own while it searches: {'; '.join(memory)}.",
        "",
        f"Random weights; every text has its full length. {result['machine']}, {result['threads']} threads; "
        + listed(result["versions"])
        + ".",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
