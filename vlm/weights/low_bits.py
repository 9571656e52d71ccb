"""Weights of a frozen network in 8 or 4 bits, by the libraries that can."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from vlm.errors import WeightsError

NEEDED = {"int8": "torchao", "nf4": "bitsandbytes"}


def hold_in_few_bits(network: nn.Module, kind: str) -> None:
    """Replace a network's linear layers, its head excepted, by ones with weights in `int8` or `nf4`, in place.

    int8 (torchao, weight only, a scale for each row) works on CPUs and GPUs; nf4 (bitsandbytes, arXiv 2305.14314 §3)
    on CUDA GPUs: its bits are packed when the network moves there. Raises WeightsError where that can't be done here.
    """
    package = NEEDED[kind]
    if importlib.util.find_spec(package) is None:
        raise WeightsError(f"llm.weights {kind} needs {package}: pip install {package}, or set llm.weights to bf16")
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        head = network.get_output_embeddings()  # type: ignore[operator]
        # A head is often tied to the embedding, in which rows are looked up.
        quantize_(network, Int8WeightOnlyConfig(), filter_fn=lambda one, _: type(one) is nn.Linear and one is not head)
        network.requires_grad_(False)
        return
    if not torch.cuda.is_available():
        raise WeightsError(
            "llm.weights nf4: bitsandbytes packs 4 bits on CUDA GPUs, and there is none; use int8 or bf16"
        )
    _to_nf4(network)


def _to_nf4(network: nn.Module) -> None:
    import bitsandbytes as bnb

    head = network.get_output_embeddings()  # type: ignore[operator]
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not head:
                bias = child.bias is not None
                small: Any = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, bias, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
                small.weight = bnb.nn.Params4bit(child.weight.detach(), requires_grad=False, quant_type="nf4")
                small.bias = child.bias
                setattr(parent, name, small)
