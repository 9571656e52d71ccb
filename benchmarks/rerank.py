"""Pairs per second of re-ranking with cached states, against running the whole model on each pair, at equal scores.

One picture with k candidate texts, as in a query's re-ranking. Cached: `vlm.tasks.rerank`'s own scorer, which makes
the picture's keys and values and runs the fusion layers. Whole: `match` on batches of pairs. ViLT can only run whole.
All take turns in one process, random weights, random words of COCO's length. See README.md here.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import listed, machine, median_interval, timed, versions, write_results
from torch import Tensor

from vlm.data.batch import Tokens
from vlm.data.tokenizers import wordpiece
from vlm.data.transforms import ImageTransform
from vlm.tasks.rerank import MATCHED, Rows, Texts, make_scorer
from vlm.train.config import load_config, named_config
from vlm.train.run import run_kind
from vlm.weights.families import family
from vlm.weights.loaded import VisionLanguageModel

RESULTS = Path(__file__).resolve().parent / "results"
PICTURES, TEXTS = 5_000, 25_000
"""COCO's test set of Karpathy's split, which all pairs are reckoned for."""
LENGTHS = (10, 16)
"""Tokens of a caption, both special ones counted: COCO's have about ten words."""


@dataclass(frozen=True)
class Side:
    """Something that scores the first pairs of a list, or encodes rows."""

    run: Callable[[], None]
    rows: int
    """Pairs, pictures or texts of one run."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Check that scores are equal, measure in turns, and write the results."""
    options = parse(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    result = {"command": shlex.join(["python", "benchmarks/rerank.py", *words])} | measure(options)
    name = options.name or f"rerank-{options.preset}-{result['device']}"
    write_results(options.out, name, result, markdown(result))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", choices=["tiny", "base"], default="tiny", help="of vlm/configs")
    parser.add_argument("--k", type=int, default=64, help="candidates of a query")
    parser.add_argument("--whole", type=int, default=64, help="pairs of a turn that are run whole, in one batch")
    parser.add_argument("--rounds", type=int, default=9, help="times that each side has its turn")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of torch, 0 for its own choice")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", help="file name of the results, without its ending")
    options = parser.parse_args(arguments)
    for name in ("k", "whole", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    options.whole = min(options.whole, options.k)
    return options


@torch.inference_mode()
def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Rates of all sides in turns, and what all pairs would take at these rates."""
    if options.threads:
        torch.set_num_threads(options.threads)
    albef, vilt = (random_model(stage, options.preset, options.device) for stage in ("albef", "vilt"))
    texts = random_texts(options.k, albef.tokenizer.vocab_size)
    difference = check_scores(albef, texts, options)
    sides = make_sides(albef, vilt, texts, options)
    for side in sides.values():
        side.run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(options.rounds):
        for name in sorted(sides, reverse=bool(turn % 2)):
            seconds[name].append(timed(lambda _, name=name: sides[name].run(), [0], options.device))  # type: ignore[misc]
    rates = {name: sides[name].rows / statistics.median(took) for name, took in seconds.items()}
    ratios = [
        (sides["cached"].rows / cached) / (sides["albef whole"].rows / whole)
        for cached, whole in zip(seconds["cached"], seconds["albef whole"], strict=True)
    ]
    return {
        "preset": options.preset, "k": options.k, "pairs_of_a_whole_batch": options.whole,
        "device": torch.device(options.device).type, "machine": machine(options.device),
        "threads": torch.get_num_threads(), "versions": versions("torch", "timm"),
        "pixels": {"albef": albef.transform.size, "vilt": vilt.transform.size},
        "tokens": float(texts.attention_mask.sum(dim=1).float().mean()),
        "largest_difference_of_scores": difference, "rounds": options.rounds, "seconds": seconds,
        "rates": rates, "ratio": {"each": ratios} | median_interval(ratios), "hours": hours(rates, options.k),
    }  # fmt: skip


def random_model(stage: str, preset: str, device: str) -> VisionLanguageModel:
    """A stage at a preset's shape; weights larger than at the start, so that scores differ from pair to pair."""
    torch.manual_seed(0)
    config = load_config(run_kind(stage), named_config(stage, preset)).model
    network = family(stage).network(config).eval().requires_grad_(False)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.add_(torch.randn_like(parameter) * 0.05)
    network.to(device)
    transform = ImageTransform(config.image.image_size)
    return VisionLanguageModel(network, wordpiece(), transform, name=f"{stage}-{preset}", family=stage)


def random_texts(count: int, vocabulary: int) -> Tokens:
    """Random words of a caption's length."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(*LENGTHS, (count, 1), generator=generator)
    mask = torch.arange(int(lengths.max())) < lengths
    ids = torch.randint(1000, vocabulary, mask.shape, generator=generator)
    return Tokens(ids.masked_fill(~mask, 0), mask)


def random_picture(model: VisionLanguageModel) -> Tensor:
    """(1, 3, H, W): its content costs no time."""
    size = model.transform.size
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1)).to(model.device)


def whole_scores(model: VisionLanguageModel, texts: Tokens) -> Tensor:
    """(T,) matched logits of one picture with texts, the whole model on each pair."""
    here = texts.to(model.device)
    return model.network.match(random_picture(model).expand(here.rows, -1, -1, -1), here)[:, MATCHED]  # type: ignore[operator]


def albef_rows(model: VisionLanguageModel, texts: Tokens) -> Rows:
    """The picture's and the texts' states, as `vlm eval retrieval` keeps them."""
    network: Any = model.network
    found = network.text_states(texts.to(model.device))
    states = network.image_states(random_picture(model)).states.cpu()
    return Rows([states[0]], Texts.of(found.states, found.mask))


def check_scores(model: VisionLanguageModel, texts: Tokens, options: argparse.Namespace) -> float:
    """The largest difference between cached and whole scores; raises AssertionError above 1e-4."""
    cached = make_scorer(model, albef_rows(model, texts))(0, np.arange(texts.rows)).numpy()
    parts = [
        whole_scores(model, texts.select(slice(start, start + options.whole))).cpu().numpy()
        for start in range(0, texts.rows, options.whole)
    ]
    whole = np.concatenate(parts)
    if not whole.std() > 1e-3:
        raise AssertionError("all pairs have one score, so that equal scores say nothing")
    np.testing.assert_allclose(cached, whole, rtol=1e-4, atol=1e-4)
    return float(np.abs(cached - whole).max())


def make_sides(
    albef: VisionLanguageModel, vilt: VisionLanguageModel, texts: Tokens, options: argparse.Namespace
) -> dict[str, Side]:
    """What takes turns: pairs three ways, and the encoding of pictures and texts that cached pairs need first."""
    scorer, every = make_scorer(albef, albef_rows(albef, texts)), np.arange(texts.rows)
    some = texts.select(slice(options.whole))
    network: Any = albef.network
    pictures, here = random_picture(albef).expand(options.whole, -1, -1, -1), texts.to(albef.device)
    return {
        "cached": Side(lambda: _drop(scorer(0, every)), texts.rows),
        "albef whole": Side(lambda: _drop(whole_scores(albef, some)), some.rows),
        "vilt whole": Side(lambda: _drop(whole_scores(vilt, some)), some.rows),
        "pictures": Side(lambda: _drop(network.image_states(pictures)), len(pictures)),
        "texts": Side(lambda: _drop(network.text_states(here)), here.rows),
    }


def _drop(_: Any) -> None:
    """Nothing is kept of a run."""


def hours(rates: dict[str, float], k: int) -> dict[str, dict[str, float | None]]:
    """Reckoned from the rates: all pairs of 5,000 pictures and 25,000 texts, and the k nearest both ways."""
    encoding = PICTURES / rates["pictures"] + TEXTS / rates["texts"]
    every, nearest = PICTURES * TEXTS, (PICTURES + TEXTS) * k
    found: dict[str, dict[str, float | None]] = {}
    for name, extra in (("cached", encoding), ("albef whole", encoding), ("vilt whole", 0.0)):
        first = extra if name == "cached" else 0.0
        found[name] = {
            "all": (every / rates[name] + first) / 3600,
            # ViLT has no features that would choose candidates.
            "nearest": None if name == "vilt whole" else (nearest / rates[name] + extra) / 3600,
        }
    return found


def markdown(result: dict[str, Any]) -> str:
    """The result as a small page."""
    ratio, rates = result["ratio"], result["rates"]
    rows = []
    for name, label in (
        ("cached", "ALBEF, states, keys and values kept"),
        ("albef whole", "ALBEF, the whole model on each pair"),
        ("vilt whole", "ViLT, the whole model on each pair"),
    ):
        cost = result["hours"][name]
        nearest = "can't choose" if cost["nearest"] is None else f"{cost['nearest']:,.1f}"
        rows.append((label, f"{rates[name]:,.1f}", f"{cost['all']:,.0f}", nearest))
    lines = [
        f"# Re-ranking {result['k']} candidates, `{result['preset']}`, {result['device']}, fp32",
        "",
        f"| | pairs/s | all pairs of {PICTURES:,} x {TEXTS:,}, hours | nearest {result['k']} both ways, hours |",
        "|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        f"Kept states score **{ratio['median']:.1f}** times as many pairs a second as the whole ALBEF (median of "
        f"{result['rounds']} rounds in turns; {100 * ratio['coverage']:.0f} % interval {ratio['low']:.2f} to "
        f"{ratio['high']:.1f}), with scores that differ by {result['largest_difference_of_scores']:.0e} at most. Hours "
        f"are reckoned from the measured rates, not run; they hold the encoding of each picture "
        f"({rates['pictures']:,.1f}/s) and text ({rates['texts']:,.1f}/s) once.",
        "",
        f"ALBEF at {result['pixels']['albef']} pixels, ViLT at {result['pixels']['vilt']}; random weights; captions of "
        f"{result['tokens']:.1f} tokens. {result['machine']}, {result['threads']} threads; "
        + listed(result["versions"])
        + ".",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
