"""BLIP-2's second step: what learns, what stays, what is stored, and what the loss is taken on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.models.small_llm import END, FIRST, WORDS, language_model, stage, texts
from vlm.data.batch import Batch, Tokens
from vlm.errors import ConfigError
from vlm.models.blip2_llm import Blip2Llm, LlmConfig
from vlm.models.lora import LoraConfig, add_lora, merge_lora

LORA = LoraConfig(rank=2, targets={"llm": ("q_proj", "v_proj"), "image": ("qkv",), "qformer": ("q", "kv")})


def batch(lengths: list[int], given: list[int] | None = None) -> Batch:
    ids, mask = texts(lengths)
    for row, length in enumerate(lengths):
        ids[row, length - 1] = END
    pixels = torch.randn(len(lengths), 3, 32, 32, generator=torch.Generator().manual_seed(3))
    keys = tuple(str(row) for row in range(len(lengths)))
    rows = torch.arange(len(lengths))[:, None]
    return Batch(pixels, Tokens(ids, mask), rows, keys, given=None if given is None else torch.tensor(given))


@pytest.mark.parametrize("kind", ["llama", "llama" + FIRST, "t5"])
def test_loss_is_on_what_is_said_alone(kind: str) -> None:
    network, rows = stage(kind), batch([4, 7, 6], [1, 4, 2])
    total, count = 0.0, 0
    for row, (length, given) in enumerate(zip([4, 7, 6], [1, 4, 2], strict=True)):
        ids = rows.tokens.input_ids[row : row + 1, :length]
        tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            logits = network.lm_logits(rows.pixels[row : row + 1], tokens, torch.tensor([given]))[0]
        total += float(F.cross_entropy(logits[given - 1 : -1], ids[0, given:], reduction="sum"))
        count += length - given
    assert network.loss(rows)["loss"].item() == pytest.approx(total / count, abs=1e-5)
    alone = network.loss(replace(rows, given=None))
    assert abs(alone["loss"].item() - total / count) > 1e-3


@pytest.mark.parametrize("kind", ["llama", "opt", "t5"])
def test_only_qformer_and_projection_learn(kind: str) -> None:
    network = stage(kind).train()
    assert network.qformer.training and not network.image.training
    assert not any(module.training for module in network.llm.modules())
    network.loss(batch([4, 6]))["loss"].backward()
    for name, parameter in network.named_parameters():
        learns = name.startswith(("qformer.", "projection."))
        assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) == learns, name
        assert parameter.requires_grad == learns


def test_language_model_is_stored_nowhere() -> None:
    network, other = stage(seed=0), stage(seed=1)
    stored = network.state_dict()
    assert {name.split(".")[0] for name in stored} == {"image", "qformer", "projection"}
    before = {name: value.clone() for name, value in other.llm.named_parameters()}
    other.load_state_dict(stored)  # strict
    assert all(torch.equal(other.state_dict()[name], value) for name, value in stored.items())
    assert all(torch.equal(dict(other.llm.named_parameters())[name], value) for name, value in before.items())
    with pytest.raises(RuntimeError, match=r"qformer\.query_tokens"):
        other.load_state_dict({name: value for name, value in stored.items() if name != "qformer.query_tokens"})


def test_lora_learns_beside_frozen_weights_and_merged_equals_unmerged() -> None:
    network, rows = stage(lora=LORA), batch([5, 6])
    before = network.loss(rows)["loss"]
    network.adapt()
    torch.testing.assert_close(network.loss(rows)["loss"], before)  # it adds 0 at first
    learning = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert learning == {name for name in learning if "lora_" in name or name.startswith("projection.")}
    for part in LORA.targets:
        assert any(name.startswith(f"{part}.") and "lora_B" in name for name in learning), part
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    network.train().loss(rows)["loss"].backward()
    assert all(parameter.grad is not None for parameter in network.parameters() if parameter.requires_grad)
    stored = network.state_dict()
    assert any(name.startswith("llm.") for name in stored)
    assert all("lora_" in name for name in stored if name.startswith("llm."))
    changed = network.eval().loss(rows)["loss"]
    assert abs(float(changed - before)) > 1e-3
    assert merge_lora(network) == 2 * 2 + 2 + 2 * 3  # layers of LLM, image encoder, Q-Former
    torch.testing.assert_close(network.loss(rows)["loss"], changed, rtol=1e-5, atol=1e-5)
    assert not any("lora_" in name for name, _ in network.named_parameters())


def test_an_addition_beside_weights_of_few_bits_stays() -> None:
    """bitsandbytes keeps two of its four-bit numbers in a byte, in another shape."""
    model = language_model("llama")
    add_lora(model, ["q_proj"], LoraConfig(rank=2))
    first, second = (layer.self_attn for layer in model.inner.model.layers)  # type: ignore[union-attr]
    few = torch.zeros(32 * 32 // 2, 1, dtype=torch.uint8)
    first.q_proj.base_layer.weight = nn.Parameter(few, requires_grad=False)
    assert merge_lora(model) == 1
    assert hasattr(first.q_proj, "lora_A") and type(second.q_proj) is nn.Linear


def test_stored_lora_comes_back() -> None:
    network, again = stage(lora=LORA), stage(lora=LORA, seed=0)
    network.adapt()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    again.adapt()
    again.load_state_dict(network.state_dict())
    rows = batch([5, 6])
    torch.testing.assert_close(again.loss(rows)["loss"], network.loss(rows)["loss"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"llm": LlmConfig(width=8)}, "width is 8, but smollm2 is 32 wide"),
        ({"llm": LlmConfig(width=32, weights="int4")}, "expected one of fp32"),  # type: ignore[arg-type]
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"lora": LoraConfig(rank=1, targets={"llm": ("nothing",)})}, "no such layer; there are"),
        ({"lora": LoraConfig(rank=1, targets={"lmm": ("q_proj",)})}, "no part lmm"),
    ],
)
def test_settings_that_cant_be_are_refused(settings: dict[str, Any], said: str) -> None:
    config = replace(stage().config, **settings)
    with pytest.raises(ConfigError, match=said):
        network = Blip2Llm(config)
        network.attach(language_model("llama"))
        network.adapt()


def test_the_start_stands_where_the_setting_says() -> None:
    network = stage()
    first = Blip2Llm(replace(network.config, llm=LlmConfig(width=32, start_first=True)))
    first.load_state_dict(network.state_dict())
    first.attach(language_model("llama"))
    rows = batch([5, 6])
    wanted = language_model("llama" + FIRST).logits(
        network.visual_prompt(rows.pixels), rows.tokens["input_ids"], rows.tokens["attention_mask"]
    )
    found = first.lm_logits(rows.pixels, rows.tokens)
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, network.lm_logits(rows.pixels, rows.tokens), atol=1e-2)
    with pytest.raises(ConfigError, match=r"llm\.start_first: smollm2 is a seq2seq model"):
        first.attach(language_model("t5"))


def test_words_in_its_qformer_are_refused() -> None:
    config = stage().config
    wrong = replace(config.qformer, text=replace(config.qformer.text, vocab_size=WORDS))
    with pytest.raises(ConfigError, match="reads none but an instruction"):
        Blip2Llm(replace(config, qformer=wrong))
