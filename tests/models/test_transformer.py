"""The transformer: masks, cache, gradients, settings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.models.small import CAUSAL, CROSS, ROUTES, SMALL, build, close, far, key_mask, pictures, words
from vlm.errors import ConfigError
from vlm.models.attention import Attention, attention_mask
from vlm.models.transformer import (
    KeyValues,
    KVCache,
    Transformer,
    TransformerConfig,
    activation,
)

KINDS = pytest.mark.parametrize("config", [SMALL, CAUSAL, replace(SMALL, norm="pre"), replace(CAUSAL, norm="post")])


# Masks


def test_masks_by_hand() -> None:
    seen = attention_mask(torch.tensor([[1, 1, 1, 0]]), length=2, past=2, causal=True, device=torch.device("cpu"))
    assert seen is not None
    assert seen[0, 0].tolist() == [[True, True, True, False], [True, True, True, False]]
    seen = attention_mask(None, length=2, past=1, causal=True, device=torch.device("cpu"))
    assert seen is not None
    assert seen[0, 0].tolist() == [[True, True, False], [True, True, True]]
    for causal in (False, True):  # one new token sees all of its past
        assert attention_mask(None, length=1, past=3, causal=causal, device=torch.device("cpu")) is None


@KINDS
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_padding_changes_no_real_position(config: TransformerConfig, lengths: list[int], seed: int) -> None:
    """A padded batch equals each text alone, and what stands on the padding is never seen."""
    model, total = build(config), max(lengths) + 3
    ids, mask = words(len(lengths), total, seed), key_mask(lengths, total)
    other = torch.where(mask, ids, (ids + 7) % 50)
    padded = model(model.embed(ids), key_mask=mask)
    disturbed = model(model.embed(other), key_mask=mask)
    for row, length in enumerate(lengths):
        alone = model(model.embed(ids[row : row + 1, :length]))
        close(padded[row, :length], alone[0])
        close(disturbed[row, :length], alone[0])


def test_padding_would_matter_without_the_mask() -> None:
    model = build(SMALL)
    ids = words(1, 8)
    assert far(model(model.embed(ids))[:, :5], model(model.embed(ids[:, :5])))


def test_causal_mask_leaks_nothing() -> None:
    model, ids = build(CAUSAL), words(2, 9)
    before = model(model.embed(ids))
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 50
    after = model(model.embed(changed))
    assert torch.equal(before[:, :5], after[:, :5])
    assert all(far(before[:, i], after[:, i]) for i in range(5, 9))

    x = model.embed(ids).detach().requires_grad_()
    (slope,) = torch.autograd.grad(model(x)[:, 3].sum(), x)
    assert torch.equal(slope[:, 4:], torch.zeros_like(slope[:, 4:]))
    assert (slope[:, :4].abs().amax(dim=(0, 2)) > 0).all()


def test_a_call_overrides_the_direction() -> None:
    model, ids = build(CAUSAL), words(2, 6)
    x = model.embed(ids)
    twin = build(replace(CAUSAL, causal=False))
    twin.load_state_dict(model.state_dict())
    close(model(x, causal=False), twin(x))
    close(twin(x, causal=True), model(x))
    assert far(model(x), twin(x))


def test_an_own_mask_replaces_the_built_one() -> None:
    model, x = build(SMALL), build(SMALL).embed(words(2, 6))
    order = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    close(model(x, mask=order), model(x, causal=True))


# Cache


@pytest.mark.parametrize("steps", [[1] * 8, [3, 1, 1, 3], [8], [2, 6]])
@pytest.mark.parametrize("config", [CAUSAL, replace(CAUSAL, norm="post"), replace(CROSS, causal=True)])
def test_cache_step_by_step_equals_the_whole(config: TransformerConfig, steps: list[int]) -> None:
    model, ids = build(config), words(3, 8)
    image = model.image_states(pictures(3)) if config.cross_layers else None
    whole = model(model.embed(ids), image=image)
    cache, parts, start = KVCache(), [], 0
    for step in steps:
        x = model.embed(ids[:, start : start + step], past=cache.length)
        parts.append(model(x, cache=cache, image=image))
        start += step
    assert cache.length == 8
    close(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("side", ["left", "right"])
def test_cache_with_padded_prompts(side: str) -> None:
    """Prompts of different lengths, then three more tokens one by one: equal to one pass with that mask."""
    model, ids = build(CAUSAL), words(3, 9)
    prompt = key_mask([6, 3, 1], 6)
    mask = torch.cat([prompt.flip(1) if side == "left" else prompt, torch.ones(3, 3, dtype=torch.bool)], dim=1)
    whole = model(model.embed(ids), key_mask=mask)
    cache = KVCache()
    parts = [model(model.embed(ids[:, :6]), key_mask=mask[:, :6], cache=cache)]
    for i in (6, 7, 8):
        x = model.embed(ids[:, i : i + 1], past=cache.length)
        parts.append(model(x, key_mask=mask[:, : i + 1], cache=cache))
    joined = torch.cat(parts, dim=1)
    assert joined.isfinite().all()
    close(joined[mask], whole[mask])


def test_cache_follows_its_beams() -> None:
    model, ids = build(CAUSAL), words(3, 5)
    rows = torch.tensor([2, 0, 0])
    cache = KVCache()
    model(model.embed(ids[:, :4]), cache=cache)
    cache.reorder(rows)
    step = model(model.embed(ids[:, 4:], past=4), cache=cache)
    chosen = torch.cat([ids[rows, :4], ids[:, 4:]], dim=1)
    close(step[:, 0], model(model.embed(chosen))[:, -1])


def test_cache_of_the_upper_layers_alone() -> None:
    model, x = build(CAUSAL), build(CAUSAL).embed(words(2, 5))
    upper = slice(1, None)
    cache = KVCache()
    parts = [model(x[:, :3], layers=upper, cache=cache), model(x[:, 3:], layers=upper, cache=cache)]
    assert cache.length == 5
    close(torch.cat(parts, dim=1), model(x, layers=upper))


def test_cache_bypasses_checkpointing() -> None:
    model, ids = build(CAUSAL).train(), words(2, 4)
    model.checkpointing = True
    cache = KVCache()
    model(model.embed(ids), cache=cache).sum().backward()
    assert cache.length == 4


# Gradients


def test_every_parameter_gets_a_gradient() -> None:
    model = build(replace(ROUTES, norm="pre")).train()
    queries = torch.randn(2, 3, 32)
    x = torch.cat([queries, model.embed(words(2, 16))], dim=1)
    out = model(x, image=model.image_states(pictures(2)), queries=3)
    out = out.pow(3).sum() + model(model.embed(words(2, 16)), route="decode").pow(3).sum()
    out.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_nothing(dropout: float) -> None:
    def run(checkpointing: bool) -> tuple[Tensor, dict[str, Tensor]]:
        model = build(replace(CROSS, dropout=dropout)).train()
        model.checkpointing = checkpointing
        torch.manual_seed(5)
        image = model.image_states(pictures(2))
        out = model(model.embed(words(4, 6)), key_mask=key_mask([6, 2, 4, 1], 6), image=image)
        out.pow(2).sum().backward()
        return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    (plain, slopes), (again, again_slopes) = run(False), run(True)
    torch.testing.assert_close(again, plain)
    torch.testing.assert_close(again_slopes, slopes)


def test_checkpointing_holds_less() -> None:
    def held(checkpointing: bool) -> int:
        model, seen = build(SMALL).train(), {}
        model.checkpointing = checkpointing

        def pack(tensor: Tensor) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = model.embed(words(8, 16))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(x)
        assert out.requires_grad
        return sum(seen.values())

    assert held(True) < held(False) / 3


def test_dropout_only_in_training() -> None:
    model = build(replace(SMALL, dropout=0.5))
    x = words(2, 6)
    close(model(model.embed(x)), model(model.embed(x)))
    model.train()
    assert far(model(model.embed(x)), model(model.embed(x)))


def test_attention_drops_weights_in_training() -> None:
    attention = Attention(32, 4, dropout=0.5)
    x = torch.randn(2, 6, 32)
    source = attention.keys_values(x)
    assert far(attention(x, source), attention(x, source))
    attention.eval()
    assert torch.equal(attention(x, source), attention(x, source))


# Settings


def test_activations_by_hand() -> None:
    x = torch.tensor([-1.0, 0.0, 2.0])
    close(activation("gelu")(x), torch.tensor([-0.158655, 0.0, 1.954500]))
    close(activation("gelu_tanh")(x), torch.tensor([-0.158808, 0.0, 1.954598]))
    close(activation("quick_gelu")(x), x * torch.sigmoid(1.702 * x))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"heads": 5}, "width 32 is not a multiple of heads 5"),
        ({"heads": 0}, "heads 0"),
        ({"activation": "gelv"}, "did you mean 'gelu'"),
        ({"norm": "middle"}, "'middle'"),
        ({"cross_layers": (1, 3)}, r"\[3\].*0 to 2"),
        ({"self_routes": ()}, "self_routes"),
        ({"mlp_routes": ("query",)}, "text"),
    ],
)
def test_bad_settings_are_named(change: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Transformer(replace(SMALL, **change))  # type: ignore[arg-type]


def test_unknown_route_and_long_text_are_named() -> None:
    model = build(ROUTES)
    with pytest.raises(ValueError, match=r"'decoder'.*did you mean 'decode'"):
        model(model.embed(words(1, 4)), route="decoder")
    assert model.embed(words(1, 16)).shape == (1, 16, 32)
    with pytest.raises(ValueError, match=r"17 tokens.*16"):
        model.embed(words(1, 17))
    with pytest.raises(ValueError, match="17 tokens"):
        model.embed(words(1, 1), past=16)


def test_norms_are_where_the_settings_say() -> None:
    post, pre = build(SMALL), build(CAUSAL)
    assert isinstance(post.embed_norm, nn.LayerNorm) and post.final_norm is None
    assert isinstance(pre.final_norm, nn.LayerNorm) and pre.embed_norm is None
    assert {m.eps for m in post.modules() if isinstance(m, nn.LayerNorm)} == {1e-12}


def test_only_real_token_types_are_stored() -> None:
    assert build(SMALL).types is None
    model = build(CROSS)
    assert model.types is not None
    before = model.embed(words(1, 3))
    with torch.no_grad():
        model.types.weight[0] += torch.linspace(0, 3, 32)
    assert far(model.embed(words(1, 3)), before)


def test_cache_starts_empty() -> None:
    cache, pair = KVCache(), KeyValues(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4))
    assert cache.length == 0
    cache.append(0, pair)
    joined = cache.append(0, pair)
    assert cache.length == 6
    assert torch.equal(joined.keys, torch.cat([pair.keys, pair.keys], dim=2))
    assert torch.equal(joined.values, torch.cat([pair.values, pair.values], dim=2))
