"""Weights of a frozen network in 8 or 4 bits."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from vlm.errors import WeightsError
from vlm.models.int8 import hold_in_int8


def hold_in_few_bits(network: nn.Module, kind: str) -> None:
    """Replace a language model's linear layers, its head excepted, by ones with `int8` or `nf4` weights, in place.

    int8 works on every device, without a library: torchao does the same, but once it is installed transformers imports
    it, which takes seconds, with every model. nf4 (4 bits, arXiv 2305.14314 §3) comes from bitsandbytes, for CPUs and
    CUDA GPUs: where there is such a GPU weights are packed when the network moves to its device, else at once. Raises
    WeightsError where that can't be done here.
    """
    # A head is often tied to the embedding, in which rows are looked up.
    head = network.get_output_embeddings()  # type: ignore[operator]
    if kind == "int8":
        hold_in_int8(network, but=head)
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise WeightsError(
            "llm.weights nf4 needs bitsandbytes: pip install 'bitsandbytes>=0.50', or set llm.weights to int8"
        )
    import bitsandbytes

    if not torch.cuda.is_available() and "cpu" not in getattr(bitsandbytes, "supported_torch_devices", ()):
        raise WeightsError(
            f"llm.weights nf4: bitsandbytes {bitsandbytes.__version__} packs 4 bits on CUDA GPUs alone, none is here; "
            "pip install --upgrade bitsandbytes, or set llm.weights to int8 or bf16"
        )
    _to_nf4(network, head)


def _to_nf4(network: nn.Module, head: nn.Module) -> None:
    import bitsandbytes as bnb

    on_gpu = torch.cuda.is_available()
    kind = torch.bfloat16 if on_gpu else torch.float32  # few CPUs have products of bf16
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not head:
                bias = child.bias is not None
                small: Any = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, bias, compute_dtype=kind, quant_type="nf4", device="meta"
                )
                weight: Any = bnb.nn.Params4bit(
                    child.weight.detach(), requires_grad=False, compress_statistics=False, quant_type="nf4"
                )
                small.weight = weight if on_gpu else weight.to("cpu")
                small.bias = child.bias
                # A layout of CPUs with bf16 products, which bitsandbytes changes to when no gradient is asked for and
                # which gives none once one is.
                small.support_avx512bf16_for_cpu = False
                setattr(parent, name, small)
