"""BLIP-2's first stage at work: the nearest query ranks pictures and labels, and what it says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tasks.fused import qformer_model
from tests.tasks.small import noise
from tests.tasks.test_retrieval import captioned
from vlm.errors import MissingVerbError
from vlm.generate import GenerationConfig
from vlm.models.cache import KVCache
from vlm.tasks.caption import Captioner
from vlm.tasks.features import source_features
from vlm.tasks.heat import choose_method
from vlm.tasks.language import evaluate_language
from vlm.tasks.metrics import ranks_of_best
from vlm.tasks.retrieval import evaluate_retrieval
from vlm.tasks.zero_shot import ZeroShotClassifier

COUNT = 9


@pytest.fixture
def source(tmp_path: Path) -> Any:
    return captioned(tmp_path / "set", [(p, f"thing number {n}", f"c{n}") for n, p in enumerate(noise(COUNT))])


def test_retrieval_ranks_by_the_nearest_query(source: Any) -> None:
    model = qformer_model()
    found = source_features(model, source)
    assert found.image.shape == (COUNT, 3, 16)
    similar = model.similarity(found.image, found.text).numpy() / model.logit_scale.item()  # (images, texts)
    report = evaluate_retrieval(model, source, rerank=4)
    ids = (found.ids[:, None, :] == found.ids[None]).any(axis=2)
    for way, scores in (("image_to_text", similar), ("text_to_image", similar.T)):
        assert report.recall[way][1].value == pytest.approx((ranks_of_best(scores, ids) < 1).mean())
    assert report.reranked is not None and report.reranked.pairs > 0


def test_labels_are_chosen_by_the_nearest_query() -> None:
    model, labels = qformer_model(), ["red", "green", "a blue thing"]
    classifier = ZeroShotClassifier(model, labels, ["{}"])
    pictures = noise(4)
    image = model.encode_image(model.pixels(pictures))
    best = model.similarity(image, model.encode_text(model.tokens(labels))).argmax(dim=1)
    assert [found[0].label for found in classifier.predict(pictures)] == [labels[i] for i in best]


@pytest.mark.parametrize("strategy", ["greedy", "beam", "nucleus"])
def test_captions_don_t_depend_on_the_batch(strategy: Any) -> None:
    model, pictures = qformer_model(), noise(5)
    config = GenerationConfig(strategy, max_new_tokens=6, sequences=1 if strategy == "greedy" else 2)
    whole = [found for _, found in Captioner(model, config, batch_size=5).caption_each(pictures)]
    alone = [found for _, found in Captioner(model, config, batch_size=1).caption_each(pictures)]
    assert [[one.text for one in texts] for texts in whole] == [[one.text for one in texts] for texts in alone]
    assert len({texts[0].text for texts in whole}) > 1


def test_greedy_is_the_likeliest_word_each_time() -> None:
    """By the plain logits of everything said so far, without a cache."""
    model = qformer_model()
    pixels, network = model.pixels(noise(2)), model.network
    found = model.generate(pixels, config=GenerationConfig("greedy", max_new_tokens=5, min_new_tokens=4))
    ids = torch.full((2, 1), network.config.dec_id)
    for place in range(4):
        logits = network.lm_logits(pixels, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[:, -1]
        logits[:, model.tokenizer.end_id] = -1e9
        ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
        assert torch.equal(found.ids[:, 0, place], ids[:, -1])


def test_several_texts_of_an_image_read_it_once() -> None:
    model = qformer_model()
    network: Any = model.network
    image = network.decoder_keys_values(network.look(model.pixels(noise(2))))
    ids = torch.tensor([[network.config.dec_id, 4], [network.config.dec_id, 7]]).repeat(2, 1)
    found = network.decode(ids, image=image, cache=KVCache(capacity=9))
    pixels = model.pixels([noise(2)[0]] * 2)
    alone = network.lm_logits(pixels, {"input_ids": ids[:2], "attention_mask": torch.ones(2, 2)})[:, -1]
    torch.testing.assert_close(found[:2], alone, rtol=1e-4, atol=1e-4)


def test_words_are_foreseen(source: Any) -> None:
    report = evaluate_language(qformer_model(), source)
    assert report.tokens > 2 * COUNT and report.loss > 0


def test_what_it_can_t() -> None:
    with pytest.raises(MissingVerbError, match="without a part that tells where it looks"):
        choose_method(qformer_model())
    with pytest.raises(MissingVerbError, match="no itg head"):
        Captioner(qformer_model(heads=("itc", "itm")))
