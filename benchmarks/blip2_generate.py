"""BLIP-2's captions with `vlm` beside `transformers`' Blip2ForConditionalGeneration.generate: same weights and tokens.

An image encoder, a Q-Former and a Llama-like language model with random weights; each text is forced to its full
length, so that both sides write as many tokens. For each batch size and search both take turns in one process, and who
goes first alternates. See README.md here.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import listed, machine, median_interval, timed, versions, write_results
from torch import Tensor

RESULTS = Path(__file__).resolve().parent / "results"
SIDES = ("vlm", "transformers")
VISION, QFORMER, TEXT = "vision_config", "qformer_config", "text_config"
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    # A tenth of the published models: ViT-B, a Q-Former of BERT's size, and the shape of SmolLM2-135M.
    "small": {
        VISION: {"image_size": 224, "patch_size": 16, "hidden_size": 768, "intermediate_size": 3072,
                 "num_hidden_layers": 12, "num_attention_heads": 12},
        QFORMER: {"encoder_hidden_size": 768},
        TEXT: {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
               "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152},
    },
    "tiny": {
        VISION: {"image_size": 32, "patch_size": 16, "hidden_size": 32, "intermediate_size": 64,
                 "num_hidden_layers": 2, "num_attention_heads": 2},
        QFORMER: {"encoder_hidden_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                  "num_attention_heads": 2, "vocab_size": 60},
        TEXT: {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
               "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64},
    },
}  # fmt: skip
IMAGE_TOKEN, START, END, PAD = -1, 1, 2, 0
"""Ids; the image token is the last of the vocabulary."""
Run = Callable[[Tensor], Tensor]
"""Pixels (B, 3, H, W) to new tokens (B, L)."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Check that tokens are identical, measure, and write the results."""
    options = parse(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    torch.set_num_threads(options.threads or torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        make_weights(options.preset, Path(folder))
        result = measure(options, Path(folder))
    result = {"command": shlex.join(["python", "benchmarks/blip2_generate.py", *words])} | result
    name = options.name or f"blip2_generate-{options.preset}-{options.device.split(':')[0]}"
    write_results(options.out, name, result, markdown(result))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", choices=list(SIZES), default="small", help="sizes of the model")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="pictures at once")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens of each text")
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 3], help="1 is greedy search")
    parser.add_argument("--rounds", type=int, default=7, help="times that each side has its turn")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch, 0 for its own choice")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", help="file name of the results, without its ending")
    options = parser.parse_args(arguments)
    for name in ("tokens", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if min(options.batch) < 1 or min(options.beams) < 1:
        parser.error("--batch and --beams must be at least 1")
    return options


def make_weights(preset: str, folder: Path) -> None:
    """A folder as `transformers` writes it, with weights larger than at the start, so that tokens differ."""
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, Blip2Config, Blip2ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {name: dict(part) for name, part in SIZES[preset].items()}
    count = sizes[TEXT]["vocab_size"]
    ids = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": PAD}
    text = AutoConfig.for_model(**sizes[TEXT], **ids, max_position_embeddings=256, tie_word_embeddings=False)
    config = Blip2Config(
        vision_config=sizes[VISION], qformer_config=sizes[QFORMER], text_config=text.to_dict(),
        image_token_index=count + IMAGE_TOKEN,
    )  # fmt: skip
    model: Any = Blip2ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter) * 0.02)
        # Words that outweigh what the layers add: a random network else says one word for ever.
        model.get_input_embeddings().weight.mul_(50)
    model.save_pretrained(folder)
    words = {str(number): number for number in range(count)}
    Tokenizer(models.WordLevel(words, unk_token=str(PAD))).save(str(folder / "tokenizer.json"))


def load_side(side: str, folder: Path, device: str) -> Any:
    """A side's model; ours as `vlm caption` has it, layers packed on a CPU."""
    if side == "transformers":
        from transformers import Blip2ForConditionalGeneration

        theirs: Any = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        return theirs.eval().requires_grad_(False).to(device)
    from vlm.models.packed import pack_linears
    from vlm.weights.load import load

    model = load(folder, device=device)
    pack_linears(model.network)
    return model


def make_run(side: str, model: Any, beams: int, tokens: int) -> Run:
    """Search with a side's own `generate`."""
    if side == "transformers":
        settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "num_beams": beams, "do_sample": False}
        return lambda pixels: model.generate(pixels, **settings)[:, -tokens:]
    from vlm.generate import GenerationConfig

    config = GenerationConfig("beam", beams=beams, max_new_tokens=tokens, min_new_tokens=tokens - 1)
    return lambda pixels: model.generate(pixels, config=config).ids[:, 0]


@torch.inference_mode()
def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of both sides, for each batch and number of beams."""
    models = {side: load_side(side, folder, options.device) for side in SIDES}
    side_px = SIZES[options.preset][VISION]["image_size"]
    found = []
    for batch in options.batch:
        draw = torch.Generator().manual_seed(1)
        pixels = torch.randn(batch, 3, side_px, side_px, generator=draw).to(options.device)
        for beams in options.beams:
            runs = {side: make_run(side, model, beams, options.tokens) for side, model in models.items()}
            different = check_tokens({side: run(pixels) for side, run in runs.items()}, options.tokens)
            seconds: dict[str, list[float]] = {side: [] for side in SIDES}
            for turn in range(options.rounds):
                for side in sorted(SIDES, reverse=bool(turn % 2)):
                    seconds[side].append(seconds_of(runs[side], pixels, options.device))
            found.append({"batch": batch, "beams": beams, "different_tokens": different} | compare(seconds))
    return {
        "preset": options.preset, "new_tokens": options.tokens, "rounds": options.rounds, "device": options.device,
        "machine": machine(options.device), "threads": torch.get_num_threads(), "pixels": side_px,
        "versions": versions("torch", "transformers"), "runs": found,
    }  # fmt: skip


def seconds_of(run: Run, pixels: Tensor, device: str) -> float:
    """Seconds of one search."""
    return timed(lambda _: run(pixels), [0], device)


def check_tokens(found: dict[str, Tensor], length: int) -> int:
    """How many different tokens the texts hold; raises AssertionError when the sides' tokens aren't identical.

    The last token isn't compared: with a least length only our side may end there.
    """
    ours, theirs = (found[side][:, : length - 1] for side in SIDES)
    if ours.shape[1] != length - 1 or not torch.equal(ours.cpu(), theirs.cpu()):
        raise AssertionError(f"the tokens differ: {ours.tolist()} and {theirs.tolist()}")
    different = len(ours.unique())
    if different < 2:
        raise AssertionError("all texts repeat one token, so that equal ones say nothing")
    return different


def compare(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Each turn's seconds on both sides, their medians, and the ratio theirs / ours with its interval."""
    ratios = [theirs / ours for ours, theirs in zip(*(seconds[side] for side in SIDES), strict=True)]
    medians = {side: median_interval(values)["median"] for side, values in seconds.items()}
    return {"seconds": seconds, "median": medians, "ratio": {"each": ratios} | median_interval(ratios)}


def markdown(result: dict[str, Any]) -> str:
    """The result as a small page."""
    lines = [
        f"# BLIP-2 captions of {result['new_tokens']} new tokens, `{result['preset']}` at {result['pixels']} pixels, "
        f"{result['device']}, fp32",
        "",
        "| pictures | search | vlm, s | transformers, s | times as fast |",
        "|---|---|---|---|---|",
    ]
    for run in result["runs"]:
        search = "greedy" if run["beams"] == 1 else f"beams {run['beams']}"
        ratio, median = run["ratio"], run["median"]
        lines.append(
            f"| {run['batch']} | {search} | {median['vlm']:.2f} | {median['transformers']:.2f} | "
            f"**{ratio['median']:.2f}** [{ratio['low']:.2f}, {ratio['high']:.2f}] |"
        )
    coverage = result["runs"][0]["ratio"]["coverage"]
    lines += [
        "",
        "Both sides wrote the same tokens; the last isn't compared, since ours may end there. Medians of "
        f"{result['rounds']} rounds in turns in one process, ratios with {100 * coverage:.0f} % intervals. Random "
        "weights; every text has its full length. On a CPU linear layers of vlm are laid out for oneDNN, as `vlm "
        "caption` does once when it has loaded the model.",
        "",
        f"{result['machine']}, {result['threads']} threads; " + listed(result["versions"]) + ".",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
