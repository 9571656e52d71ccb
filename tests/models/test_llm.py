"""The frozen language model: against `transformers`' own calls, padding that changes nothing, what is kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.models.small_llm import END, FIRST, START, WORDS, inner, language_model, texts, visual_prompt
from vlm.generate import GenerationConfig, generate

CAUSAL = ["llama", "opt"]
ALL = [*CAUSAL, "llama" + FIRST, "t5"]


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CAUSAL)
def test_causal_logits_are_those_of_the_model_itself(kind: str) -> None:
    model, visual = language_model(kind), visual_prompt(1)
    ids, mask = texts([5])
    whole = torch.cat([visual, model.embed(ids)], dim=1)
    close(model.logits(visual, ids, mask), inner(kind)(inputs_embeds=whole).logits[:, 3:])


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_start_that_stands_first_is_read_before_the_image(kind: str) -> None:
    model, visual = language_model(kind + FIRST), visual_prompt(1)
    ids, mask = texts([5])
    words = model.embed(ids)
    whole = torch.cat([words[:, :1], visual, words[:, 1:]], dim=1)  # start, 3 of the image, 4 more of the text
    # What the image's last one says is the text's second token, the one after its start.
    close(model.logits(visual, ids, mask), inner(kind)(inputs_embeds=whole).logits[:, 3:])


def test_seq2seq_reads_what_is_given_and_says_the_rest() -> None:
    model, visual = language_model("t5"), visual_prompt(1)
    ids, mask = texts([6])
    found = model.logits(visual, ids, mask, given=torch.tensor([3]))
    read = torch.cat([visual, model.embed(torch.tensor([[*ids[0, 1:3].tolist(), END]]))], dim=1)
    said = torch.tensor([[START, *ids[0, 3:].tolist()]])
    close(found[:, 2:], inner("t5")(inputs_embeds=read, decoder_input_ids=said).logits)
    assert not found[:, :2].any()  # what is given isn't said


@pytest.mark.parametrize("kind", ALL)
def test_rows_of_other_lengths_change_nothing(kind: str) -> None:
    model, visual, lengths, given = language_model(kind), visual_prompt(3), [4, 7, 5], torch.tensor([2, 4, 1])
    ids, mask = texts(lengths)
    together = model.logits(visual, ids, mask, given)
    for row, length in enumerate(lengths):
        alone = model.logits(visual[row : row + 1], ids[row : row + 1, :length], mask[row : row + 1, :length],
                             given[row : row + 1])  # fmt: skip
        close(together[row : row + 1, :length], alone)


@pytest.mark.parametrize("kind", ALL)
def test_token_by_token_equals_all_at_once(kind: str) -> None:
    """With prompts of different lengths, so that shorter rows are padded on the left."""
    model, visual, lengths = language_model(kind), visual_prompt(3), [2, 5, 3]
    ids, mask = texts(lengths)
    new = torch.randint(3, WORDS, (3, 4), generator=torch.Generator().manual_seed(5))
    state = model.begin(visual, ids, mask)
    steps = [state.first, *(model.step(new[:, i : i + 1], state) for i in range(3))]
    for row, length in enumerate(lengths):
        text = torch.cat([ids[row, :length], new[row]])[None]
        given = torch.tensor([length])
        whole = model.logits(visual[row : row + 1], text, torch.ones_like(text), given)[0, length - 1 : length + 3]
        close(torch.stack([step[row] for step in steps]), whole)


@pytest.mark.parametrize("kind", ALL)
def test_reordered_rows_go_on_as_those_they_are_copies_of(kind: str) -> None:
    model, visual = language_model(kind), visual_prompt(3)
    ids, mask = texts([2, 5, 3])
    rows, token = torch.tensor([2, 2, 0, 1]), torch.tensor([[7], [8], [9], [7]])
    state = model.begin(visual, ids, mask)
    state.reorder(rows)
    found = model.step(token, state)
    again = model.begin(visual[rows], ids[rows], mask[rows])
    close(found, model.step(token, again))


@pytest.mark.parametrize("search", [{"strategy": "greedy"}, {"strategy": "beam", "beams": 3}])
@pytest.mark.parametrize("kind", ALL)
def test_search_says_what_transformers_says(kind: str, search: dict[str, Any]) -> None:
    model, theirs, visual = language_model(kind), inner(kind.removesuffix(FIRST)), visual_prompt(2)
    ids, mask = texts([4, 4])

    def step(tokens: torch.Tensor, held: Any) -> torch.Tensor:
        first = held.take_first()  # of what was read already
        return model.step(tokens, held) if first is None else first

    first = torch.full((2, 1), START)
    prompt = {"input_ids": first, "attention_mask": torch.ones_like(first)}
    config = GenerationConfig(**search, max_new_tokens=8)
    found = generate(step, model.begin(visual, ids, mask), prompt, config, end_id=END, pad_id=0)
    given = torch.cat([ids[:, 1:], torch.full((2, 1), END)], dim=1) if kind == "t5" else ids
    words, before = model.embed(given), int(kind.endswith(FIRST))
    read = torch.cat([words[:, :before], visual, words[:, before:]], dim=1)
    expected = theirs.generate(
        inputs_embeds=read, attention_mask=torch.ones(read.shape[:2]), num_beams=search.get("beams", 1),
        do_sample=False, max_new_tokens=8,
    )  # fmt: skip
    expected = expected[:, 1:] if kind == "t5" else expected
    assert torch.equal(found.ids[:, 0], expected)


def test_frozen_whatever_is_asked() -> None:
    model = language_model("llama").train()
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    visual = visual_prompt(1).requires_grad_()
    ids, mask = texts([3])
    model.logits(visual, ids, mask).sum().backward()
    assert visual.grad is not None and visual.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ALL)
def test_recomputed_layers_give_the_same_gradient(kind: str) -> None:
    """Each layer runs again in the backward pass, also of a copy and in eval mode, and keeps nothing until then."""
    plain, model = language_model(kind), language_model(kind)
    assert not model.checkpointing
    model.checkpointing = True
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # a copy has its own weights
    ids, mask = texts([5, 7])
    gradients, kept, runs = [], [], 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    attention = next(m for m in copied.inner.modules() if type(m).__name__.endswith("Attention"))
    attention.register_forward_hook(count)
    for one in (plain, copied):
        sizes: list[int] = []
        visual = visual_prompt(2).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):  # type: ignore[misc]
            found = one.logits(visual, ids, mask, torch.tensor([2, 1]))
        kept.append(sum(sizes))
        found.square().sum().backward()
        gradients.append(visual.grad)
    assert torch.equal(*gradients) and copied.checkpointing
    assert runs == 2 and kept[1] < 0.5 * kept[0]
    copied.checkpointing = False
    copied.logits(visual_prompt(2).requires_grad_(), ids, mask).sum().backward()
    assert runs == 3 and not copied.checkpointing
