"""What stands before a text: prompts, questions, the first words of a caption; counted in tokens."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from PIL import Image

from vlm.data.loader import LoaderConfig, evaluation_batches, make_loader
from vlm.data.prompts import Prompts, asked, tokenised
from vlm.data.sources import open_source
from vlm.data.tokenizers import wordpiece
from vlm.data.transforms import ImageTransform
from vlm.errors import ConfigError

WORDS, IDS = wordpiece(), "input_ids"


def said(ids: list[int]) -> str:
    return WORDS.decode(ids)


def test_tokens_of_a_prompt_are_given_and_the_rest_is_said() -> None:
    texts = [("a photo of", "a cat", 0.0), ("", "dogs", 0.0), ("question : what? answer :", "two dogs on a sofa", 0.0)]
    tokens, given = tokenised(WORDS, texts, max_length=5)
    assert given is not None and given.tolist() == [4, 1, 7]
    for row, (prompt, text, _) in enumerate(texts):
        ids = tokens.input_ids[row][tokens.attention_mask[row]].tolist()
        assert said(ids[: given[row]]) == prompt and text.startswith(said(ids[given[row] :]))
        assert ids[-1] == WORDS.end_id
    assert tokenised(WORDS, [("", "a cat", 0.0)], max_length=5)[1] is None


def test_a_text_is_cut_alike_whatever_stands_beside_it() -> None:
    """At so many tokens of its own, however long another's prompt is."""
    texts = [("", "one two three four five six", 0.0), ("question : what is it ? answer :", "a dog", 0.0)]
    tokens, given = tokenised(WORDS, texts, max_length=5)
    alone, _ = tokenised(WORDS, texts[:1], max_length=5)
    assert given is not None and given.tolist() == [1, 9]
    for row, ids in enumerate((alone.input_ids[0].tolist(), WORDS(["question : what is it ? answer : a dog"])[IDS][0])):
        assert tokens.input_ids[row][tokens.attention_mask[row]].tolist() == list(ids)
    assert (tokens.input_ids[~tokens.attention_mask] == WORDS.pad_id).all()


def test_cut_gives_some_words_but_never_all() -> None:
    for cut in (0.3, 0.999):
        tokens, given = tokenised(WORDS, [("", "one two three four", cut)], max_length=9)
        assert given is not None and 1 <= int(given) < tokens.input_ids.shape[1]
    assert int(given) == tokens.input_ids.shape[1] - 2  # the last word and the end token are left to say


def test_question_with_its_turns() -> None:
    prompts = Prompts(question="Q: {} A:")
    assert prompts.ask("what?", [("who?", "me")]) == "Q: who? A: me Q: what? A:"
    with pytest.raises(ConfigError, match="expected one"):
        Prompts(question="Question")


def test_pairs_are_drawn_and_captions_stay_themselves() -> None:
    meta = {"pairs": [["who?", "me"], ["what?", "it"]]}
    rng, prompts = random.Random(0), Prompts(caption="a photo of")
    drawn = {asked(meta, "me", prompts, rng)[:2] for _ in range(20)}
    assert drawn == {("Question: who? Answer:", "me"), ("Question: what? Answer:", "it")}
    assert asked(meta, "me", prompts, None)[0] == "Question: who? Answer:"
    assert asked({}, "a cat", prompts, rng) == ("a photo of", "a cat", 0.0)
    assert asked(meta, "me", None, rng) == ("", "me", 0.0)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Two pictures, one with two questions, one with a caption."""
    for name in ("a", "b"):
        Image.new("RGB", (20, 20), "red").save(tmp_path / f"{name}.png")
    rows = [
        {"image": "a.png", "question": "what colour?", "answer": "red"},
        {"image": "a.png", "question": "how many?", "answers": ["one", "1"]},
        {"image": "b.png", "caption": "a red square"},
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path / "t.jsonl"


def test_questions_of_a_table_reach_the_batch(table: Path) -> None:
    source = open_source((str(table),))
    assert len(source) == 2
    transform = ImageTransform(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    seen = set()
    for epoch in range(8):
        loader = make_loader(
            source, LoaderConfig(batch_size=2, workers=0), tokenizer=WORDS, transform=transform, epoch=epoch,
            prompts=Prompts(),
        )  # fmt: skip
        for batch in loader:
            assert batch.given is not None
            for row in range(2):
                ids = batch.tokens.input_ids[row][batch.tokens.attention_mask[row]].tolist()
                cut = int(batch.given[row])
                seen.add((said(ids[:cut]), said(ids[cut:])))
            part = batch.split(2)[1]
            assert part.given is not None and part.given.tolist() == batch.given.tolist()[1:]
    assert seen == {
        ("question : what colour? answer :", "red"), ("question : how many? answer :", "one"),
        ("question : how many? answer :", "1"), ("", "a red square"),
    }  # fmt: skip
    plain = next(iter(evaluation_batches(source, tokenizer=WORDS, transform=transform)))
    assert plain.given is None and said(plain.tokens.input_ids[0].tolist()) == "red"
