"""The Q-Former: what queries and words see of each other, its roles, cached steps, shared images, settings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.models.small import close, far, key_mask, words
from tests.models.small_qformer import DEC, INSTRUCTED, QFORMER, QUERIES, SILENT, WIDTH, build, pictures
from vlm.errors import ConfigError, MissingVerbError
from vlm.models.cache import KVCache
from vlm.models.qformer import QFormer, QFormerConfig, bidirectional, multimodal_causal, unimodal
from vlm.models.transformer import KeyValues

LENGTHS = [7, 4, 2]


def text(rows: int = 3, length: int = 7) -> tuple[Tensor, Tensor]:
    mask = key_mask(LENGTHS[:rows], length)
    return words(rows, length).masked_fill(~mask, 0), mask


def other(ids: Tensor, place: int) -> Tensor:
    changed = ids.clone()
    changed[:, place] = (changed[:, place] + 7) % 48
    return changed


def test_defaults_are_the_papers() -> None:
    """188M parameters with the words' embedding at EVA-CLIP-g's width (§3.1), 105M without the words."""
    text = replace(QFormerConfig().text, cross_width=1408)
    with torch.device("meta"):
        whole, silent = (
            QFormer(QFormerConfig(text=replace(text, vocab_size=size), speaks=False)) for size in (30523, 0)
        )
    sizes = [sum(p.numel() for p in model.parameters()) for model in (whole, silent)]
    words_of = 12 * (2 * 768 * 3072 + 3072 + 768 + 2 * 768) + (30523 + 512) * 768  # feed-forwards, embeddings
    assert (sizes[0] - sizes[1], round(sizes[1] / 1e6)) == (words_of, 105)
    assert QFormerConfig().queries == 32 and QFormerConfig().text.cross_layers == (0, 2, 4, 6, 8, 10)


def test_masks_by_hand() -> None:
    """Two queries; of two texts one has a word of padding."""
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    alone, causal = unimodal(mask, 2), multimodal_causal(mask, 2)
    assert alone[1, 0].int().tolist() == [
        [1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 0],
    ]  # fmt: skip
    assert causal[0, 0].int().tolist() == [
        [1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1],
    ]  # fmt: skip
    assert causal[1, 0, -1].int().tolist() == [1, 1, 1, 1, 0]
    assert bidirectional(mask, 2).int().tolist() == [[[[1, 1, 1, 1, 1]]], [[[1, 1, 1, 1, 0]]]]


def test_each_side_alone_is_the_unimodal_mask() -> None:
    """ITC: two passes give what one pass gives in which queries and words can't see each other."""
    model, (ids, mask), image = build(), text(), pictures(3)
    both = model.joint(ids, mask, image, attention=unimodal(mask, QUERIES))
    close(both[:, :QUERIES], model.queries(image))
    close(both[:, QUERIES:][mask], model.words(ids, mask)[mask])
    blind = model.joint(other(ids, 1), mask, pictures(3, seed=2), attention=unimodal(mask, QUERIES))
    assert torch.equal(model.joint(other(ids, 1), mask, image, attention=unimodal(mask, QUERIES))[:, :QUERIES],
                       both[:, :QUERIES])  # fmt: skip
    assert far(blind[:, :QUERIES], both[:, :QUERIES])
    close(model.joint(ids, mask, pictures(3, seed=2), attention=unimodal(mask, QUERIES))[:, QUERIES:][mask],
          both[:, QUERIES:][mask])  # fmt: skip


def test_words_upon_kept_queries_are_the_multimodal_causal_mask() -> None:
    """ITG: words that follow in a second pass say what they say beside the queries."""
    model, (ids, mask), image = build(), text(), pictures(3)
    both = model.joint(ids, mask, image, attention=multimodal_causal(mask, QUERIES))
    cache = KVCache()
    close(model.queries(image, cache=cache), both[:, :QUERIES])
    close(model.spoken(ids, mask, cache)[mask], both[:, QUERIES:][mask])


@pytest.mark.parametrize("place", [1, 3, 6])
def test_a_later_word_changes_nothing_before_it(place: int) -> None:
    """ITG: neither the queries nor an earlier logit; but every later one, and matching's queries."""
    model, image = build(), pictures(3)
    ids, mask = words(3, 7), torch.ones(3, 7, dtype=torch.bool)
    found = []
    for one in (ids, other(ids, place)):
        cache = KVCache()
        queries = model.queries(image, cache=cache)
        beside = model.joint(one, mask, image, attention=multimodal_causal(mask, QUERIES))
        found.append((queries, model.say(model.spoken(one, mask, cache)), beside))
    (queries, logits, beside), (queries2, logits2, beside2) = found
    assert torch.equal(queries, queries2) and torch.equal(beside[:, :QUERIES], beside2[:, :QUERIES])
    assert torch.equal(logits[:, :place], logits2[:, :place])
    assert torch.equal(beside[:, QUERIES : QUERIES + place], beside2[:, QUERIES : QUERIES + place])
    assert all(far(logits[:, i], logits2[:, i]) for i in range(place, 7))
    matched = [model.joint(one, mask, image)[:, :QUERIES] for one in (ids, other(ids, place))]
    assert far(*matched)


def test_words_alone_see_both_ways_and_no_image() -> None:
    model, (ids, mask) = build(), text()
    assert far(model.words(ids, mask)[0, 0], model.words(other(ids, 6), mask)[0, 0])
    close(model.words(ids, mask)[1, :4], model.words(ids[1:2, :4], mask[1:2, :4])[0])


def test_only_queries_look_at_the_image() -> None:
    """With the queries' keys hidden from the words, another image changes no word even in a joint pass."""
    model, (ids, mask) = build(), text()
    one, two = (model.joint(ids, mask, pictures(3, seed=s), attention=unimodal(mask, QUERIES)) for s in (1, 2))
    assert torch.equal(one[:, QUERIES:], two[:, QUERIES:])


@pytest.mark.parametrize("batch", [1, 3])
def test_cached_steps_equal_one_pass(batch: int) -> None:
    model, image, ids = build(), pictures(batch), words(batch, 6)
    ids[:, 0] = DEC
    cache, whole = KVCache(), KVCache()
    model.queries(image, cache=whole)
    logits = model.say(model.spoken(ids, None, whole))
    found = [model.decode(ids[:, :2], image=image, cache=cache)]
    found += [model.decode(ids[:, i : i + 1], image=image, cache=cache) for i in range(2, 6)]
    close(torch.stack(found, dim=1), logits[:, 1:])
    with torch.no_grad():  # a cache with room, written in place
        cache = KVCache(capacity=4)
        found = [model.decode(ids[:, :2], image=image, cache=cache)]
        found += [model.decode(ids[:, i : i + 1], image=image, cache=cache) for i in range(2, 6)]
    close(torch.stack(found, dim=1), logits[:, 1:])


def test_several_texts_share_an_image() -> None:
    """Keys and values of two images serve two texts each, in matching and in speaking."""
    model, image, ids = build(), pictures(2), words(4, 5)
    mask = key_mask([5, 3, 4, 2], 5)
    keys, repeated = model.image_keys_values(image), image.repeat_interleave(2, dim=0)
    close(model.joint(ids, mask, keys), model.joint(ids, mask, repeated))
    close(model.decode(ids, image=keys), model.decode(ids, image=repeated))
    with pytest.raises(ValueError, match="3 texts can't share 2 images"):
        model.decode(ids[:3], image=keys)


def test_past_goes_from_one_part_of_a_step_to_the_next() -> None:
    """The words say the same upon it, and the gradient comes back through it."""
    model, (ids, mask), image = build(), text(), pictures(3)
    cache = KVCache()
    model.queries(image, cache=cache)
    past = model.past(cache)
    assert past.shape == (3, 3, 2, 4, QUERIES, WIDTH // 4)
    leaf = past.detach().requires_grad_()
    logits = model.say(model.spoken(ids, mask, model.past_of(leaf)))
    close(logits[mask], model.say(model.spoken(ids, mask, cache))[mask])
    (gradient,) = torch.autograd.grad(logits[mask].square().sum(), leaf)
    past.backward(gradient)
    assert model.query_tokens.grad is not None and far(model.query_tokens.grad, torch.zeros(QUERIES, WIDTH))


def test_instructed_queries_read_the_image_for_a_text() -> None:
    model, (ids, mask), image = build(INSTRUCTED), text(), pictures(3)
    found = model.queries(image, input_ids=ids, mask=mask)
    assert found.shape == (3, QUERIES, WIDTH)
    close(found, model.joint(ids, mask, image)[:, :QUERIES])
    close(found[1], model.queries(image[1:2], input_ids=ids[1:2, :4])[0])  # padding is never seen
    assert far(found, model.queries(image, input_ids=other(ids, 1), mask=mask))
    with pytest.raises(ValueError, match="needs input_ids of an instruction"):
        model.queries(image)
    with pytest.raises(ValueError, match="takes no input_ids"):
        build().queries(image, input_ids=ids, mask=mask)


def test_without_words_queries_are_the_same() -> None:
    whole, alone = build(), build(SILENT)
    state = whole.state_dict()
    alone.load_state_dict({name: state[name] for name in alone.state_dict()})
    close(alone.queries(pictures(2)), whole.queries(pictures(2)))
    assert not [name for name in alone.state_dict() if ".text." in name.replace("self_attn.text", "") or "head" in name]
    with pytest.raises(MissingVerbError, match="no lm head"):
        build(INSTRUCTED).say(torch.zeros(1, 1, WIDTH))


def test_a_speaker_needs_the_queries() -> None:
    model, (ids, mask) = build(), text()
    with pytest.raises(ValueError, match="holds 0 rows, not the 3 queries"):
        model.spoken(ids, mask, KVCache())
    cache = KVCache()
    for layer in range(3):
        cache.append(layer, KeyValues(torch.zeros(3, 4, 3, 8), torch.zeros(3, 4, 3, 8)))
    with pytest.raises(ValueError, match="text of 9 tokens"):
        model.spoken(words(3, 9), None, cache)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(QFORMER, queries=0), "at least one"),
        (replace(QFORMER, text=replace(QFORMER.text, cross_layers=())), r"such as \[0, 2\]"),
        (replace(QFORMER, text=replace(QFORMER.text, causal=True)), "causal false"),
        (replace(QFORMER, text=replace(QFORMER.text, vocab_size=0)), "must be false then"),
        (replace(QFORMER, dec_id=50), "dec_id 50"),
    ],
)
def test_settings_that_make_no_sense(config: QFormerConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QFormer(config)
