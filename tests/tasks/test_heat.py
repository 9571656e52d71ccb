"""Heat maps: taken from the attention that really ran, on hand-made cases, and nothing of the model is changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tasks.fused import IMAGE, TEXT, WORDS, fused_model, pair_model, qformer_model
from tests.tasks.small import colour_model, noise, random_model
from tests.tasks.test_ask import model as speaker
from vlm.errors import ConfigError, DataError, MissingVerbError
from vlm.models.clip import Clip
from vlm.tasks import heat as task
from vlm.tasks.explain import Explanation, explain, explanation_picture, overlay, scaled, word_places
from vlm.tasks.heat import choose_method, grad_cam, heat, methods, query_attention, rollout
from vlm.weights.loaded import VisionLanguageModel

TEXT_OF = "a big rhinoceros runs"


def mean_pooled() -> VisionLanguageModel:
    """The CLIP of `random_model` whose image feature is the mean of its patches."""
    model = random_model()
    config = replace(model.network.config, image_pool="mean")
    network = Clip(config).eval().requires_grad_(False)
    network.load_state_dict(model.network.state_dict())
    return VisionLanguageModel(network, WORDS, model.transform, name="mean", family="clip")


def test_methods_by_what_the_model_is() -> None:
    assert methods(fused_model()) == ["grad-cam", "relevance", "rollout"]
    assert methods(pair_model()) == ["plan", "relevance"]
    assert methods(random_model()) == ["relevance", "rollout"]
    assert methods(mean_pooled()) == ["cam", "relevance", "rollout"]
    assert choose_method(mean_pooled(), "rollout") == "rollout"
    with pytest.raises(MissingVerbError, match="random is a clip model and has no grad-cam; it has relevance"):
        choose_method(random_model(), "grad-cam")
    with pytest.raises(MissingVerbError, match="colours is a clip model without a part"):
        choose_method(colour_model())
    with pytest.raises(ConfigError, match=r"did you mean 'rollout'"):
        choose_method(random_model(), "rolout")


def test_recorded_attention_is_the_attention_that_ran() -> None:
    """With it the outputs stay what they are, and its rows are shares."""
    model = fused_model()
    network: Any = model.network
    pixels, tokens = model.pixels(noise(1)), model.tokens(TEXT_OF)
    before = network.match(pixels, tokens)
    cross = network.text.layers[2].cross_attn
    with task._cross_attention(cross) as maps:
        inside = network.match(pixels, tokens)
    torch.testing.assert_close(inside, before, rtol=1e-5, atol=1e-6)
    assert maps[0].shape == (1, 2, tokens.input_ids.shape[1], 5)
    torch.testing.assert_close(maps[0].sum(dim=-1), torch.ones(maps[0].shape[:-1]))
    with task._self_attention(block.attn for block in network.image.trunk.blocks) as maps:
        inside = network.encode_image(pixels)
    torch.testing.assert_close(inside, network.encode_image(pixels), rtol=1e-5, atol=1e-6)
    assert [one.shape for one in maps] == [(1, 2, 5, 5)] * 2
    assert all(block.attn.fused_attn for block in network.image.trunk.blocks)
    assert not cross._forward_hooks and not network.image.trunk.blocks[0].attn.attn_drop._forward_hooks


def test_grad_cam_is_the_gradient_by_differences() -> None:
    """The gradient that weighs a map is how the matched logit moves when the map is nudged."""
    model = fused_model()
    network: Any = model.network.double()
    pixels, tokens = model.pixels(noise(1)), model.tokens(TEXT_OF)
    found = grad_cam(network, pixels, tokens, layer=1)  # (L, N)
    cross = network.text.layers[2].cross_attn
    with task._cross_attention(cross) as maps:
        network.match(pixels, tokens)
    weights = maps[0].detach()

    def logit(change: torch.Tensor) -> float:
        def replaced(_: Any, given: tuple[Any, ...], __: Any) -> torch.Tensor:
            return cross.out(((weights + change) @ given[1].values).transpose(1, 2).flatten(2))

        hook = cross.register_forward_hook(replaced)
        value = network.match(pixels, tokens)[0, 1].item()
        hook.remove()
        return value

    for place in ((0, 0), (2, 3), (4, 1)):
        expected = 0.0
        for head in range(2):
            step = torch.zeros_like(weights)
            step[0, head, place[0], place[1]] = 1e-5
            slope = (logit(step) - logit(-step)) / 2e-5
            expected += max(0.0, slope) * weights[0, head, place[0], place[1]].item() / 2
        assert found[place].item() == pytest.approx(expected, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("model", [qformer_model(), speaker()], ids=["first step", "second step"])
def test_queries_look_where_their_keys_say(model: VisionLanguageModel) -> None:
    """Worked out from what went into the layer; nothing of the model stays changed."""
    network: Any = model.network
    pixels = model.pixels(noise(2))[1:]
    crosses = [one.cross_attn for one in network.qformer.text.layers if one.cross_attn is not None]
    before = network.qformer.queries(network.look(pixels))
    found = [query_attention(model, pixels, layer=number + 1) for number in range(len(crosses))]
    given: list[torch.Tensor] = []
    for cross, shares in zip(crosses, found, strict=True):
        hook = cross.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
        torch.testing.assert_close(network.qformer.queries(network.look(pixels)), before)
        hook.remove()
        width = cross.q.out_features
        queries, keys = cross.q(given[-1])[0], cross.kv(network.look(pixels))[0, :, :width]  # (Q, D), (N, D)
        heads = zip(queries.chunk(cross.heads, dim=1), keys.chunk(cross.heads, dim=1), strict=True)
        each = [(q @ k.T / q.shape[1] ** 0.5).softmax(dim=1) for q, k in heads]
        torch.testing.assert_close(shares, torch.stack(each).mean(dim=0)[:, 1:].reshape(shares.shape))
        assert not cross._forward_hooks
    side = network.image.config.image_size // network.image.config.patch_size
    assert found[0].shape == (3, side, side) and not torch.allclose(found[0][0], found[0][1])
    assert torch.equal(query_attention(model, pixels), found[(len(crosses) - 1) // 2])
    with pytest.raises(ConfigError, match=f"the fusion layers are 1 to {len(crosses)}"):
        query_attention(model, pixels, layer=len(crosses) + 1)


def test_only_queries_look_by_themselves() -> None:
    with pytest.raises(MissingVerbError, match="random is a clip model; only BLIP-2's queries"):
        query_attention(random_model(), random_model().pixels(noise(1)))


def test_layers_differ_and_are_bounded() -> None:
    model = fused_model()
    pixels, tokens = model.pixels(noise(1)), model.tokens(TEXT_OF)
    middle, first, last = (heat(model, pixels, tokens, layer=layer) for layer in (0, 1, 2))
    assert torch.equal(first, middle) and not torch.allclose(first, last)
    assert last[0].max() > 0 and last[1:].max() == 0  # behind it the words don't meet
    assert first[1:].amax(dim=(1, 2)).min() > 0
    with pytest.raises(ConfigError, match="the fusion layers are 1 to 2, 0 the middle"):
        heat(model, pixels, tokens, layer=3)


def test_a_layer_for_a_method_that_has_no_use_for_it_is_refused() -> None:
    for model, method in ((fused_model(), "rollout"), (mean_pooled(), "cam"), (pair_model(), "plan")):
        with pytest.raises(ConfigError, match=rf"layer 1 \(--layer\): .*here the method is {method}"):
            explain(model, noise(1), TEXT_OF, method=method, layer=1)


def test_cam_adds_up_to_the_cosine() -> None:
    model = mean_pooled()
    network: Any = model.network
    pixels, tokens = model.pixels(noise(1)), model.tokens(["red", TEXT_OF])
    patches = network.image_projection(network.image(pixels))[0, 1:]
    texts = network.encode_text(tokens)
    cosine = (network.encode_image(pixels) @ texts.T)[0]
    torch.testing.assert_close((texts @ patches.T).mean(dim=1) / patches.mean(dim=0).norm(), cosine)
    expected = (texts @ patches.T).clamp(min=0).reshape(2, 2, 2)
    torch.testing.assert_close(heat(model, pixels, tokens, method="cam"), expected)


def test_the_plan_is_weighed_by_likeness() -> None:
    """The plan alone gives every patch the same over all words, so that it points nowhere."""
    model = pair_model()
    network: Any = model.network
    pixels, tokens = model.pixels(noise(1)), model.tokens(TEXT_OF)
    plan = network.word_patch_plan(pixels, tokens)[0, :, 1:]
    torch.testing.assert_close(plan.sum(dim=0), torch.full((4,), 0.25), rtol=1e-3, atol=1e-4)
    fused = network.fuse(pixels, tokens)
    cosine = torch.nn.functional.cosine_similarity(fused.words[0, :, None], fused.patches[0, None, 1:], dim=-1)
    expected = (plan * cosine.clamp(min=0)).reshape(-1, 2, 2)
    torch.testing.assert_close(heat(model, pixels, tokens, method="plan"), expected)
    assert expected.sum(dim=0).std() > 1e-3


def test_joint_relevance_is_of_each_text_alone() -> None:
    model = pair_model()
    network: Any = model.network
    pixels, before = model.pixels(noise(1)), model.network.match(model.pixels(noise(1)), model.tokens("red"))
    with task._self_attention(block.attn for block in network.image.trunk.blocks) as maps:
        inside = network.match(pixels, model.tokens("red"))
    torch.testing.assert_close(inside, before, rtol=1e-5, atol=1e-6)
    assert maps[0].shape == (1, 2, 3 + 5, 3 + 5)
    both = heat(model, pixels, model.tokens(["red", TEXT_OF]), method="relevance")
    alone = heat(model, pixels, model.tokens(["red"]), method="relevance")
    torch.testing.assert_close(both[0], alone[0], rtol=1e-4, atol=1e-7)
    assert (both >= 0).all() and not torch.allclose(both[0], both[1])


def test_rollout_by_hand() -> None:
    """Two layers: (A2 + I) (A1 + I) / 4, and its first row; the same for every text."""
    model = random_model()
    network: Any = model.network
    pixels = model.pixels(noise(1))
    with task._self_attention(block.attn for block in network.image.trunk.blocks) as maps:
        network.encode_image(pixels)
    one, two = (found.detach()[0].mean(dim=0) for found in maps)
    expected = (two + torch.eye(5)) @ (one + torch.eye(5)) / 4
    torch.testing.assert_close(rollout(network, pixels)[0], expected[0])
    both = heat(model, pixels, model.tokens(["red", TEXT_OF]), method="rollout")
    assert both.shape == (2, 2, 2) and torch.equal(both[0], both[1])


def test_relevance_depends_on_the_text_and_is_positive() -> None:
    model = random_model()
    pixels, tokens = model.pixels(noise(1)), model.tokens(["red", TEXT_OF])
    both = heat(model, pixels, tokens, method="relevance")
    assert both.shape == (2, 2, 2) and not torch.allclose(both[0], both[1]) and (both >= 0).all()
    alone = heat(model, pixels, model.tokens([TEXT_OF]), method="relevance")
    torch.testing.assert_close(alone[0], both[1])


@pytest.mark.parametrize("make", [fused_model, pair_model, random_model, mean_pooled])
def test_a_map_for_each_word(make: Any) -> None:
    model = make()
    kept = {name: value.clone() for name, value in model.network.state_dict().items()}
    found = explain(model, noise(1)[0], TEXT_OF)
    assert found.words == TEXT_OF.split()
    assert found.maps.shape == (4, 2, 2) and found.whole.shape == (2, 2)
    assert found.maps.min() >= 0 and found.maps.max() <= 1 and found.whole.max() == pytest.approx(1)
    assert not np.allclose(found.maps[0], found.maps[2])
    assert all(torch.equal(kept[name], value) for name, value in model.network.state_dict().items())
    assert all(p.grad is None for p in model.network.parameters())
    page = explanation_picture(model, noise(1)[0], found)
    assert page.width > 4 * 224 and page.height > 2 * 224  # six tiles, four in a row


def test_rollout_has_no_words() -> None:
    found = explain(random_model(), noise(1)[0], TEXT_OF, method="rollout")
    assert (found.words, found.maps.shape) == ([], (0, 2, 2))


def test_pieces_of_a_word_stand_together() -> None:
    model = fused_model()
    pieces = model.tokens("rhinoceros").input_ids.shape[1] - 2
    assert pieces > 1
    words, places = word_places(model, TEXT_OF, 5 + pieces)
    assert words == TEXT_OF.split()
    assert places == [(1, 2), (2, 3), (3, 3 + pieces), (3 + pieces, 4 + pieces)]
    # Cut off behind the second piece of the long word.
    assert word_places(model, TEXT_OF, 6) == (["a", "big", "rhinoceros"], [(1, 2), (2, 3), (3, 5)])


def test_maps_keep_shares() -> None:
    assert torch.equal(scaled(torch.tensor([[2.0, 1.0]])), torch.tensor([[1.0, 0.5]]))
    assert torch.equal(scaled(torch.zeros(2, 2)), torch.zeros(2, 2))


def test_hot_is_red_and_cold_is_blue() -> None:
    page = np.asarray(overlay(Image.new("RGB", (40, 40), "black"), np.array([[1.0, 0.0], [0.0, 0.0]])))
    red, _, blue = (int(value) for value in page[5, 5])
    assert red > 2 * blue
    red, _, blue = (int(value) for value in page[35, 35])
    assert blue > 2 * red


def test_long_words_are_cut_in_the_picture() -> None:
    model = random_model()
    one = np.ones((2, 2))
    given = Explanation("word" * 400, "relevance", one, ["w" * 400], one[None])
    assert explanation_picture(model, noise(1)[0], given).width < 800


def test_what_cannot_be_explained() -> None:
    with pytest.raises(ConfigError, match="is blank"):
        explain(random_model(), noise(1)[0], "  ")
    with pytest.raises(DataError):
        explain(random_model(), b"no picture", "red")
    assert IMAGE.patch_size == 8 and TEXT.cross_layers == (2, 3)  # what the shapes above rest on
