"""Captioning and filtering beside a plain batched script of `transformers`: same weights, same pictures, same texts.

Ours is what `vlm capfilt run` does with a shard, from the encoded pictures to the written shard. The script decodes a
batch, captions it with BlipForConditionalGeneration.generate, and scores web texts, then synthetic ones, with
BlipForImageTextRetrieval. Both take turns in one process; random weights, random web texts of mixed length. First a
greedy run checks that captions are identical and scores equal. See README.md here.
"""

from __future__ import annotations

import argparse
import io
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from generate import SIZES, make_weights
from measure import listed, machine, median_interval, versions, write_results
from PIL import Image

from vlm.data.shards import ShardWriter
from vlm.data.tokenizers import wordpiece
from vlm.generate import GenerationConfig
from vlm.tasks.capfilt.settings import CapfiltConfig
from vlm.tasks.capfilt.units import Unit
from vlm.tasks.capfilt.work import Job, Worker, read_record
from vlm.weights.load import load

RESULTS = Path(__file__).resolve().parent / "results"
SIDES = ("vlm", "transformers")
Pair = tuple[str, float]
"""A text and its matched probability."""
Run = Callable[[], list[tuple[Pair, Pair]]]
"""Gives each picture's web and synthetic text."""
WORDS = (3, 24)
"""Fewest and most words of a web text."""
SENTENCE = "the uploader of this picture wrote some words about it that say more or less what can be seen"


def main(arguments: Sequence[str] | None = None) -> None:
    """Check that outputs are equal, measure in turns, and write the results."""
    options = parse(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    torch.set_num_threads(options.threads or torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        make(options, Path(folder))
        result = {"command": shlex.join(["python", "benchmarks/capfilt.py", *words])}
        result |= measure(options, Path(folder))
    write_results(options.out, options.name or f"capfilt-{options.preset}-cpu", result, markdown(result))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", choices=list(SIZES), default="base", help="sizes of the models")
    parser.add_argument("--pictures", type=int, default=16, help="pictures of a turn")
    parser.add_argument("--batch", type=int, default=8, help="pictures at once")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens of each synthetic text")
    parser.add_argument("--rounds", type=int, default=6, help="times that each side has its turn")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch, 0 for its own choice")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", help="file name of the results, without its ending")
    options = parser.parse_args(arguments)
    for name in ("pictures", "batch", "tokens", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return options


def make(options: argparse.Namespace, folder: Path) -> None:
    """Both models as `transformers` writes them and as ours, and a shard of JPEGs with texts."""
    from transformers import BlipConfig, BlipForImageTextRetrieval

    make_weights(options.preset, folder / "captioner")
    torch.manual_seed(1)
    judge: Any = BlipForImageTextRetrieval(BlipConfig(**SIZES[options.preset]))
    with torch.no_grad():
        for parameter in judge.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter) * 0.03)
        judge.itm_head.bias.zero_()
    judge.save_pretrained(folder / "filter" / "transformers")
    load(folder / "filter" / "transformers", device="cpu").save(folder / "filter" / "vlm")
    rng = np.random.default_rng(0)
    with ShardWriter(str(folder / "web" / "{:05d}.tar")) as writer:
        for number in range(options.pictures):
            coarse = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
            file = io.BytesIO()
            coarse.resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG")
            text = " ".join(rng.choice(SENTENCE.split(), rng.integers(*WORDS)))
            writer.write(f"{number:06d}", file.getvalue(), "jpg", {"captions": [text]})


def ours(options: argparse.Namespace, folder: Path, strategy: str) -> Run:
    """A shard by `vlm.tasks.capfilt`'s worker, written into a folder of its own each time."""
    tokens = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens - 1}
    tokens |= {"no_repeat_ngram": 1} if strategy == "greedy" else {}  # random weights would repeat one token
    config = CapfiltConfig(
        (str(folder / "web"),), (str(folder / "web"),), captioner="given", judge="given",
        generation=GenerationConfig(strategy, **tokens),  # type: ignore[arg-type]
    )  # fmt: skip
    places = (str(folder / part / "vlm") for part in ("captioner", "filter"))
    worker = Worker(Job(config, folder / "out", *places, options.batch, "cpu"))
    unit = Unit("web", 0, 0, options.pictures)

    def run() -> list[tuple[Pair, Pair]]:
        list(worker.run([unit]))
        rows = read_record(folder / "out", unit)["rows"]
        return [tuple((text["text"], text["itm"]) for text in row["texts"]) for row in rows]  # type: ignore[misc]

    return run


def theirs(options: argparse.Namespace, folder: Path, strategy: str) -> Run:
    """The plain script; our tokenizer stands for theirs, which has the same vocabulary."""
    from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval

    captioner: Any = BlipForConditionalGeneration.from_pretrained(folder / "captioner" / "transformers").eval()
    judge: Any = BlipForImageTextRetrieval.from_pretrained(folder / "filter" / "transformers").eval()
    transform = load(folder / "filter" / "vlm", device="cpu").transform
    tokenizer = wordpiece(max_length=judge.config.text_config.max_position_embeddings)
    start = judge.config.text_config.vocab_size - 1  # [ENC]
    settings: dict[str, Any] = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens - 1}
    settings |= {"do_sample": True, "top_p": 0.9, "top_k": 0} if strategy == "nucleus" else {"no_repeat_ngram_size": 1}
    from vlm.data.sources import open_source

    source = open_source(str(folder / "web"))

    def score(pixels: torch.Tensor, texts: list[str]) -> list[float]:
        tokens = tokenizer(texts)
        ids = tokens.input_ids.clone()
        ids[:, 0] = start
        logits = judge(input_ids=ids, attention_mask=tokens.attention_mask.long(), pixel_values=pixels).itm_score
        return logits.softmax(dim=1)[:, 1].tolist()

    @torch.inference_mode()
    def run() -> list[tuple[Pair, Pair]]:
        out: list[tuple[Pair, Pair]] = []
        for first in range(0, len(source), options.batch):
            samples = [source[number] for number in range(first, min(first + options.batch, len(source)))]
            images = [Image.open(io.BytesIO(sample.image)).convert("RGB") for sample in samples]
            pixels = torch.stack([transform(image) for image in images])
            said = captioner.generate(pixels, num_beams=1, **settings)[:, 1:].tolist()
            synthetic = [tokenizer.decode([i for i in row if i < tokenizer.vocab_size]) for row in said]
            web = [str(sample.meta["captions"][0]) for sample in samples]
            kinds = [list(zip(texts, score(pixels, texts), strict=True)) for texts in (web, synthetic)]
            out += zip(*kinds, strict=True)
        return out

    return run


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of all turns on both sides, when outputs of a greedy run are equal."""
    makers = {"vlm": ours, "transformers": theirs}
    difference = check({side: makers[side](options, folder, "greedy")() for side in SIDES})
    runs = {side: makers[side](options, folder, "nucleus") for side in SIDES}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    words = {side: float(np.mean([len(pair[0].split()) for _, pair in runs[side]()])) for side in SIDES}
    for turn in range(options.rounds):
        for side in sorted(SIDES, reverse=bool(turn % 2)):
            start = time.perf_counter()
            runs[side]()
            seconds[side].append(time.perf_counter() - start)
    pairs = 2 * options.pictures
    rates = {side: pairs / median_interval(values)["median"] for side, values in seconds.items()}
    ratios = [there / here for here, there in zip(*(seconds[side] for side in SIDES), strict=True)]
    return {
        "preset": options.preset, "pictures": options.pictures, "batch": options.batch, "new_tokens": options.tokens,
        "rounds": options.rounds, "machine": machine("cpu"), "threads": torch.get_num_threads(),
        "versions": versions("torch", "transformers"), "pixels": SIZES[options.preset]["vision_config"]["image_size"],
        "largest_difference_of_scores": difference, "words_of_synthetic_texts": words,
        "seconds": seconds, "pairs_per_second": rates, "ratio": {"each": ratios} | median_interval(ratios),
    }  # fmt: skip


def check(found: dict[str, list[tuple[Pair, Pair]]]) -> float:
    """Largest difference of the probabilities; raises AssertionError when texts or scores aren't equal."""
    here, there = (found[side] for side in SIDES)
    texts = [[[text for text, _ in pairs] for pairs in side] for side in (here, there)]
    if texts[0] != texts[1]:
        raise AssertionError(f"the texts differ: {json.dumps(texts)[:2000]}")
    if len({word for _, (text, _) in here for word in text.split()}) < 3:
        raise AssertionError(f"all synthetic texts repeat one word, so that equal ones say nothing: {texts[0][:3]}")
    scores = np.array([[[score for _, score in pairs] for pairs in side] for side in (here, there)])
    difference = float(np.abs(scores[0] - scores[1]).max())
    if np.ptp(scores[0], axis=0).min() < 1e-3:
        raise AssertionError("all pictures score alike, so that equal scores say nothing")
    if difference > 1e-4:
        raise AssertionError(f"the matched probabilities differ by {difference}")
    return difference


def markdown(result: dict[str, Any]) -> str:
    """The result as a small page."""
    ratio, rates = result["ratio"], result["pairs_per_second"]
    lines = [
        f"# CapFilt of {result['pictures']} pictures, {result['new_tokens']} new tokens, BLIP `{result['preset']}` at "
        f"{result['pixels']} pixels, CPU, fp32",
        "",
        "| | vlm | transformers | times as fast |",
        "|---|---|---|---|",
        f"| pairs per second | {rates['vlm']:.2f} | {rates['transformers']:.2f} | **{ratio['median']:.2f}** "
        f"[{ratio['low']:.2f}, {ratio['high']:.2f}] |",
        "",
        "A picture makes two pairs: with its web text, and with the synthetic text, which is written (nucleus, "
        f"p = 0.9) and scored. Medians of {result['rounds']} rounds in turns, ratio with a "
        f"{100 * ratio['coverage']:.0f} % interval. In a greedy run before, captions were identical and matched "
        f"probabilities differed by {result['largest_difference_of_scores']:.1e} at most.",
        "",
        f"Random weights, batches of {result['batch']}. {result['machine']}, {result['threads']} threads; "
        + listed(result["versions"])
        + ".",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
