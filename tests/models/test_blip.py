"""BLIP as a network: its roles, what they share, padding and batches, what a decoder sees, cached steps, settings."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.small import close, far
from tests.models.small_albef import batch
from tests.models.small_blip import BLIP, DEC, ENC, build
from vlm.errors import ConfigError, MissingVerbError
from vlm.models.blip import SHARING, Blip, BlipConfig
from vlm.models.transformer import KVCache

CAPTION, RETRIEVAL = replace(BLIP, heads=("lm",)), replace(BLIP, heads=("itc", "itm"))


def count(parts: Any) -> int:
    return sum(p.numel() for part in parts for p in part.parameters())


def rows(tokens: Any, chosen: slice) -> dict[str, Tensor]:
    part = tokens.select(chosen)
    return {name: part[name] for name in part}


def test_defaults_are_the_papers() -> None:
    with torch.device("meta"):
        model = Blip(BlipConfig())
    sizes = {name: count([part]) for name, part in model.named_children()}
    # Of the official pre-training checkpoint: the text encoder, the decoder's self-attention and its head.
    assert sizes["image"] == 85_798_656
    assert (sizes["text"], sizes["lm_head"]) == (137_258_496 + 28_366_848, 622_652)
    assert BlipConfig().text.cross_layers == tuple(range(12)) and model.config.label_smoothing == 0.1
    assert model.logit_scale.shape == (1,) and model.teachable


@pytest.mark.parametrize("sharing", SHARING)
def test_sharing_counts_each_tensor_once(sharing: Any) -> None:
    """What stands twice: nothing, self-attention with its norm, or the whole text transformer."""
    model, alone = build(replace(BLIP, sharing=sharing)), build(RETRIEVAL)
    assert alone.text is not None
    layers: Any = list(alone.text.layers)
    twice = {
        "none": count([alone.text]),
        "all_but_self_attention": count([part for layer in layers for part in (layer.self_attn, layer.self_norm)]),
        "all": 0,
    }
    assert model.lm_head is not None
    assert count([model]) - count([alone]) == twice[sharing] + count([model.lm_head])
    pointers = [p.data_ptr() for p in model.state_dict().values()]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("sharing", SHARING)
def test_roles_move_with_what_they_share(sharing: Any) -> None:
    """A feed-forward of the encoder, and its self-attention: does the decoder follow, and the other way round?"""
    some = batch(3)

    def answers(part: str) -> tuple[bool, bool]:
        before, after = build(replace(BLIP, sharing=sharing)), build(replace(BLIP, sharing=sharing))
        with torch.no_grad():
            after.get_parameter(part).add_(0.3 * torch.randn_like(after.get_parameter(part)))
        verbs = ("match", "lm_logits")
        first, second = (far(*(getattr(m, v)(some.pixels, some.tokens) for m in (before, after))) for v in verbs)
        return first, second

    assert answers("text.layers.1.mlp.text.up.weight") == (True, sharing != "none")
    assert answers("text.layers.1.cross_attn.kv.weight") == (True, sharing != "none")
    assert answers("text.tokens.weight") == (True, sharing != "none")
    assert answers("text.layers.1.self_attn.text.q.weight") == (True, sharing == "all")
    assert answers("text.layers.1.self_norm.weight") == (True, sharing == "all")
    if sharing == "all_but_self_attention":
        assert answers("text.layers.1.self_attn.decoder.q.weight") == (False, True)
        assert answers("text.layers.1.route_norm.decoder.weight") == (False, True)


@pytest.mark.parametrize("sharing", SHARING)
def test_shared_tensors_get_gradient_from_both_roles(sharing: Any) -> None:
    model, some = build(replace(BLIP, sharing=sharing)), batch(3)
    model.match(some.pixels, some.tokens).pow(3).sum().backward()
    one = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    model.zero_grad()
    model.lm_logits(some.pixels, some.tokens).pow(3).sum().backward()
    other = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    both = {name for name in one if name in other and name.startswith("text.")}
    assert bool(both) is (sharing != "none")
    assert any(".mlp." in name for name in both) is (sharing != "none")
    assert any(".self_attn." in name for name in both) is (sharing == "all")


@pytest.mark.parametrize("image_pool", ["cls", "mean"])
@pytest.mark.parametrize("text_pool", ["cls", "eot", "mean"])
def test_features_have_unit_norm_and_see_no_image(image_pool: Any, text_pool: Any) -> None:
    model, some = build(replace(BLIP, image_pool=image_pool, text_pool=text_pool)), batch(5)
    image, text = model.encode_image(some.pixels), model.encode_text(some.tokens)
    for features in (image, text):
        assert features.shape == (5, 16)
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(5))
    with torch.no_grad():
        for layer in model.text.layers:  # type: ignore[union-attr]
            layer.cross_attn.out.weight.add_(1.0)  # type: ignore[union-attr, operator]
    close(model.encode_text(some.tokens), text)
    close(model.similarity(image, text), image @ text.T / 0.07)


def test_matching_begins_with_enc_and_speaking_with_dec() -> None:
    model, some = build(), batch(4)
    begun = {"attention_mask": some.tokens.attention_mask}
    for verb, start in ((model.match, ENC), (model.lm_logits, DEC)):
        ids = some.tokens.input_ids.clone()
        ids[:, 0] = start
        expected = verb(some.pixels, some.tokens)
        close(verb(some.pixels, begun | {"input_ids": ids}), expected)
        with torch.no_grad():
            model.text.tokens.weight[start, :9] += 1.0  # type: ignore[union-attr]
        assert far(verb(some.pixels, some.tokens), expected)
    assert some.tokens.input_ids[0, 0] not in (ENC, DEC)


def test_verbs_agree_with_cached_states() -> None:
    model, some = build(), batch(4)
    image, text = model.image_states(some.pixels), model.text_states(some.tokens)
    close(image.features, model.encode_image(some.pixels))
    close(text.features, model.encode_text(some.tokens))
    logits = model.match_states(text.states, text.mask, model.image_keys_values(image.states))
    assert logits.shape == (4, 2)
    close(model.match(some.pixels, some.tokens), logits)
    assert model.lm_logits(some.pixels, some.tokens).shape == (4, 8, 50)


def test_texts_look_at_their_image() -> None:
    model, some = build(), batch(4)
    assert far(model.match(some.pixels, some.tokens), model.match(some.pixels.flip(0), some.tokens))
    assert far(model.lm_logits(some.pixels, some.tokens), model.lm_logits(some.pixels.flip(0), some.tokens))


@pytest.mark.parametrize("sharing", SHARING)
def test_a_later_token_never_changes_an_earlier_logit(sharing: Any) -> None:
    model, some = build(replace(BLIP, sharing=sharing)), batch(3, full=True)
    before = model.lm_logits(some.pixels, some.tokens)
    for place in range(1, 8):
        ids = some.tokens.input_ids.clone()
        ids[:, place] = (ids[:, place] + 7) % 40
        after = model.lm_logits(some.pixels, {"input_ids": ids, "attention_mask": some.tokens.attention_mask})
        close(after[:, :place], before[:, :place])
        assert all(far(after[:, later], before[:, later]) for later in range(place, 8))
    matched = model.match(some.pixels, some.tokens)
    assert far(model.match(some.pixels, {"input_ids": ids, "attention_mask": some.tokens.attention_mask}), matched)


@pytest.mark.parametrize("sharing", SHARING)
def test_padding_and_batch_change_no_result(sharing: Any) -> None:
    model = build(replace(BLIP, sharing=sharing, text=replace(BLIP.text, context_length=12)))
    some = batch(4)
    wider = {name: F.pad(some.tokens[name], (0, 3), value=0) for name in some.tokens}
    wider["input_ids"][:, 8:] = 5  # whatever stands there
    matched, text, said = (
        model.match(some.pixels, some.tokens), model.encode_text(some.tokens), model.lm_logits(some.pixels, some.tokens)
    )  # fmt: skip
    close(model.match(some.pixels, wider), matched)
    close(model.encode_text(wider), text)
    close(model.lm_logits(some.pixels, wider)[:, :8], said)
    for i in range(4):
        one, pixels = rows(some.tokens, slice(i, i + 1)), some.pixels[i : i + 1]
        close(model.match(pixels, one)[0], matched[i])
        close(model.encode_text(one)[0], text[i])
        close(model.encode_image(pixels)[0], model.encode_image(some.pixels)[i])
        close(model.lm_logits(pixels, one)[0], said[i, : one["input_ids"].shape[1]])


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("beams", [1, 3])
def test_cached_steps_equal_the_whole_text(sharing: Any, beams: int) -> None:
    """Two tokens at once, then one at a time, with images shared by beams."""
    model, pictures = build(replace(BLIP, sharing=sharing)), batch(2).pixels
    some = batch(2 * beams, full=True)
    ids = some.tokens.input_ids.clone()
    ids[:, 0] = DEC
    whole = model.lm_logits(pictures.repeat_interleave(beams, dim=0), some.tokens)
    image, cache = model.decoder_keys_values(model.image_states(pictures).states), KVCache()
    close(model.decode(ids[:, :2], image=image, cache=cache), whole[:, 1])
    for place in range(2, 8):
        close(model.decode(ids[:, place : place + 1], image=image, cache=cache), whole[:, place])
    assert cache.length == 8
    close(model.decode(ids[:, :5], image=image), whole[:, 4])


def test_several_texts_share_an_image() -> None:
    model, pictures, some = build(), batch(2), batch(6, seed=3)
    keys = model.image_keys_values(model.image_states(pictures.pixels).states)
    shared = model.match_states(some.tokens.input_ids, some.tokens.attention_mask, keys)
    close(shared, model.match(pictures.pixels.repeat_interleave(3, dim=0), some.tokens))


def test_a_captioner_has_the_decoder_alone_and_a_retriever_none() -> None:
    captioner, retriever = build(CAPTION), build(RETRIEVAL)
    assert {name for name, _ in captioner.named_children()} == {"image", "decoder", "lm_head"}
    parts = {"image", "text", "image_projection", "text_projection", "itm_head"}
    assert {name for name, _ in retriever.named_children()} == parts
    assert not any("decoder" in name for name, _ in retriever.named_parameters())
    assert build(replace(BLIP, heads=("itc",))).itm_head is None
    assert not captioner.teachable and retriever.teachable
    for name, heads in (("lm", RETRIEVAL), ("itm", CAPTION)):
        same = build(replace(heads, sharing="none")).state_dict()  # sharing means nothing with one of both
        assert same.keys() == build(heads).state_dict().keys(), name


@pytest.mark.parametrize(
    ("config", "verb", "head"),
    [
        (CAPTION, "encode_image", "itc"),
        (CAPTION, "encode_text", "itc"),
        (CAPTION, "similarity", "itc"),
        (CAPTION, "match", "itm"),
        (CAPTION, "image_keys_values", "itm"),
        (RETRIEVAL, "lm_logits", "lm"),
        (RETRIEVAL, "decoder_keys_values", "lm"),
        (replace(BLIP, heads=("itc", "lm")), "match", "itm"),
    ],
)
def test_a_missing_head_is_named(config: BlipConfig, verb: str, head: str) -> None:
    model, some = build(config), batch(2)
    both, states = (some.pixels, some.tokens), model.image_states(some.pixels).states
    given: dict[str, tuple[Any, ...]] = {"encode_image": both[:1], "encode_text": both[1:], "match": both}
    given |= {"lm_logits": both, "similarity": (states, states)}
    with pytest.raises(MissingVerbError, match=f"no {head} head .it has: {', '.join(config.heads)}"):
        getattr(model, verb)(*given.get(verb, (states,)))


@pytest.mark.parametrize(("start", "expected"), [(1e6, 1000.0), (1e-3, 2.0), (14.0, 14.0)])
def test_clamp_keeps_the_temperature_in_bounds(start: float, expected: float) -> None:
    model = build()
    with torch.no_grad():
        model.log_scale.fill_(math.log(start))
    model.clamp_()
    assert model.logit_scale.item() == pytest.approx(expected, rel=1e-5)
    build(CAPTION).clamp_()  # has none


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"image_pool": "avg"}, "image_pool 'avg'"),
        ({"text_pool": "eos"}, "text_pool 'eos'"),
        ({"negatives": "hrad"}, "did you mean 'hard'"),
        ({"sharing": "all_but_selfattention"}, "did you mean 'all_but_self_attention'"),
        ({"heads": ("itm", "lm")}, "itc beside itm"),
        ({"heads": ()}, "at least one"),
        ({"heads": ("itc", "mlm")}, "head 'mlm'"),
        ({"text": replace(BLIP.text, cross_layers=())}, r"cross_layers \[\]"),
        ({"text": replace(BLIP.text, cross_width=32)}, "its width 24"),
        ({"text": replace(BLIP.text, causal=True)}, "text.causal must be false"),
        ({"text": replace(BLIP.text, self_routes=("text", "decoder"))}, r"self_routes \[text\]"),
        ({"enc_id": 50}, "enc_id 50: not below text.vocab_size 50"),
        ({"dec_id": -1}, "dec_id -1"),
        ({"prompt_ids": (3, 99)}, "prompt id 99"),
        ({"logit_scale_init": 1.0}, "between logit_scale_min"),
        ({"lm_weight": -1.0}, "lm_weight -1: weights must be at least 0"),
        ({"itc_weight": 0.0, "itm_weight": 0.0, "lm_weight": 0.0}, "one of them above"),
        ({"heads": ("lm",), "lm_weight": 0.0}, "one of them above"),
    ],
)
def test_bad_settings_are_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Blip(replace(BLIP, **change))
