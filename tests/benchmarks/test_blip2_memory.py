"""What BLIP-2 takes at published sizes is counted right."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from vlm.models.int8 import hold_in_int8

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import blip2_memory

    return blip2_memory


def test_published_sizes_come_out(bench: ModuleType) -> None:
    """BLIP-2's tables give 3.8 B and 4.1 B parameters, of which 104 M and 103 M learn; ViT-g has about 1 B."""
    for name, whole in (("OPT-2.7B", 3.75e9), ("FlanT5-XL", 3.94e9)):
        parts = bench.count("BLIP-2", "published", name)["parameters"]
        assert sum(parts.values()) == pytest.approx(whole, rel=0.01)
        assert parts["qformer"] == pytest.approx(107e6, rel=0.01)
        assert parts["image"] == pytest.approx(986e6, rel=0.01)


def test_bytes_follow_from_the_parts(bench: ModuleType) -> None:
    row = bench.count("tiny", "tiny", "SmolLM2-135M")
    image, qformer, llm = (row["parameters"][part] for part in ("image", "qformer", "llm"))
    assert llm == 134515008  # of its file
    assert row["run_bytes"]["fp32"] == 4 * (image + qformer + llm)
    assert row["train_bytes"]["bf16"] == 4 * image + 16 * qformer + 2 * llm
    assert row["run_bytes"]["nf4"] < row["run_bytes"]["int8"] < row["run_bytes"]["bf16"]
    # 30 layers of 3 heads of 64, keys and values of 2 bytes, at 8 queries and 32 tokens
    assert row["cache_bytes"] == 30 * 3 * 64 * 2 * 2 * 40


def test_int8_is_what_our_layers_hold(bench: ModuleType) -> None:
    network = nn.Sequential(nn.Linear(96, 64, bias=False)).to(torch.bfloat16)
    counted = bench.int8_bytes(network[0].weight)
    hold_in_int8(network)
    assert counted == sum(held.numel() * held.element_size() for held in network.buffers())


def test_the_command_writes_its_sizes(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SIZES", bench.SIZES[:3])
    bench.main(["--out", str(tmp_path)])
    rows = json.loads((tmp_path / "blip2_memory.json").read_text("utf-8"))["rows"]
    assert [row["llm"] for row in rows] == ["SmolLM2-135M", "OPT-2.7B", "OPT-2.7B"]
    text = (tmp_path / "blip2_memory.md").read_text("utf-8")
    assert text.count("\n| BLIP-2, ViT-g | OPT-2.7B | 986, 107, 2,652 |") == 1
