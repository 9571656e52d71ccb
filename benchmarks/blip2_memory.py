"""Memory that BLIP-2 takes at the published sizes and at those of the recipes, counted from the shapes of its tensors.

Networks are made without weights (on torch's meta device), so that the largest takes seconds. Counted are weights,
gradients, the optimiser's moments and a row's cache; activations aren't, they grow with the batch: what a whole
process takes is measured by `blip2_peak.py`. See README.md here.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from measure import listed, versions, write_results

RESULTS = Path(__file__).resolve().parent / "results"
NAME = "blip2_memory"
TRAINED = 16
"""Bytes of a trained number: fp32 weight, gradient, and AdamW's two moments."""
BLOCK = 64
"""Weights of nf4 that share a scale (bitsandbytes, without double quantisation)."""
TEXT = 32
"""Tokens behind the visual prompt, for the cache."""
KINDS = ("fp32", "bf16", "int8", "nf4")
OPT = {"model_type": "opt", "vocab_size": 50272, "max_position_embeddings": 2048, "num_attention_heads": 32}
T5 = {"model_type": "t5", "vocab_size": 32128, "num_layers": 24, "d_kv": 64, "feed_forward_proj": "gated-gelu"}
LLMS: Mapping[str, Mapping[str, Any]] = {
    "SmolLM2-135M": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "OPT-2.7B": OPT | {"hidden_size": 2560, "word_embed_proj_dim": 2560, "ffn_dim": 10240, "num_hidden_layers": 32},
    "OPT-6.7B": OPT | {"hidden_size": 4096, "word_embed_proj_dim": 4096, "ffn_dim": 16384, "num_hidden_layers": 32},
    "FlanT5-XL": T5 | {"d_model": 2048, "d_ff": 5120, "num_heads": 32},
    "FlanT5-XXL": T5 | {"d_model": 4096, "d_ff": 10240, "num_heads": 64},
    "Vicuna-7B": {
        "model_type": "llama", "vocab_size": 32001, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32,
    },
}  # fmt: skip
"""Settings of each language model's published configuration."""
SIZES = (
    ("recipe `tiny`", "tiny", "SmolLM2-135M"),
    ("recipe `base`", "base", "OPT-2.7B"),
    ("BLIP-2, ViT-g", "published", "OPT-2.7B"),
    ("BLIP-2, ViT-g", "published", "OPT-6.7B"),
    ("BLIP-2, ViT-g", "published", "FlanT5-XL"),
    ("BLIP-2, ViT-g", "published", "FlanT5-XXL"),
    ("InstructBLIP, ViT-g", "instructed", "FlanT5-XL"),
    ("InstructBLIP, ViT-g", "instructed", "Vicuna-7B"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Count every size and write the results."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(words)
    rows = [count(*size) for size in SIZES]
    result = {
        "command": shlex.join(["python", "benchmarks/blip2_memory.py", *words]),
        "machine": "any: counted, not measured",
        "versions": versions("torch", "transformers"),
        "rows": rows,
    }
    write_results(options.out, NAME, result, markdown(result))


def count(title: str, shape: str, name: str) -> dict[str, Any]:
    """Parameters of each part of a size, and bytes: to run it, to train its second stage, and of a row's cache.

    shape: `tiny` or `base` for the second stage's recipes, `published`, or `instructed`, whose Q-Former reads words.
    name: of the language model in `LLMS`.
    """
    network, llm = make(shape, name)
    parts = {"image": size(network.image), "qformer": size(network.qformer) + size(network.projection)}
    parts["llm"] = size(llm)
    held = {kind: llm_bytes(llm, kind) for kind in KINDS}
    small = parts["image"] + parts["qformer"]
    run = {kind: held[kind] + small * (4 if kind == "fp32" else 2) for kind in KINDS}
    # In training the image encoder keeps fp32, as all that isn't the language model.
    train = {kind: held[kind] + 4 * parts["image"] + TRAINED * parts["qformer"] for kind in KINDS}
    return {
        "name": title, "llm": name, "parameters": parts, "run_bytes": run, "train_bytes": train,
        "cache_bytes": cache_bytes(llm.config, network.config.qformer.queries + TEXT),
    }  # fmt: skip


def make(shape: str, name: str) -> tuple[Any, Any]:
    """Our second stage without its language model, and that one, both without weights."""
    import torch

    from vlm.models.blip2_llm import Blip2Llm

    with torch.device("meta"):
        llm = make_llm(LLMS[name], torch.float32)
        width = llm.get_input_embeddings().weight.shape[1]
        return Blip2Llm(second_stage(shape, width)), llm


def make_llm(settings: Mapping[str, Any], dtype: Any) -> Any:
    """A language model of these settings, as its class begins; dtype: of its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    sizes = dict(settings)
    config = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    llm = kind.from_config(config, dtype=dtype)
    if config.is_encoder_decoder:  # FlanT5's head is its own, whatever its class ties
        llm.lm_head.weight = torch.nn.Parameter(torch.empty_like(llm.lm_head.weight))
    return llm


def second_stage(shape: str, width: int) -> Any:
    """Configuration of a size's second stage; width: of the language model's tokens."""
    from vlm.models.blip2_llm import Blip2LlmConfig, LlmConfig
    from vlm.models.qformer import QFormerConfig
    from vlm.models.vit import ViTConfig
    from vlm.train.config import load_config, named_config
    from vlm.train.run import run_kind

    if shape in ("tiny", "base"):
        found: Any = load_config(run_kind("blip2-llm"), named_config("blip2-llm", shape), []).model
        return replace(found, llm=LlmConfig(width=width))
    first: Any = load_config(run_kind("blip2"), named_config("blip2", "base"), []).model
    image: ViTConfig = first.image  # the published encoder
    instructed = shape == "instructed"
    words = first.qformer.text.vocab_size if instructed else 0
    text = replace(first.qformer.text, vocab_size=words)
    qformer: QFormerConfig = replace(first.qformer, text=text, speaks=False, instructed=instructed)
    return Blip2LlmConfig(image, qformer, LlmConfig(width=width))


def size(network: Any) -> int:
    """Numbers of a network; tied ones count once."""
    return sum(parameter.numel() for parameter in network.parameters())


def llm_bytes(llm: Any, kind: str) -> int:
    """Bytes of a language model's weights; its embeddings, head and norms are fp32 where its layers have fewer bits,
    as `vlm.weights.llm` holds them."""
    from torch import nn

    whole = size(llm)
    if kind in ("fp32", "bf16"):
        return whole * (4 if kind == "fp32" else 2)
    head = llm.get_output_embeddings()
    linear = [one.weight for one in llm.modules() if type(one) is nn.Linear and one is not head]
    small: Callable[[Any], int] = int8_bytes if kind == "int8" else nf4_bytes
    return sum(map(small, linear)) + 4 * (whole - sum(weight.numel() for weight in linear))


def int8_bytes(weight: Any) -> int:
    """Of an (out, in) weight: a byte each, and an fp32 scale for each row."""
    return int(weight.numel() + 4 * weight.shape[0])


def nf4_bytes(weight: Any) -> int:
    """Of a weight: half a byte each, and an fp32 scale for each block."""
    return int(weight.numel() // 2 + 4 * -(-weight.numel() // BLOCK))


def cache_bytes(config: Any, places: int) -> int:
    """Of a row's keys and values in bf16, of so many places; a seq2seq model keeps its encoder's for the decoder."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "d_kv", None) or config.hidden_size // config.num_attention_heads
    return int(2 * 2 * config.num_hidden_layers * heads * width * places)


def markdown(result: Mapping[str, Any]) -> str:
    """The result as a small page."""
    lines = [
        "# Memory of BLIP-2, counted",
        "",
        "| size | language model | image, Q-Former, LLM: parameters in M | trained, % | "
        + " | ".join(f"run, LLM in {kind}, GB" for kind in KINDS)
        + " | "
        + " | ".join(f"train, {kind}, GB" for kind in KINDS)
        + " | cache of a row, MB |",
        "|" + "---|" * (5 + 2 * len(KINDS)),
    ]
    for row in result["rows"]:
        parts = row["parameters"]
        share = 100 * parts["qformer"] / sum(parts.values())
        numbers = ", ".join(f"{parts[part] / 1e6:,.0f}" for part in ("image", "qformer", "llm"))
        cells = [f"{row[what][kind] / 1e9:.1f}" for what in ("run_bytes", "train_bytes") for kind in KINDS]
        lines.append(
            f"| {row['name']} | {row['llm']} | {numbers} | {share:.1f} | {' | '.join(cells)} | "
            f"{row['cache_bytes'] / 1e6:.1f} |"
        )
    lines += [
        "",
        "Counted from the shapes of the tensors. To run: all weights, those beside the LLM in fp32 or (with any other "
        "kind) bf16. To train the second stage: the LLM as named, the frozen image encoder in fp32, 16 bytes for each "
        "trained number (fp32 weight, gradient and AdamW's moments); activations come on top and grow with the batch. "
        f"The cache holds {TEXT} tokens behind the queries in bf16.",
        "",
        listed(result["versions"]) + ".",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
