"""Answers to questions: learned with their weights, padding, ranked as the whole list would be, written freely."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.small import close, far, key_mask, words
from tests.models.small_albef import ALBEF, batch
from tests.models.small_blip import BLIP, DEC, ENC
from tests.models.test_albef_heads import build, without_gradient
from vlm.errors import ConfigError
from vlm.models.transformer import KVCache
from vlm.models.vqa import Vqa, VqaConfig, answer_decoder, med_answer_decoder

VQA = VqaConfig(ALBEF.image, ALBEF.text, answer_decoder(ALBEF.text))
MED = VqaConfig(BLIP.image, BLIP.text, med_answer_decoder(BLIP.text), enc_id=ENC, dec_id=DEC)
CONFIGS = pytest.mark.parametrize("config", [VQA, MED], ids=["albef", "blip"])


def answers(rows: int, length: int = 5, seed: int = 7) -> dict[str, Tensor]:
    """Random answers that begin with token 1."""
    lengths = [2 + i % (length - 1) for i in range(rows)]
    mask = key_mask(lengths, length)
    ids = words(rows, length, seed).masked_fill(~mask, 0)
    ids[:, 0] = 1
    return {"input_ids": ids, "attention_mask": mask}


@CONFIGS
def test_answers_are_learned_with_their_weights(config: VqaConfig) -> None:
    model, some, given = build(Vqa, config).train(), batch(3, full=True), answers(4)
    questions, weights = torch.tensor([0, 0, 1, 2]), torch.tensor([0.25, 0.75, 1.0, 0.5])
    found = model(some.pixels, some.tokens, given, questions=questions, weights=weights)
    assert found.logits.shape == (4, 4, 50)
    logs = found.logits.log_softmax(dim=-1)
    expected = torch.zeros(())
    for a in range(4):
        for i in range(1, int(given["attention_mask"][a].sum())):
            expected = expected - weights[a] * logs[a, i - 1, given["input_ids"][a, i]]
    close(found.loss, expected / 3)
    found.loss.backward()
    unused = {f"{name}.positions.weight" for name in ("text", "decoder")}
    assert set(without_gradient(model)) - unused == set()
    soft = torch.randn(4, 4, 50, generator=torch.Generator().manual_seed(3))
    taught = [
        model(some.pixels, some.tokens, given, questions=questions, soft=soft, alpha=alpha).loss
        for alpha in (0.0, 0.3, 1.0)
    ]
    close(taught[1], 0.7 * taught[0] + 0.3 * taught[2])


@CONFIGS
def test_answers_share_their_question_and_its_padding(config: VqaConfig) -> None:
    model, some, given = build(Vqa, config), batch(3), answers(4)
    questions = torch.tensor([2, 0, 1, 2])
    found = model(some.pixels, some.tokens, given, questions=questions)
    alone = torch.stack(
        [
            model(
                some.pixels[q : q + 1],
                some.tokens.select(slice(q, q + 1)),
                {name: value[a : a + 1] for name, value in given.items()},
            ).loss
            for a, q in enumerate(questions.tolist())
        ]
    )
    close(found.loss, alone.sum() / 3)


@CONFIGS
def test_an_answer_sees_only_what_stands_before(config: VqaConfig) -> None:
    model, some, given = build(Vqa, config), batch(3), answers(3)
    question, mask = model.question_states(some.pixels, some.tokens)
    before = model.answer_logits(question, mask, given)
    given["input_ids"][:, 3] = 9
    after = model.answer_logits(question, mask, given)
    close(after[:, :3], before[:, :3])
    other, _ = model.question_states(some.pixels.flip(0), some.tokens)
    assert far(model.answer_logits(other, mask, given), after)


@CONFIGS
def test_padding_changes_no_answer(config: VqaConfig) -> None:
    model, some, given = build(Vqa, config), batch(3), answers(3)
    together = model.answer_logits(*model.question_states(some.pixels, some.tokens), given)
    for i in range(3):
        one = model.question_states(some.pixels[i : i + 1], some.tokens.select(slice(i, i + 1)))
        length = int(given["attention_mask"][i].sum())
        alone = model.answer_logits(*one, {name: value[i : i + 1, :length] for name, value in given.items()})
        close(alone[0], together[i, :length])


def likelihoods(model: Any, some: Any, candidates: dict[str, Tensor]) -> Tensor:
    """(B, C) log-likelihood of each whole answer, one forward each."""
    out = torch.zeros(len(some), len(candidates["input_ids"]))
    for b, c in itertools.product(*map(range, out.shape)):
        length = int(candidates["attention_mask"][c].sum())
        answer = {name: value[c : c + 1, :length] for name, value in candidates.items()}
        question = model.question_states(some.pixels[b : b + 1], some.tokens.select(slice(b, b + 1)))
        logs = model.answer_logits(*question, answer)[0, :-1].log_softmax(dim=-1)
        out[b, c] = logs.gather(1, answer["input_ids"][0, 1:, None]).sum()
    return out


@CONFIGS
def test_ranking_all_answers_is_ranking_by_likelihood(config: VqaConfig) -> None:
    model, some, candidates = build(Vqa, config), batch(3), answers(7)
    scores = likelihoods(model, some, candidates)
    for k in (7, 99):
        found = model.rank(some.pixels, some.tokens, candidates, k=k)
        assert torch.equal(found.answers, scores.argsort(dim=1, descending=True))
        close(found.probabilities, scores.softmax(dim=1).sort(dim=1, descending=True).values)


@CONFIGS
def test_ranking_keeps_the_likeliest_first_tokens(config: VqaConfig) -> None:
    model, some, candidates = build(Vqa, config), batch(3), answers(7)
    scores = likelihoods(model, some, candidates)
    starts = {"input_ids": candidates["input_ids"][:, :2], "attention_mask": candidates["attention_mask"][:, :2]}
    kept = likelihoods(model, some, starts).topk(3, dim=1).indices
    found = model.rank(some.pixels, some.tokens, candidates, k=3)
    assert found.answers.shape == found.probabilities.shape == (3, 3)
    for row in range(3):
        assert set(found.answers[row].tolist()) == set(kept[row].tolist())
        order = scores[row, found.answers[row]]
        assert torch.equal(order, order.sort(descending=True).values)
        close(found.probabilities[row], order.softmax(dim=0))


@CONFIGS
def test_steps_with_a_cache_equal_whole_answers(config: VqaConfig) -> None:
    """Two beams a question."""
    model, some, given = build(Vqa, config), batch(3), answers(6)
    question, mask = model.question_states(some.pixels, some.tokens)
    whole, cache = model.answer_logits(question, mask, given), KVCache()
    ids = given["input_ids"].clone()
    ids[:, 0] = ids[:, 0] if config.dec_id is None else config.dec_id
    for place in range(5):
        found = model.answer_step(ids[:, place : place + 1], question=question, mask=mask, cache=cache)
        real = given["attention_mask"][:, place]
        close(found[real], whole[real, place])
    close(model.answer_step(ids[:, :2], question=question, mask=mask), whole[:, 1])


def test_start_tokens_are_the_configurations() -> None:
    model, some, given = build(Vqa, MED), batch(3), answers(3)
    found = model(some.pixels, some.tokens, given)
    questions = {"input_ids": some.tokens.input_ids.clone(), "attention_mask": some.tokens.attention_mask}
    questions["input_ids"][:, 0], other = ENC, given | {"input_ids": given["input_ids"].clone()}
    other["input_ids"][:, 0] = DEC
    close(model(some.pixels, questions, other).logits, found.logits)
    plain = build(Vqa, replace(MED, enc_id=None, dec_id=None))
    close(plain(some.pixels, questions, other).logits, found.logits)
    assert far(plain(some.pixels, some.tokens, other).logits, found.logits)
    assert far(plain(some.pixels, questions, given).logits, found.logits)


def test_smoothed_labels() -> None:
    model, some, given = build(Vqa, replace(MED, label_smoothing=0.1)), batch(3), answers(3)
    found = model(some.pixels, some.tokens, given)
    real = given["attention_mask"][:, 1:]
    truth = given["input_ids"][:, 1:][real]
    close(found.loss, F.cross_entropy(found.logits[real], truth, label_smoothing=0.1, reduction="sum") / 3)


@pytest.mark.parametrize(
    ("decoder", "named"),
    [
        (replace(VQA.decoder, causal=False), "decoder must be causal"),
        (replace(VQA.decoder, cross_layers=()), "have cross_layers"),
        (replace(VQA.decoder, cross_width=24), "decoder.cross_width must be text.width 32"),
    ],
)
def test_bad_decoders_are_named(decoder: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Vqa(replace(VQA, decoder=decoder))
