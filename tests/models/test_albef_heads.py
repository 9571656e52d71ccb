"""ALBEF's fine-tuned heads: losses, gradients, padding, two images, answers ranked as the whole list would be."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.small import close, far, key_mask, words
from tests.models.small_albef import ALBEF, batch
from vlm.errors import ConfigError
from vlm.models.albef_heads import (
    ClassifierConfig,
    Entailment,
    Nlvr2,
    Vqa,
    VqaConfig,
    answer_decoder,
    two_image_text,
)

ONE = ClassifierConfig(ALBEF.image, ALBEF.text)
TWO = ClassifierConfig(ALBEF.image, two_image_text(ALBEF.text), "nlvr2")
VQA = VqaConfig(ALBEF.image, ALBEF.text, answer_decoder(ALBEF.text))


def build(kind: Any, config: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def without_gradient(model: nn.Module) -> list[str]:
    return [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def pairs_of_pictures(rows: int) -> Tensor:
    return torch.randn(rows, 2, 3, 16, 16, generator=torch.Generator().manual_seed(4))


def answers(rows: int, length: int = 5, seed: int = 7) -> dict[str, Tensor]:
    """Random answers that begin with token 1."""
    lengths = [2 + i % (length - 1) for i in range(rows)]
    mask = key_mask(lengths, length)
    ids = words(rows, length, seed).masked_fill(~mask, 0)
    ids[:, 0] = 1
    return {"input_ids": ids, "attention_mask": mask}


def test_entailment() -> None:
    model, some, labels = build(Entailment, ONE).train(), batch(5, full=True), torch.tensor([0, 1, 2, 0, 1])
    assert model(some.pixels, some.tokens).loss is None
    found = model(some.pixels, some.tokens, labels)
    assert found.logits.shape == (5, 3)
    close(found.loss, F.cross_entropy(found.logits, labels))
    found.loss.backward()
    assert without_gradient(model) == []
    soft = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))
    pure = model(some.pixels, some.tokens, labels, soft=soft, alpha=1.0).loss
    close(pure, F.cross_entropy(found.logits, soft.softmax(dim=1)))
    close(model(some.pixels, some.tokens, labels, soft=soft, alpha=0.4).loss, 0.6 * found.loss + 0.4 * pure)


@pytest.mark.parametrize("kind", ["entailment", "nlvr2"])
def test_padding_and_batch_change_no_class(kind: str) -> None:
    some = batch(4)
    model = build(Entailment, ONE) if kind == "entailment" else build(Nlvr2, TWO)
    pixels = some.pixels if kind == "entailment" else pairs_of_pictures(4)
    together = model(pixels, some.tokens).logits
    for i in range(4):
        close(model(pixels[i : i + 1], some.tokens.select(slice(i, i + 1))).logits[0], together[i])


def test_nlvr2_by_its_layers() -> None:
    """The paper's own order: of each fusion layer a block for the first image, then one for the second."""
    model, some, pixels = build(Nlvr2, TWO), batch(3), pairs_of_pictures(3)
    assert TWO.text.layers == 6 and TWO.text.cross_layers == (2, 3, 4, 5) and TWO.text.cross_shared == (3, 5)
    images = [model.image(pixels[:, i]) for i in (0, 1)]
    mask = some.tokens.attention_mask[:, None, None]
    x = model.text.embed(some.tokens.input_ids)
    for i, layer in enumerate(model.text.layers):
        if i < 2:
            x = layer(x, mask=mask)
            continue
        projecting = model.text.layers[i - (i % 2)].cross_attn
        x = layer(x, mask=mask, image=projecting.keys_values(images[i % 2]))
    close(model(pixels, some.tokens).logits, model.nlvr2_head(x[:, 0]))
    assert far(model(pixels, some.tokens).logits, model(pixels.flip(1), some.tokens).logits)


@pytest.mark.parametrize(("task", "classes"), [("nlvr2", 2), ("assignment", 3)])
def test_nlvr2_learns_from_labels(task: Any, classes: int) -> None:
    model, some = build(Nlvr2, replace(TWO, task=task)).train(), batch(3, full=True)
    found = model(pairs_of_pictures(3), some.tokens, torch.tensor([0, 1, classes - 1]))
    assert found.logits.shape == (3, classes)
    found.loss.backward()
    assert without_gradient(model) == []
    shared = [layer.cross_attn.kv is None for layer in model.text.layers[2:]]
    assert shared == [False, True, False, True]


def test_answers_are_learned_with_their_weights() -> None:
    model, some, given = build(Vqa, VQA).train(), batch(3, full=True), answers(4)
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


def test_answers_share_their_question_and_its_padding() -> None:
    model, some, given = build(Vqa, VQA), batch(3), answers(4)
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


def test_an_answer_sees_only_what_stands_before() -> None:
    model, some, given = build(Vqa, VQA), batch(3), answers(3)
    question, mask = model.question_states(some.pixels, some.tokens)
    before = model.answer_logits(question, mask, given)
    given["input_ids"][:, 3] = 9
    after = model.answer_logits(question, mask, given)
    close(after[:, :3], before[:, :3])
    other, _ = model.question_states(some.pixels.flip(0), some.tokens)
    assert far(model.answer_logits(other, mask, given), after)


def test_padding_changes_no_answer() -> None:
    model, some, given = build(Vqa, VQA), batch(3), answers(3)
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


def test_ranking_all_answers_is_ranking_by_likelihood() -> None:
    model, some, candidates = build(Vqa, VQA), batch(3), answers(7)
    scores = likelihoods(model, some, candidates)
    for k in (7, 99):
        found = model.rank(some.pixels, some.tokens, candidates, k=k)
        assert torch.equal(found.answers, scores.argsort(dim=1, descending=True))
        close(found.probabilities, scores.softmax(dim=1).sort(dim=1, descending=True).values)


def test_ranking_keeps_the_likeliest_first_tokens() -> None:
    model, some, candidates = build(Vqa, VQA), batch(3), answers(7)
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


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Nlvr2(replace(ONE, task="nlvr2")), "must be in cross_shared: two_image_text"),
        (lambda: Nlvr2(replace(TWO, task="entailment")), "unknown task 'entailment'"),
        (lambda: Entailment(replace(ONE, task="entailed")), "did you mean 'entailment'"),
        (lambda: Vqa(replace(VQA, decoder=replace(VQA.decoder, causal=False))), "decoder must be causal"),
        (lambda: Vqa(replace(VQA, decoder=replace(VQA.decoder, cross_layers=(0,)))), "cross_layers everywhere"),
        (lambda: Entailment(replace(ONE, text=replace(ALBEF.text, cross_shared=(2,)))), r"cross_shared \[2\]"),
        (lambda: Entailment(replace(ONE, text=replace(ALBEF.text, cross_shared=(1,)))), r"cross_shared \[1\]"),
    ],
)
def test_bad_settings_are_named(make: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make()
