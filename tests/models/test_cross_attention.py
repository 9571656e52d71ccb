"""Cross-attention to images, routes inside a layer, queries, halves of the stack."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.models.small import CAUSAL, CROSS, ROUTES, SMALL, build, close, far, key_mask, pictures, words
from vlm.models.transformer import KVCache, Transformer, TransformerConfig

# Cross-attention


@pytest.mark.parametrize("texts", [1, 2, 3])
def test_several_texts_share_an_image(texts: int) -> None:
    model, states = build(CROSS), pictures(2)
    x = model.embed(words(2 * texts, 6))
    mask = key_mask([6, 4, 2, 5, 6, 1][: 2 * texts], 6)
    shared = model(x, key_mask=mask, image=model.image_states(states))
    copies = model(x, key_mask=mask, image=model.image_states(states.repeat_interleave(texts, dim=0)))
    close(shared, copies)
    assert far(shared, model(x, key_mask=mask, image=model.image_states(states.flip(0))))


def test_image_padding_is_never_seen() -> None:
    model, states = build(CROSS), pictures(2)
    x, mask = model.embed(words(4, 6)), key_mask([3, 5], 5)[:, None, None]
    disturbed = torch.where(mask[:, 0, 0, :, None], states, states + 3)
    seen = model(x, image=model.image_states(states), image_mask=mask)
    close(seen, model(x, image=model.image_states(disturbed), image_mask=mask))
    assert far(seen, model(x, image=model.image_states(disturbed)))


def test_image_states_are_projected_once() -> None:
    """Beams and steps meet the same keys and values: projection runs once a layer that looks."""
    model, counts = build(replace(CROSS, causal=True)), [0, 0]
    looks = [layer.cross_attn for layer in model.layers]
    assert [look is not None for look in looks] == [True, False, True]
    for slot, look in enumerate(look for look in looks if look is not None):

        def count(*_: object, slot: int = slot) -> None:
            counts[slot] += 1

        look.kv.register_forward_hook(count)
    image, cache = model.image_states(pictures(2)), KVCache()
    assert [states is not None for states in image] == [True, False, True]
    for i in range(3):
        model(model.embed(words(6, 3)[:, i : i + 1], past=i), image=image, cache=cache)
    assert counts == [1, 1]


def test_no_image_leaves_cross_attention_out() -> None:
    model, x = build(CROSS), build(CROSS).embed(words(2, 6))
    without = model(x)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "cross" in name:
                parameter.add_(1.0)
    close(model(x), without)
    assert far(model(x, image=model.image_states(pictures(2))), without)


def test_texts_that_images_cannot_share() -> None:
    model = build(CROSS)
    with pytest.raises(ValueError, match="5 texts can't share 2 images"):
        model(model.embed(words(5, 4)), image=model.image_states(pictures(2)))


# Routes, queries, halves


def shifted(model: Transformer, part: str) -> Transformer:
    """A copy whose parameters named with `part` are others."""
    twin = build(model.config)
    twin.load_state_dict(model.state_dict())
    found = [parameter for name, parameter in twin.named_parameters() if part in name]
    assert found, part
    with torch.no_grad():
        for parameter in found:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return twin


def test_a_route_takes_its_own_parameters() -> None:
    model, x = build(ROUTES), build(ROUTES).embed(words(2, 6))
    text, decode = model(x), model(x, route="decode")
    assert far(text, decode)
    other = shifted(model, "self_attn.text")
    assert far(other(x), text)
    close(other(x, route="decode"), decode)
    for part in ("self_attn.decode", "route_norm.decode"):
        other = shifted(model, part)
        assert far(other(x, route="decode"), decode)
        close(other(x), text)
    other = shifted(model, "self_norm")
    assert far(other(x), text)
    close(other(x, route="decode"), decode)


def test_queries_have_their_own_feed_forward_and_alone_see_the_image() -> None:
    model = build(ROUTES)
    queries = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(3))
    x = torch.cat([queries, model.embed(words(2, 6))], dim=1)
    apart = torch.ones(10, 10, dtype=torch.bool)
    apart[:4, 4:] = apart[4:, :4] = False  # queries and words don't look at each other
    image = model.image_states(pictures(2))
    out = model(x, image=image, mask=apart[None, None], queries=4)

    close(out[:, 4:], model(x[:, 4:]))  # words: no image, the text feed-forward
    lone = model(x[:, :4], image=image, queries=4)
    close(out[:, :4], lone)
    for part, moved in [("mlp.query", True), ("mlp_norm.query", True), ("mlp.text", False)]:
        changed = shifted(model, part)(x, image=image, mask=apart[None, None], queries=4)
        assert far(changed[:, :4], out[:, :4]) is moved
        assert far(changed[:, 4:], out[:, 4:]) is not moved
    changed = shifted(model, "cross_attn")
    changed_out = changed(x, image=changed.image_states(pictures(2)), mask=apart[None, None], queries=4)
    assert far(changed_out[:, :4], out[:, :4])
    close(changed_out[:, 4:], out[:, 4:])


@pytest.mark.parametrize("config", [SMALL, CAUSAL, CROSS])
def test_two_halves_make_the_whole(config: TransformerConfig) -> None:
    model, x = build(config), build(config).embed(words(2, 6))
    image = model.image_states(pictures(2)) if config.cross_layers else None
    half = model(x, image=image, layers=slice(2))
    close(model(half, image=image, layers=slice(2, None)), model(x, image=image))
    assert far(half, model(x, image=image))
