"""Language models held in fewer bits: what they say, what they are made of, and what learns beside them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.models.small_llm import WIDTH, inner, llm_folder, stage, visual_prompt
from vlm.errors import ConfigError, WeightsError
from vlm.models.blip2_llm import LlmConfig
from vlm.models.lora import LoraConfig, add_lora, merge_lora
from vlm.weights import llm as llms
from vlm.weights import low_bits
from vlm.weights.llm import load_llm, weights_hash

SETTINGS = LlmConfig(width=WIDTH)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llm_folder(tmp_path_factory.mktemp("llm"))


def test_int8_says_nearly_the_same_in_less_memory(folder: Path) -> None:
    whole, _ = load_llm(str(folder), SETTINGS)
    small, digest = load_llm(str(folder), replace(SETTINGS, weights="int8"))
    assert digest == weights_hash(inner("llama"))  # of what it was made from
    visual = visual_prompt(2).requires_grad_()
    ids = torch.randint(3, 30, (2, 5))
    exact, near = (model.logits(visual, ids, torch.ones_like(ids)) for model in (whole, small))
    gap = (near - exact).norm() / exact.norm()
    assert 0 < gap < 0.05
    near.sum().backward()
    assert visual.grad is not None and visual.grad.abs().sum() > 0
    layer = small.inner.model.layers[0].mlp.up_proj  # type: ignore[union-attr, index]
    assert layer.weight.dtype is torch.int8 and layer.scale.shape == (len(layer.weight),)


def test_int8_is_made_of_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bf16 as it is, so that the whole is never there in fp32; the numbers are those made of fp32."""
    folder = llm_folder(tmp_path)
    inner("llama").bfloat16().save_pretrained(folder)
    seen: list[torch.dtype] = []

    def watched(network: nn.Module, kind: str) -> None:
        seen.extend(parameter.dtype for parameter in network.parameters())
        low_bits.hold_in_few_bits(network, kind)

    monkeypatch.setattr(llms, "hold_in_few_bits", watched)
    small = load_llm(str(folder), replace(SETTINGS, weights="int8"))[0].inner
    assert set(seen) == {torch.bfloat16}
    whole: nn.Module = load_llm(str(folder), SETTINGS)[0].inner
    low_bits.hold_in_few_bits(whole, "int8")
    expected = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    found = {**dict(small.named_parameters()), **dict(small.named_buffers())}
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert {value.dtype for value in found.values()} == {torch.int8, torch.float32}


def test_nf4_is_refused_without_what_it_needs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older versions of the library have no code for CPUs."""
    older = SimpleNamespace(__version__="0.45.0", __spec__=object())
    monkeypatch.setitem(sys.modules, "bitsandbytes", older)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(WeightsError, match=r"0\.45\.0 packs 4 bits on CUDA GPUs alone, none is here; .* to int8"):
        low_bits.hold_in_few_bits(inner("llama"), "nf4")


@pytest.mark.skipif(torch.cuda.is_available(), reason="packed when it moves to the GPU")
def test_nf4_says_nearly_the_same_in_half_of_int8_s_memory(folder: Path) -> None:
    """On a CPU; and LoRA beside it learns, and stays beside it."""
    model = {kind: load_llm(str(folder), replace(SETTINGS, weights=kind))[0] for kind in ("fp32", "int8", "nf4")}  # type: ignore[arg-type]
    small = model["nf4"].to(torch.float32)
    weights = {kind: one.inner.model.layers[0].mlp.up_proj.weight for kind, one in model.items()}  # type: ignore[union-attr, index]
    assert weights["nf4"].dtype is torch.uint8 and 2 * weights["nf4"].numel() == weights["int8"].numel()
    scales = weights["nf4"].quant_state.absmax  # as `benchmarks/blip2_memory.py` counts them
    assert scales.dtype is torch.float32 and 64 * scales.numel() == weights["int8"].numel()
    visual, ids = visual_prompt(2).requires_grad_(), torch.randint(3, 30, (2, 5))
    mask = torch.ones_like(ids)
    exact, near = model["fp32"].logits(visual, ids, mask), small.logits(visual, ids, mask)
    assert 0 < (near - exact).norm() / exact.norm() < 0.4  # of random numbers, which four bits hold badly
    add_lora(small, ["q_proj"], LoraConfig(rank=2))
    for name, parameter in small.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    before = small.logits(visual, ids, mask)
    before.sum().backward()
    assert all(parameter.grad is not None for parameter in (visual, *small.parameters()) if parameter.requires_grad)
    assert merge_lora(small) == 0
    torch.testing.assert_close(small.logits(visual, ids, mask), before)
    assert not torch.allclose(before, near, atol=1e-2)


def test_half_precision_stays_when_the_network_changes_its_own(folder: Path) -> None:
    model, _ = load_llm(str(folder), replace(SETTINGS, weights="bf16"))
    network = stage()
    network.attach(model)
    network.to(torch.float64)
    assert network.projection.weight.dtype is torch.float64
    assert {parameter.dtype for parameter in network.llm.parameters()} == {torch.bfloat16}


def test_lora_beside_half_precision_learns_in_fp32_and_not_beside_int8(folder: Path) -> None:
    """Steps of a thousandth are lost in bf16's eight bits."""
    model, _ = load_llm(str(folder), replace(SETTINGS, weights="bf16"))
    settings = LoraConfig(rank=2)
    add_lora(model, ["q_proj", "v_proj"], settings)
    kinds = {"lora_" in name: parameter.dtype for name, parameter in model.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    visual, ids = visual_prompt(2), torch.randint(3, 30, (2, 5))
    before = model.logits(visual, ids, torch.ones_like(ids))
    assert before.dtype is torch.bfloat16 and merge_lora(model) == 4
    torch.testing.assert_close(model.logits(visual, ids, torch.ones_like(ids)), before, rtol=0.05, atol=0.05)
    small, _ = load_llm(str(folder), replace(SETTINGS, weights="int8"))
    with pytest.raises(ConfigError, match=r"held in int8.*set model\.llm\.weights to bf16 or nf4"):
        add_lora(small, ["q_proj"], settings)
