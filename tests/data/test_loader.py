"""The loader: each sample once, the same batches for any workers, resume over ranks, unreadable pictures."""

from __future__ import annotations

import dataclasses
import io
import logging
import pickle
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.memory import Memory, encoded
from vlm.data.augment import Augment
from vlm.data.batch import KINDS, Batch
from vlm.data.captions import CaptionVariation
from vlm.data.loader import UNREADABLE, LoaderConfig, evaluation_batches, make_loader, steps_per_epoch
from vlm.data.plan import plan
from vlm.data.samples import Sample, caption_id, stable_id
from vlm.data.tokenizers import Tokenizer, wordpiece
from vlm.data.transforms import ImageTransform
from vlm.errors import ConfigError, DataError

TRANSFORM = ImageTransform(16)
CHANGING: dict[str, Any] = {
    "augment": Augment(crop=0.7, shrink=1.2, rotate=10, flip=0.5, saturation=0.3, background=0.5),
    "captions": CaptionVariation(tags=0.3, template=0.3),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The package's own."""
    return wordpiece()


def load(
    source: Memory, tokenizer: Tokenizer, *, epoch: int = 0, skip: int = 0, rank: int = 0, ranks: int = 1, **config: Any
) -> list[Batch]:
    """All batches of one rank; 8 samples a batch and no workers unless told."""
    chosen = LoaderConfig(**({"batch_size": 8, "workers": 0, "bucket_batches": 2} | config))
    loader = make_loader(
        source, chosen, tokenizer=tokenizer, transform=TRANSFORM, epoch=epoch, skip_samples=skip, rank=rank, ranks=ranks
    )
    return list(loader)


def keys(batches: Iterable[Batch]) -> list[str]:
    """Keys of all rows in order."""
    return [key for batch in batches for key in batch.keys]


def same(one: Batch, two: Batch) -> bool:
    """Whether two batches are equal in everything."""
    tensors = [(one.pixels, two.pixels), (one.ids, two.ids), (one.tokens.input_ids, two.tokens.input_ids)]
    tensors.append((one.tokens.attention_mask, two.tokens.attention_mask))
    rest = (one.keys, one.consumed, one.skipped) == (two.keys, two.consumed, two.skipped)
    return rest and all(torch.equal(a, b) for a, b in tensors)


def all_same(one: list[Batch], two: list[Batch]) -> bool:
    """Whether two lists of batches are equal."""
    return len(one) == len(two) and all(map(same, one, two))


def test_buckets_shorten_the_tokens(tokenizer: Tokenizer) -> None:
    source = Memory(160)
    padded = {b: sum(x.tokens.input_ids.numel() for x in load(source, tokenizer, bucket_batches=b)) for b in (1, 20)}
    assert padded[20] < padded[1]


@pytest.mark.parametrize("n", [1, 7, 24, 27, 30])
@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (2, 0), (3, 0), (2, 1), (4, 0)])
def test_each_sample_once_on_one_rank(n: int, ranks: int, workers: int, tokenizer: Tokenizer) -> None:
    source = Memory(n)
    if n < ranks:
        with pytest.raises(ConfigError, match=rf"too few for {ranks} ranks"):
            load(source, tokenizer, ranks=ranks)
        return
    parts = [load(source, tokenizer, rank=rank, ranks=ranks, workers=workers) for rank in range(ranks)]
    assert sorted(key for part in parts for key in keys(part)) == sorted(source.keys)
    assert len({len(part) for part in parts}) == 1  # the same number of steps
    for together in zip(*parts, strict=True):
        sizes = [len(batch) for batch in together]
        assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1
        assert len({batch.consumed for batch in together}) == 1
    assert parts[0][-1].consumed == n and len(parts[0]) == steps_per_epoch(n, LoaderConfig(batch_size=8))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_never_change_a_batch(tokenizer: Tokenizer) -> None:
    source = Memory(45, broken=[3, 20])
    alone = load(source, tokenizer, **CHANGING)
    for workers in (1, 3):
        assert all_same(load(source, tokenizer, workers=workers, **CHANGING), alone)


def test_ranks_never_change_a_sample(tokenizer: Tokenizer) -> None:
    source = Memory(40)
    whole = {b.keys[i]: (b.pixels[i], b.ids[i]) for b in load(source, tokenizer, **CHANGING) for i in range(len(b))}
    for rank in range(3):
        for batch in load(source, tokenizer, rank=rank, ranks=3, **CHANGING):
            for i, key in enumerate(batch.keys):
                assert torch.equal(batch.pixels[i], whole[key][0]) and torch.equal(batch.ids[i], whole[key][1])


def test_epochs_and_seeds_change_order_texts_and_pictures(tokenizer: Tokenizer) -> None:
    source = Memory(40)
    shown = [load(source, tokenizer, epoch=e, seed=s, **CHANGING) for e, s in ((0, 0), (1, 0), (0, 1))]
    assert len({tuple(keys(batches)) for batches in shown}) == 3
    rows = [{b.keys[i]: (b.pixels[i], b.ids[i]) for b in batches for i in range(len(b))} for batches in shown]
    for other in rows[1:]:
        assert sum(torch.equal(rows[0][key][0], other[key][0]) for key in source.keys) < 10
        assert sum(torch.equal(rows[0][key][1], other[key][1]) for key in source.keys) < 30


def test_no_draw_from_the_global_generators(tokenizer: Tokenizer) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    load(Memory(20), tokenizer, **CHANGING)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("steps", [0, 1, 3, 6])
def test_resume_goes_on_with_the_very_same_batches(steps: int, tokenizer: Tokenizer) -> None:
    source = Memory(45)
    whole = load(source, tokenizer, epoch=4, **CHANGING)
    skip = whole[steps - 1].consumed if steps else 0
    assert all_same(load(source, tokenizer, epoch=4, skip=skip, workers=2, **CHANGING), whole[steps:])


def test_resume_on_other_ranks_neither_repeats_nor_loses(tokenizer: Tokenizer) -> None:
    source = Memory(45)
    one = load(source, tokenizer)
    for ranks in (2, 3):
        skip = one[1].consumed
        parts = [load(source, tokenizer, skip=skip, rank=rank, ranks=ranks) for rank in range(ranks)]
        for step, batch in enumerate(one[2:]):
            rows: list[str] = [""] * len(batch)
            for rank in range(ranks):
                rows[rank::ranks] = parts[rank][step].keys
            assert tuple(rows) == batch.keys
        back = load(source, tokenizer, skip=parts[0][1].consumed)  # and to one rank again
        assert all_same(back, one[4:])


def test_resume_in_the_middle_of_a_batch_is_told(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    source = Memory(40)
    whole = load(source, tokenizer)
    assert not caplog.records
    assert all_same(load(source, tokenizer, skip=11), whole[1:])
    assert "no batch of epoch 0 ends after 11 samples" in caplog.text
    assert load(source, tokenizer, skip=40) == []


def test_all_captions_come(tokenizer: Tokenizer) -> None:
    source = Memory(10)
    seen = Counter(
        row for epoch in range(12) for b in load(source, tokenizer, epoch=epoch) for row in b.ids[:, 1].tolist()
    )
    expected = {caption_id(caption) for i in range(10) for caption in source.meta(i)["captions"]}
    assert set(seen) == expected


@pytest.mark.parametrize("template", [0.0, 1.0])
def test_ids_are_concept_caption_text_and_picture(tokenizer: Tokenizer, template: float) -> None:
    """A caption stays itself inside a template, where the text is another one."""
    source = Memory(20)
    for batch in load(source, tokenizer, captions=CaptionVariation(template=template)):
        for key, (concept, caption, text, picture) in zip(batch.keys, batch.ids.tolist(), strict=True):
            number = int(key[1:])
            assert concept == stable_id(source.concepts[number]) and picture == stable_id(encoded(number))
            assert caption in {caption_id(text) for text in source.meta(number)["captions"]}
            assert (text == caption) is (template == 0)


def test_shapes_and_cut_texts(tokenizer: Tokenizer) -> None:
    batch = load(Memory(40), tokenizer, max_length=6)[0]
    assert batch.pixels.shape == (8, 3, 16, 16) and batch.pixels.dtype == torch.float32
    assert batch.tokens.input_ids.shape[1] <= 6 and batch.ids.shape == (8, len(KINDS))
    longest = max(b.tokens.input_ids.shape[1] for b in load(Memory(40), tokenizer))
    assert longest > 6
    short = wordpiece(max_length=5)
    assert all(b.tokens.input_ids.shape[1] <= 5 for b in load(Memory(40), short, max_length=30))


def test_flips_heed_every_caption_of_the_picture(tokenizer: Tokenizer) -> None:
    class Sided(Memory):
        def meta(self, number: int) -> dict[str, Any]:
            return {"captions": ["hand", "hand to the left"][: 1 + number % 2], "tags": []}

        def __getitem__(self, number: int) -> Sample:
            image = Image.new("RGB", (16, 16), "white")
            image.paste((0, 0, 0), (0, 0, 8, 16))
            file = io.BytesIO()
            image.save(file, "PNG")
            return Sample(self.keys[number], file.getvalue(), self.meta(number))

    for batch in load(Sided(32), tokenizer, augment=Augment(flip=1)):
        for key, pixels in zip(batch.keys, batch.pixels, strict=True):
            stayed = bool(pixels[0, 0, 0] < pixels[0, 0, -1])
            assert stayed == (int(key[1:]) % 2 == 1)


def test_unreadable_pictures_give_way_to_neighbours(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    source = Memory(32, broken=[3, 9], gone=[20])
    batches = load(source, tokenizer)
    assert [len(batch) for batch in batches] == [8] * 4 and batches[-1].consumed == 32
    assert set(keys(batches)) == set(source.keys) - {"k3", "k9", "k20"}
    assert sorted(message.split(":")[0] for batch in batches for message in batch.skipped) == ["k20", "k3", "k9"]
    healthy = load(Memory(32), tokenizer)
    for batch, whole in zip(batches, healthy, strict=True):
        for place, key in enumerate(whole.keys):
            if int(key[1:]) in (3, 9, 20):
                assert batch.keys[place] in whole.keys
            else:
                assert batch.keys[place] == key and torch.equal(batch.pixels[place], whole.pixels[place])


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_pictures_are_told_once(
    workers: int, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    source = Memory(32, broken=[3, 9])
    with caplog.at_level(logging.WARNING, "vlm.data"):
        for epoch in range(3):
            load(source, tokenizer, epoch=epoch, workers=workers)
    assert sorted(record.getMessage().split(": ")[2] for record in caplog.records) == ["k3", "k9"]
    assert source.problems.counts == {UNREADABLE: 6}


def test_very_many_unreadable_pictures_dont_flood_the_log(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    source = Memory(200, broken=range(0, 200, 2))
    load(source, tokenizer, bucket_batches=1, batch_size=100)
    assert len(caplog.records) == source.problems.keep + 1 and "only counted" in caplog.records[-1].getMessage()
    assert source.problems.counts == {UNREADABLE: 100}


def test_a_rank_without_a_readable_picture_borrows_one(tokenizer: Tokenizer) -> None:
    first = plan(Memory(4).lengths, 4, seed=0, epoch=0, bucket_batches=2)[0].tolist()
    source = Memory(4, broken=first[::2])  # all of rank 0
    parts = [load(source, tokenizer, batch_size=4, rank=rank, ranks=2) for rank in range(2)]
    assert parts[0][0].keys == (f"k{first[1]}",) * 2 and len(parts[0][0].skipped) == 2
    assert parts[1][0].keys == tuple(f"k{i}" for i in first[1::2]) and parts[1][0].skipped == ()
    assert torch.equal(parts[0][0].pixels[0], parts[1][0].pixels[0])


@pytest.mark.parametrize("workers", [0, 1])
def test_no_readable_picture_stops_all_ranks_alike(workers: int, tokenizer: Tokenizer) -> None:
    source = Memory(16, broken=range(16))
    for rank in range(2):
        with pytest.raises(DataError, match="no picture of a whole batch") as caught:
            load(source, tokenizer, rank=rank, ranks=2, workers=workers)
        assert "Traceback" not in str(caught.value)


def test_workers_may_be_spawned(tokenizer: Tokenizer) -> None:
    config = LoaderConfig(batch_size=8, workers=1)
    made = make_loader(Memory(16), config, tokenizer=tokenizer, transform=TRANSFORM, epoch=0)
    inside = made.gi_frame.f_locals["loader"].dataset  # type: ignore[attr-defined]
    assert same(pickle.loads(pickle.dumps(inside))[1], inside[1])


def test_bad_calls(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="memory: no samples to train on"):
        load(Memory(0), tokenizer)
    for bad in ({"rank": 2, "ranks": 2}, {"rank": -1}, {"skip": -1}):
        with pytest.raises(ConfigError, match="expected 0 <= rank"):
            load(Memory(8), tokenizer, **bad)
    with pytest.raises(ConfigError, match=r"set loader\.batch_size to 10 or more"):
        load(Memory(12), tokenizer, ranks=5)  # 8 and 4
    with pytest.raises(ConfigError, match="batch_size"):
        plan(np.ones(4), 0, seed=0, epoch=0)


@pytest.mark.parametrize(
    ("name", "value"), [("batch_size", 0), ("workers", -1), ("bucket_batches", 0), ("seed", -1), ("max_length", 1)]
)
def test_bad_settings_are_named(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"loader\.{name} must be"):
        dataclasses.replace(LoaderConfig(), **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_is_in_order_and_unchanged(workers: int, tokenizer: Tokenizer) -> None:
    source = Memory(21, broken=[2], gone=[19])
    made = list(evaluation_batches(source, tokenizer=tokenizer, transform=TRANSFORM, batch_size=5, workers=workers))
    readable = [i for i in range(21) if i not in (2, 19)]
    assert keys(made) == [f"k{i}" for i in readable]
    assert [batch.consumed for batch in made] == [5, 10, 15, 20, 21]
    pixels, ids = torch.cat([b.pixels for b in made]), torch.cat([b.ids for b in made])
    for place, number in enumerate(readable):
        image = Image.open(io.BytesIO(encoded(number))).convert("RGB")
        assert torch.equal(pixels[place], TRANSFORM(image))
        text = caption_id(f"thing {number}")
        assert ids[place].tolist() == [stable_id(source.concepts[number]), text, text, stable_id(encoded(number))]
    assert source.problems.counts == {UNREADABLE: 2}


def test_evaluation_of_a_part_and_of_nothing(tokenizer: Tokenizer) -> None:
    def run(source: Memory, **options: Any) -> list[str]:
        return keys(evaluation_batches(source, tokenizer=tokenizer, transform=TRANSFORM, **options))

    assert run(Memory(9), batch_size=4, limit=6) == [f"k{i}" for i in range(6)]
    assert run(Memory(9), batch_size=4, limit=60) == [f"k{i}" for i in range(9)]
    assert run(Memory(9, broken=range(4, 8)), batch_size=4) == ["k0", "k1", "k2", "k3", "k8"]
    assert run(Memory(4, broken=range(4))) == []
    with pytest.raises(DataError, match="memory: no samples to evaluate on"):
        run(Memory(0))
    with pytest.raises(ConfigError, match="limit must be at least 1"):
        run(Memory(3), limit=0)
