"""ALBEF as a network: what it gives, padding and batches, shared images, temperature, settings that are refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.models.small import close, far
from tests.models.small_albef import ALBEF, batch, build
from vlm.errors import ConfigError
from vlm.models.albef import Albef, AlbefConfig
from vlm.models.attention import Attention
from vlm.models.clip import Clip, ClipConfig
from vlm.models.transformer import Layer, Transformer


def test_defaults_are_the_papers() -> None:
    with torch.device("meta"):
        model = Albef(AlbefConfig())
    assert model.fusion_start == 6 and AlbefConfig().text.cross_layers == (6, 7, 8, 9, 10, 11)
    sizes = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in model.named_children()}
    assert sizes["image"] == pytest.approx(85.8, abs=0.2)  # the paper's figures, in millions (§3.1)
    assert sizes["text"] + sizes["mlm_head"] == pytest.approx(123.7, abs=0.1)
    assert model.logit_scale.shape == (1,)


def test_parts_are_called_as_clips() -> None:
    clip = {name for name, _ in Clip(ClipConfig(image=ALBEF.image, text=ALBEF.text)).named_children()}
    own = {name for name, _ in build().named_children()}
    assert own - clip == {"itm_head", "mlm_head"} and clip <= own
    assert "log_scale" in dict(build().named_parameters())


def test_one_transformer_class_reads_every_text() -> None:
    """CLIP's text, ALBEF's text and fusion; no other module of theirs has a self-attention of its own."""
    for model in (Clip(ClipConfig(image=ALBEF.image, text=ALBEF.text)), build()):
        assert type(model.text) is Transformer
        rest = [module for name, module in model.named_modules() if not name.startswith(("text.", "image."))]
        assert not any(isinstance(module, Attention | nn.MultiheadAttention) for module in rest)
        assert all(type(module) is Layer for module in model.text.layers)


@pytest.mark.parametrize("image_pool", ["cls", "mean"])
@pytest.mark.parametrize("text_pool", ["cls", "eot", "mean"])
def test_features_have_unit_norm_and_come_before_fusion(image_pool: Any, text_pool: Any) -> None:
    model, some = build(replace(ALBEF, image_pool=image_pool, text_pool=text_pool)), batch(5)
    image, text = model.encode_image(some.pixels), model.encode_text(some.tokens)
    for features in (image, text):
        assert features.shape == (5, 16)
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(5))
    with torch.no_grad():
        for parameter in model.text.layers[2:].parameters():
            parameter.add_(1.0)
    close(model.encode_text(some.tokens), text)


def test_projections_have_a_bias_if_asked() -> None:
    assert build().image_projection.bias is not None and build().text_projection.bias is not None
    bare = build(replace(ALBEF, projection_bias=False))
    assert bare.image_projection.bias is None and bare.text_projection.bias is None


def test_verbs_agree_with_cached_states() -> None:
    model, some = build(), batch(4)
    image, text = model.image_states(some.pixels), model.text_states(some.tokens)
    close(image.features, model.encode_image(some.pixels))
    close(text.features, model.encode_text(some.tokens))
    keys = model.image_keys_values(image.states)
    logits = model.match_states(text.states, text.mask, keys)
    assert logits.shape == (4, 2)
    close(model.match(some.pixels, some.tokens), logits)
    fused = model.fuse(text.states, text.mask, keys)
    guessed = model.mlm_logits(some.pixels, some.tokens)
    assert guessed.shape == (4, 8, 50)
    close(guessed, model.mlm_head(fused, model.text.tokens.weight))
    similar = model.similarity(image.features, text.features)
    close(similar, image.features @ text.features.T / 0.07)


def test_texts_look_at_their_image() -> None:
    model, some = build(), batch(4)
    assert far(model.match(some.pixels, some.tokens), model.match(some.pixels.flip(0), some.tokens))
    assert far(model.mlm_logits(some.pixels, some.tokens), model.mlm_logits(some.pixels.flip(0), some.tokens))


def test_several_texts_share_an_image() -> None:
    model, pictures, some = build(), batch(2), batch(6, seed=3)
    keys = model.image_keys_values(model.image_states(pictures.pixels).states)
    text = model.text_states(some.tokens)
    shared = model.match_states(text.states, text.mask, keys)
    close(shared, model.match(pictures.pixels.repeat_interleave(3, dim=0), some.tokens))


def test_padding_and_batch_change_no_result() -> None:
    model, some = build(replace(ALBEF, text=replace(ALBEF.text, context_length=12))), batch(4)
    wider = {name: F.pad(some.tokens[name], (0, 3), value=0) for name in some.tokens}
    together = {"match": model.match(some.pixels, some.tokens), "text": model.encode_text(some.tokens)}
    close(model.match(some.pixels, wider), together["match"])
    close(model.encode_text(wider), together["text"])
    close(model.mlm_logits(some.pixels, wider)[:, :8], model.mlm_logits(some.pixels, some.tokens))
    for i in range(4):
        one = {name: some.tokens.select(slice(i, i + 1))[name] for name in some.tokens}
        close(model.match(some.pixels[i : i + 1], one)[0], together["match"][i])
        close(model.encode_text(one)[0], together["text"][i])
        close(model.encode_image(some.pixels[i : i + 1])[0], model.encode_image(some.pixels)[i])


def test_integer_masks_are_taken() -> None:
    model, some = build(), batch(4)
    tokens = {"input_ids": some.tokens.input_ids, "attention_mask": some.tokens.attention_mask.long()}
    close(model.match(some.pixels, tokens), model.match(some.pixels, some.tokens))
    close(model.encode_text(tokens), model.encode_text(some.tokens))


@pytest.mark.parametrize(("start", "expected"), [(1e6, 1000.0), (1e-3, 2.0), (14.0, 14.0)])
def test_clamp_keeps_the_temperature_in_bounds(start: float, expected: float) -> None:
    model = build()
    with torch.no_grad():
        model.log_scale.fill_(math.log(start))
    model.clamp_()
    assert model.logit_scale.item() == pytest.approx(expected, rel=1e-5)
    assert model.log_scale.requires_grad and model.log_scale.grad_fn is None


def test_checkpointing_reaches_both_towers() -> None:
    model = build()
    assert not model.checkpointing
    model.checkpointing = True
    assert model.image.checkpointing and model.text.checkpointing and model.checkpointing


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"image_pool": "avg"}, "image_pool 'avg'"),
        ({"text_pool": "eos"}, "text_pool 'eos'"),
        ({"negatives": "hrad"}, "did you mean 'hard'"),
        ({"hard_share": 0.0}, "negatives=random for 0"),
        ({"hard_share": 1.5}, "at 1 at most"),
        ({"text": replace(ALBEF.text, cross_layers=())}, "must be the last of 4 layers"),
        ({"text": replace(ALBEF.text, cross_layers=(1, 3))}, r"\[1, 3\] must be the last"),
        ({"text": replace(ALBEF.text, cross_layers=(1, 2))}, r"\[1, 2\] must be the last"),
        ({"text": replace(ALBEF.text, cross_width=32)}, "cross_width 32 must be image.width 24"),
        ({"text": replace(ALBEF.text, cross_width=0)}, "cross_width 0 must be image.width 24"),
        ({"text": replace(ALBEF.text, causal=True)}, "text.causal must be false"),
        ({"logit_scale_init": 1.0}, "between logit_scale_min"),
        ({"logit_scale_min": 0.0}, "between logit_scale_min"),
        ({"itm_weight": -1.0}, "at least 0"),
        ({"itc_weight": 0.0, "itm_weight": 0.0, "mlm_weight": 0.0}, "one of them above"),
    ],
)
def test_bad_settings_are_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Albef(replace(ALBEF, **change))
