"""What BLIP-2 begins as: an image encoder, a text encoder as a Q-Former, another BLIP-2."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.models.small_albef import ALBEF
from tests.models.small_blip2 import BLIP2, build
from vlm.data.tokenizers import wordpiece
from vlm.errors import WeightsError
from vlm.models.blip2 import Blip2, Blip2Config
from vlm.models.clip import Clip, ClipConfig
from vlm.weights.start import find_minilm, start_from, start_parts

START = 5  # the id that texts begin with


def fresh(config: Blip2Config = BLIP2) -> Blip2:
    torch.manual_seed(9)
    return Blip2(config)


def clip(layers: int = 3) -> Clip:
    torch.manual_seed(1)
    text = replace(ALBEF.text, layers=layers, cross_layers=(), vocab_size=49)
    model = Clip(ClipConfig(image=ALBEF.image, text=text, embed_dim=16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_a_text_encoder_becomes_queries_and_words() -> None:
    """Words read alone what they read before; the queries' feed-forward is a copy; [DEC] begins as the start token."""
    first, model = clip(), fresh()
    start_parts(model, first.state_dict(), where="clip", start_id=START)
    own, old = model.qformer.state_dict(), first.text.state_dict()
    for layer in range(3):
        for part in ("mlp.{}.up.weight", "mlp.{}.down.bias", "mlp_norm.{}.weight"):
            name = f"layers.{layer}.{part}"
            for route in ("text", "query"):
                assert torch.equal(own[f"text.{name.format(route)}"], old[name.format("text")]), name
    assert torch.equal(own["text.tokens.weight"][49], old["tokens.weight"][START])
    ids, mask = torch.randint(0, 49, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    # Token types aren't in a Q-Former; the one that all words had went into the positions.
    torch.testing.assert_close(
        model.qformer.words(ids, mask), first.text(first.text.embed(ids), key_mask=mask), rtol=1e-5, atol=1e-5
    )
    images = model.image.state_dict()
    assert all(torch.equal(images[name], value) for name, value in first.image.state_dict().items())
    began, left = fresh().state_dict(), model.state_dict()
    for name in ("qformer.query_tokens", "qformer.lm_head.dense.weight", "image_projection.weight", "log_scale"):
        assert torch.equal(left[name], began[name]), name
    assert torch.equal(left["qformer.text.layers.0.cross_attn.kv.weight"],
                       began["qformer.text.layers.0.cross_attn.kv.weight"])  # fmt: skip


def test_a_clip_with_another_text_tower_gives_its_images_alone(caplog: pytest.LogCaptureFixture) -> None:
    first, model, began = clip(layers=4), fresh(), fresh()
    with caplog.at_level(logging.WARNING):
        start_parts(model, first.state_dict(), where="clip", start_id=START)
    assert "text tower has another shape than the Q-Former's" in caplog.text
    assert torch.equal(model.image.trunk.norm.weight, first.image.trunk.norm.weight)
    assert all(torch.equal(v, began.qformer.state_dict()[n]) for n, v in model.qformer.state_dict().items())


def state(model: Blip2) -> dict[str, Tensor]:
    return dict(model.state_dict())


def test_another_blip2_gives_all_that_both_have() -> None:
    first = build()
    model = fresh(replace(BLIP2, heads=("itc", "itm")))
    start_parts(model, state(first), where="blip2", start_id=START)
    assert all(torch.equal(value, first.state_dict()[name]) for name, value in model.state_dict().items())
    speaking = fresh()
    start_parts(speaking, state(model), where="blip2", start_id=START)
    assert torch.equal(speaking.qformer.query_tokens, first.qformer.query_tokens)
    broken = {name: value for name, value in state(first).items() if name != "qformer.query_tokens"}
    with pytest.raises(WeightsError, match=r"its Q-Former lacks qformer\.query_tokens"):
        start_parts(fresh(), broken, where="blip2", start_id=START)


def test_minilm_starts_a_qformer() -> None:
    """By its folder, with the shape checked and a word more."""
    try:
        find_minilm()
    except WeightsError:
        pytest.skip("MiniLM isn't installed")
    text = replace(
        BLIP2.qformer.text, vocab_size=30523, context_length=512, width=384, layers=6, heads=12, mlp_width=1536,
        cross_layers=(0, 2, 4),
    )  # fmt: skip
    config = replace(BLIP2, qformer=replace(BLIP2.qformer, text=text, dec_id=30522))
    model = fresh(config)
    start_from(model, "minilm")
    tokens = model.qformer.text.tokens.weight
    assert torch.equal(tokens[30522], tokens[wordpiece().start_id])
    layer = model.qformer.text.layers[3]
    assert torch.equal(layer.mlp["query"].up.weight, layer.mlp["text"].up.weight)  # type: ignore[index, union-attr]
    wrong = replace(config, qformer=replace(config.qformer, text=replace(text, heads=6)))
    with pytest.raises(WeightsError, match=r"model\.qformer\.text\.heads is 6, expected 12"):
        start_from(fresh(wrong), "minilm")
