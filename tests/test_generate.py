"""Search: what `transformers` finds with the same weights, whatever stands beside a row."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tests.generated import END, PAD, START, VOCABULARY, pictures, reference, stepper
from vlm.errors import ConfigError
from vlm.generate import Generated, GenerationConfig, constrain, draw, generate

SETTINGS: list[dict[str, Any]] = [
    {},
    {"min_new_tokens": 6},
    {"repetition_penalty": 1.4},
    {"no_repeat_ngram_size": 2},
    {"length_penalty": 2.0},
    {"length_penalty": -1.0},
    {"length_penalty": 0.5, "early_stopping": True},
    {"early_stopping": "never"},
    {"min_new_tokens": 4, "repetition_penalty": 0.8, "no_repeat_ngram_size": 3, "max_new_tokens": 5},
]
BEAM = GenerationConfig(max_new_tokens=12, beams=3, sequences=3)
GREEDY = GenerationConfig("greedy", max_new_tokens=12)
NUCLEUS = GenerationConfig("nucleus", max_new_tokens=12, sequences=4)
STRATEGIES = pytest.mark.parametrize("config", [BEAM, GREEDY, NUCLEUS], ids=lambda config: config.strategy)


@cache
def model(seed: int = 0) -> Any:
    return reference(seed)


def prompts(*texts: list[int]) -> dict[str, Tensor]:
    longest = max(map(len, texts))
    return {
        "input_ids": torch.tensor([text + [9] * (longest - len(text)) for text in texts]),  # 9: never looked at
        "attention_mask": torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts]),
    }


def draws(count: int, sequences: int, length: int) -> Tensor:
    return torch.rand(count, sequences, length, generator=torch.Generator().manual_seed(3))


@torch.inference_mode()
def ours(pixels: Tensor, config: GenerationConfig, prompt: Any = None, *, uniform: Tensor | None = None) -> Generated:
    step, state = stepper(model(), pixels)
    prompt = prompt or prompts(*[[START]] * len(pixels))
    if config.strategy == "nucleus" and uniform is None:
        uniform = draws(len(pixels), config.sequences, config.max_new_tokens)
    return generate(step, state, prompt, config, end_id=END, pad_id=PAD, draws=uniform)


def texts(found: Generated) -> list[list[list[int]]]:
    """By image and text, its tokens."""
    for rows, counts in zip(found.ids, found.lengths, strict=True):
        for row, count in zip(rows, counts, strict=True):
            assert (row[count:] == PAD).all()
            assert END not in row[: count - 1]
    return [
        [row[:count].tolist() for row, count in zip(rows, counts.tolist(), strict=True)]
        for rows, counts in zip(found.ids, found.lengths, strict=True)
    ]


@torch.inference_mode()
def theirs(pixels: Tensor, prompt: list[int] | None = None, *, seed: int = 0, **settings: Any) -> list[list[int]]:
    """What `transformers` finds, cut behind the end token (it pads with that token, or with padding)."""
    given = None if prompt is None else torch.tensor([[*prompt, END]] * len(pixels))
    out = model(seed).generate(pixels, given, do_sample=False, **({"max_new_tokens": 12} | settings))
    rows = [row[len(prompt or [START]) :] for row in out.tolist()]
    return [row[: row.index(END) + 1] if END in row else row for row in rows]


def as_ours(settings: dict[str, Any]) -> dict[str, Any]:
    renamed = {"no_repeat_ngram_size": "no_repeat_ngram", "num_beams": "beams", "num_return_sequences": "sequences"}
    return {"max_new_tokens": 12} | {renamed.get(name, name): value for name, value in settings.items()}


# Beside transformers


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("beams", [1, 3, 5])
@pytest.mark.parametrize("batch", [1, 3, 7])
def test_beams_are_those_of_transformers(batch: int, beams: int, settings: dict[str, Any]) -> None:
    search = settings | {"num_beams": beams, "num_return_sequences": beams}
    found = texts(ours(pictures(batch), GenerationConfig("beam", **as_ours(search))))
    assert [row for rows in found for row in rows] == theirs(pictures(batch), **search)


@pytest.mark.parametrize("settings", [SETTINGS[i] for i in (0, 1, 2, 3, 8)], ids=str)
@pytest.mark.parametrize("batch", [1, 3, 7])
def test_greedy_is_that_of_transformers(batch: int, settings: dict[str, Any]) -> None:
    found = texts(ours(pictures(batch), GenerationConfig("greedy", **as_ours(settings))))
    assert [row for rows in found for row in rows] == theirs(pictures(batch), **settings)


def test_the_comparison_sees_texts_that_differ() -> None:
    found = texts(ours(pictures(7), replace(BEAM, sequences=1)))
    assert len({str(text) for text in found}) > 4
    assert len({len(text[0]) for text in found}) > 2, "texts end at different times"
    assert found != texts(ours(pictures(7), GREEDY))


@pytest.mark.parametrize("beams", [1, 3])
def test_scores_and_sequences_are_those_of_transformers(beams: int) -> None:
    with torch.inference_mode():
        out = model().generate(
            pictures(3), num_beams=3, num_return_sequences=beams, max_new_tokens=12,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
    found = ours(pictures(3), replace(BEAM, sequences=beams))
    assert found.ids.shape[1] == beams
    torch.testing.assert_close(found.scores.flatten(), out.sequences_scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_prompts_of_different_lengths(beams: int) -> None:
    """In one batch, what each prompt gives in a batch of its own, where `transformers` needs no padding."""
    given = [[START, 7, 11, 20], [START], [START, 8], [START, 7, 7, 7, 12, 6]]
    config = replace(BEAM, beams=beams, sequences=1, no_repeat_ngram=3, repetition_penalty=1.2, min_new_tokens=2)
    found = texts(ours(pictures(4), config, prompts(*given)))
    for picture, prompt, (text,) in zip(pictures(4), given, found, strict=True):
        settings = {"no_repeat_ngram_size": 3, "repetition_penalty": 1.2, "min_new_tokens": 2}
        assert [text] == theirs(picture[None], prompt, num_beams=beams, **settings)


# Neighbours


@STRATEGIES
@pytest.mark.parametrize("lengths", [[1] * 5, [3, 1, 2, 5, 1]], ids=str)
def test_no_text_changes_with_its_neighbours(config: GenerationConfig, lengths: list[int]) -> None:
    given = [[START, *range(10, 9 + length)] for length in lengths]
    uniform = draws(5, config.sequences, 12)
    whole = texts(ours(pictures(5), config, prompts(*given), uniform=uniform))
    assert len({len(text) for row in whole for text in row}) > 2
    for chosen in ([0], [1], [2], [3], [4], [4, 2, 0, 1, 3], [1, 3]):
        part = ours(pictures(5)[chosen], config, prompts(*[given[i] for i in chosen]), uniform=uniform[chosen])
        assert texts(part) == [whole[i] for i in chosen]


def test_a_longer_search_begins_with_the_same_draws() -> None:
    uniform = draws(4, 4, 30)
    short, long = (ours(pictures(4), replace(NUCLEUS, max_new_tokens=count), uniform=uniform).ids for count in (4, 20))
    assert torch.equal(short, long[..., :4])


def test_other_draws_give_other_texts() -> None:
    config = replace(NUCLEUS, temperature=2.0)
    found = texts(ours(pictures(3), config))
    assert len({str(text) for row in found for text in row}) > 8
    assert found != texts(ours(pictures(3), config, uniform=1 - draws(3, 4, 12)))


# Cost


@STRATEGIES
def test_finished_rows_are_left_out(config: GenerationConfig) -> None:
    step, state = stepper(model(), pictures(6))
    shapes: list[tuple[int, int]] = []

    def counted(tokens: Tensor, held: Any) -> Tensor:
        shapes.append((len(tokens), len(held.image[0].keys)))
        return step(tokens, held)

    uniform = draws(6, config.sequences, 12) if config.strategy == "nucleus" else None
    with torch.inference_mode():
        found = generate(counted, state, prompts(*[[START]] * 6), config, end_id=END, pad_id=PAD, draws=uniform)
    assert shapes[0] == (6, 6), "the prompt runs once for all texts of an image"
    rows, images = zip(*shapes[1:], strict=True)
    assert list(rows) == sorted(rows, reverse=True) and images[-1] < 6
    if config.strategy == "beam":
        assert [count * config.beams for count in images] == list(rows)
        return
    for number, (width, count) in enumerate(shapes[1:], 1):
        live = (found.lengths > number).sum(dim=1)  # of each image
        assert count == int((live > 0).sum())
        assert width == count * int(live.max())


def test_images_are_never_copied_for_beams() -> None:
    step, state = stepper(model(), pictures(2))
    places: set[int] = set()

    def watched(tokens: Tensor, held: Any) -> Tensor:
        places.add(held.image[0].keys.data_ptr())
        return step(tokens, held)

    with torch.inference_mode():
        generate(
            watched, state, prompts([START], [START]), replace(BEAM, min_new_tokens=11), end_id=END, pad_id=PAD
        )  # no image is done before the last step
    assert len(places) == 1


# The rules by hand


def test_constraints_by_hand() -> None:
    scores = torch.tensor([[1.0, -1.0, 2.0, 0.5], [1.0, -1.0, 2.0, 0.5]])
    seen, new = torch.tensor([[0, 1, 0], [2, 2, 2]]), torch.tensor([1, 2])
    config = GenerationConfig(repetition_penalty=2.0, no_repeat_ngram=2, min_new_tokens=1)
    expected = torch.tensor([[0.5, -torch.inf, 2.0, -torch.inf], [1.0, -1.0, -torch.inf, 0.5]])
    assert torch.equal(constrain(scores, seen, new, config, end_id=3), expected)
    assert torch.equal(scores[0], torch.tensor([1.0, -1.0, 2.0, 0.5])), "the logits stay as they were"
    single = constrain(scores, seen, new, GenerationConfig(no_repeat_ngram=1), end_id=3)
    assert single.isinf().tolist() == [[True, True, False, False], [False, False, True, False]]
    early = constrain(scores, seen[:, :1], new, GenerationConfig(no_repeat_ngram=2), end_id=3)
    assert torch.equal(early, scores)


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.5}, {"top_k": 3}, {"top_k": 9, "temperature": 0.6}], ids=str)
def test_draws_follow_the_nucleus(settings: dict[str, Any]) -> None:
    """Evenly spaced numbers fall on each token as often as the distribution of `transformers` says."""
    config = GenerationConfig("nucleus", **settings)
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)) * 1.5
    logits[0, 5] = -torch.inf
    warped = TemperatureLogitsWarper(config.temperature)(None, logits)
    if config.top_k:
        warped = TopKLogitsWarper(config.top_k)(None, warped)
    expected = TopPLogitsWarper(config.top_p)(None, warped).softmax(dim=1)[0]
    count = 20_000
    uniform = (torch.arange(count) + 0.5) / count
    found = torch.bincount(draw(logits.expand(count, -1), uniform, config), minlength=40) / count
    torch.testing.assert_close(found, expected, rtol=0, atol=2 / count)
    assert (expected > 0).sum() > 2


def test_draws_at_the_ends_of_the_range() -> None:
    logits = torch.tensor([[0.0, 5.0, -torch.inf, 4.0]] * 2)
    uniform = torch.tensor([0.0, 1 - 2**-24])
    assert draw(logits, uniform, GenerationConfig("nucleus", top_p=1.0)).tolist() == [1, 0]
    assert draw(logits, uniform, GenerationConfig("nucleus", top_p=1e-6)).tolist() == [1, 1]


# Refusals


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"strategy": "beams"}, r"did you mean 'beam'"),
        ({"beams": 0}, "beams must be"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p is a probability"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"repetition_penalty": -1.0}, "repetition_penalty must be"),
        ({"early_stopping": "soon"}, "early_stopping must be"),
        ({"min_new_tokens": 20}, "min_new_tokens 20 must be below"),
        ({"strategy": "greedy", "sequences": 2}, "sequences 2: greedy search gives 1"),
        ({"beams": 3, "sequences": 4}, "sequences 4: beam search gives 3"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        GenerationConfig(**settings)


def test_bad_calls_are_named() -> None:
    with pytest.raises(ConfigError, match=r"draws of shape \(2, 4, 12\), got \(2, 4, 11\)"):
        ours(pictures(2), NUCLEUS, uniform=draws(2, 4, 11))
    with pytest.raises(ConfigError, match=f"vocabulary of {VOCABULARY} needs 80"):
        ours(pictures(1), replace(BEAM, beams=40))
    left = {"input_ids": torch.tensor([[0, START]]), "attention_mask": torch.tensor([[0, 1]])}
    with pytest.raises(ValueError, match="begin with a token"):
        ours(pictures(1), BEAM, left)
