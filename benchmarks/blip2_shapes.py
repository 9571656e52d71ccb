"""Networks of BLIP-2's recipes in full size, filled cheaply, and what `blip2_peak.py` does with them.

Weights are random and made in place, in the shapes of the recipe and of the published language model, so that nothing
has to be there and the largest takes seconds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from blip2_memory import LLMS, TRAINED, llm_bytes, make_llm
from blip2_train import make_step, trainer

NEW_TOKENS = 20
"""Of a caption, as `vlm caption` has them; it gets its full length."""
BLOCK = 1 << 20
"""Random numbers that weights are filled with, over and over: drawing billions takes minutes."""
DRAWN = ("normal_", "uniform_", "kaiming_uniform_")
START, END = 1, 2
"""Ids that a text starts and ends with."""
LLM_OF = {"tiny": "SmolLM2-135M", "base": "OPT-2.7B"}
SMALL = [
    *("model.image.image_size=32", "model.image.patch_size=16", "model.image.width=32", "model.image.layers=2"),
    *("model.image.heads=2", "model.image.mlp_width=64", "model.qformer.text.width=32", "model.qformer.text.heads=2"),
    *("model.qformer.text.mlp_width=64", "model.qformer.text.cross_width=32"),
]
"""Makes a recipe so small that it takes next to nothing: what it needs of code and libraries is loaded by then."""
SMALL_LLM: Mapping[str, Mapping[str, int]] = {
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 1},
    "opt": {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Something that is measured."""

    recipe: str
    stage: str
    act: str
    """`run`: write a caption; `train`: make a step."""
    weights: str = ""
    """How the language model is held; empty for stage 1, which has none."""
    rest: str = "fp32"
    """Type of the other weights; in training always fp32."""
    batch: int = 1
    tokens: int = 32
    """Of a text that is trained on, start and end counted; 32 is the recipes' longest."""
    recompute: bool = False
    """The recipe's `checkpointing`."""
    small: bool = False
    """Whether all sizes are next to nothing."""


@contextlib.contextmanager
def write(case: Case, device: str) -> Iterator[Any]:
    """Writes a caption of one picture as `vlm caption` does, by three beams."""
    import torch

    from vlm.generate import GenerationConfig
    from vlm.models.packed import pack_linears
    from vlm.weights.loaded import VisionLanguageModel

    network = build(case, settings(case)).to(device, kind_of(case.rest)).eval().requires_grad_(False)
    pack_linears(network)
    ids: Any = SimpleNamespace(end_id=END, pad_id=0, max_length=512, decode=lambda _: "")
    transform: Any = None  # pixels are given
    model = VisionLanguageModel(network, ids, transform, name=case.recipe, family=case.stage)
    side = network.config.image.image_size
    pixels = torch.randn(case.batch, 3, side, side).to(model.device, model.dtype)
    begin = torch.tensor([[START, END]] * case.batch, device=model.device)
    prompt = {"input_ids": begin, "attention_mask": torch.ones_like(begin)}
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS - 1)
    yield lambda: model.generate(pixels, prompt, config)


@contextlib.contextmanager
def train(case: Case, device: str) -> Iterator[Any]:
    """Makes a training step that isn't the first: the optimiser has its moments."""
    import torch

    config = settings(case)
    network = build(case, config).to(device).train()
    for part in network.children():
        if hasattr(part, "checkpointing"):
            part.checkpointing = case.recompute
    optimizer, context = trainer(network, config.train, torch.device(device))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    batch = batch_of(case, config).to(device)
    yield lambda: make_step(network, batch, optimizer, context, 1)


def batch_of(case: Case, config: Any) -> Any:
    """Pictures and texts of random numbers, every text at its full length."""
    import torch

    from vlm.data.batch import KINDS, Batch, Tokens

    side = config.model.image.image_size
    ids = torch.randint(END + 1, 30000, (case.batch, case.tokens))
    ids[:, 0], ids[:, -1] = START, END
    rows = torch.arange(case.batch * len(KINDS)).view(case.batch, len(KINDS))  # nothing is alike
    keys = tuple(map(str, range(case.batch)))
    return Batch(torch.randn(case.batch, 3, side, side), Tokens(ids, torch.ones_like(ids).bool()), rows, keys)


def settings(case: Case) -> Any:
    """The recipe, with the width of the language model that takes part."""
    from vlm.train.config import load_config, named_config
    from vlm.train.run import run_kind

    changes = [] if not case.small else [*SMALL, "train.optim.lr_scale={}"]
    if case.weights:
        changes.append(f"model.llm.width={llm_settings(case)['hidden_size']}")
    return load_config(run_kind(case.stage), named_config(case.stage, case.recipe), changes)


def llm_settings(case: Case) -> Mapping[str, Any]:
    """Settings of the language model's configuration."""
    whole = LLMS[LLM_OF[case.recipe]]
    return {**whole, **SMALL_LLM[whole["model_type"]]} if case.small else whole


def build(case: Case, config: Any) -> Any:
    """The network with its language model, held as `vlm.weights.llm` holds it; filled cheaply."""
    import torch

    from vlm.models.llm import LanguageModel
    from vlm.weights.families import family
    from vlm.weights.low_bits import hold_in_few_bits

    with filled_cheaply():
        network: Any = family(case.stage).network(config.model)
        if not case.weights:
            return network
        # From bf16 to int8, and then the rest to fp32, so that the model is never there as a whole in fp32.
        llm = make_llm(llm_settings(case), kind_of("bf16" if case.weights == "int8" else case.weights))
    if case.weights == "int8":
        hold_in_few_bits(llm, "int8")
        llm.to(torch.float32)
    network.attach(LanguageModel(llm, end_id=END, keeps_type=case.weights != "fp32"))
    return network


def kind_of(name: str) -> Any:
    """torch's type by our name."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def filled_cheaply() -> Any:
    """While it is entered, what weights are drawn with fills them with one block of random numbers instead."""
    import torch
    from torch.overrides import TorchFunctionMode

    block = 0.02 * torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))

    def fill(tensor: Any) -> Any:
        numbers = tensor.detach().view(-1)
        for part in numbers.split(BLOCK):
            part.copy_(block[: len(part)])
        return tensor

    class Filled(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            named = kwargs or {}
            if getattr(func, "__name__", "") in DRAWN:
                return fill(args[0] if args else named["tensor"])
            return func(*args, **named)

    return Filled()


def count(case: Case) -> int:
    """Bytes of weights and, in training, of gradients and moments, from the shapes of the tensors."""
    import torch

    from vlm.train.optim import freeze
    from vlm.weights.families import family

    config = settings(case)
    with torch.device("meta"):
        network: Any = family(case.stage).network(config.model)
        llm = make_llm(llm_settings(case), torch.float32) if case.weights else None
    freeze(network, config.train.optim.freeze)
    held = 2 if case.rest == "bf16" else 4
    sizes = {True: TRAINED if case.act == "train" else held, False: held}
    own = sum(one.numel() * sizes[one.requires_grad] for one in network.parameters())
    return own + (llm_bytes(llm, case.weights) if llm is not None else 0)
