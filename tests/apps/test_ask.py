"""`vlm ask` and `vlm chat`: one line an answer, turns from standard input, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from tests.apps.conftest import Run
from tests.models.small_llm import llm_folder
from tests.tasks.test_ask import model as speaker
from tests.tasks.test_vqa import ANSWERS, QUESTIONS, answering
from vlm.generate import GenerationConfig
from vlm.tasks.ask import Asker
from vlm.tasks.caption import Captioner


@pytest.fixture
def talker(tmp_path: Path) -> list[str]:
    """Options that name a model and where its language model is."""
    speaker().save(tmp_path / "talker")
    return ["--model", str(tmp_path / "talker"), "--llm", str(llm_folder(tmp_path / "llm"))]


def test_each_question_has_its_line(run: Run, pictures: Path, talker: list[str]) -> None:
    asked = ["what colour is it ?", "what ?"]
    both = run("ask", pictures / "red.png", *asked, *talker, "--max-new-tokens", 5)
    assert both.code == 0, both.err
    alone = [run("ask", pictures / "red.png", one, *talker, "--max-new-tokens", 5).out for one in asked]
    assert both.out == "".join(alone) and len(both.out.splitlines()) == 2


def test_the_likeliest_of_a_list(run: Run, pictures: Path, tmp_path: Path) -> None:
    asked = answering("blip")
    asked.save(tmp_path / "vqa")
    (tmp_path / "answers.txt").write_text("\n".join(ANSWERS) + "\n")
    given = ["--model", str(tmp_path / "vqa"), "--answers", str(tmp_path / "answers.txt")]
    found = run("ask", pictures / "red.png", *QUESTIONS, *given)
    assert found.code == 0, found.err
    ranked = Asker(asked).rank(pictures / "red.png", QUESTIONS, ANSWERS)
    assert found.out.splitlines() == [answers[0].text for answers in ranked]
    missing = run("ask", pictures / "red.png", "why", *given[:2], "--answers", tmp_path / "none.txt")
    assert missing.code == 2 and "none.txt: the answers can't be read" in missing.err


def test_chat_answers_until_an_empty_line(
    run: Run, pictures: Path, talker: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("what colour is it ?\nwhat ?\n\nnever asked\n"))
    found = run("chat", pictures / "red.png", *talker, "--max-new-tokens", 5)
    assert found.code == 0, found.err
    assert len(found.out.splitlines()) == 2
    single = run(
        "ask", pictures / "red.png", "what colour is it ?", *talker, "--max-new-tokens", 5, "--strategy", "greedy"
    )
    assert found.out.splitlines()[0] == single.out.strip()


def test_a_chat_without_room_begins_anew(
    run: Run, pictures: Path, talker: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The language model reads 64 tokens: the third question has no room beside two turns, and is answered alone."""
    asked = "what colour is the box seen here ?"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{asked}\n" * 3 + "what " * 70 + "\n\n"))
    found = run("chat", pictures / "red.png", *talker, "--max-new-tokens", 16)
    assert found.code == 0, found.err
    first, _, third = found.out.splitlines()
    assert third == first and "no room is left for the turns before" in found.err
    assert found.err.count("no room") == 2 and "are more than" in found.err  # the last is too long by itself


def test_captions_of_a_folder_by_a_second_stage(run: Run, pictures: Path, talker: list[str]) -> None:
    """`vlm caption` with such a model: each picture its own caption, whatever runs beside it."""
    lines = []
    for size in (1, 3):
        found = run("caption", pictures, *talker, "--batch-size", size, "--max-new-tokens", 5, "--prompt", "a red")
        assert found.code == 0, found.err
        lines.append([json.loads(line) for line in found.out.splitlines()])
    assert lines[0] == lines[1]
    captioner = Captioner(speaker(), GenerationConfig(max_new_tokens=5), prompt="a red")
    texts = captioner.caption(sorted(pictures.iterdir()))
    assert [line["captions"][0]["caption"] for line in lines[0]] == texts


def test_refusals(
    run: Run, pictures: Path, talker: list[str], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = run("ask", pictures / "red.png", "what ?", "--model", model)
    assert other.code == 2 and "answers no questions" in other.err
    gone = run("ask", tmp_path / "none.png", "what ?", *talker)
    assert gone.code == 2 and "none.png" in gone.err
    empty = run("ask", pictures / "red.png", "what ?", " ", "--model", "no such model")  # before it looks for one
    assert empty.code == 2 and "question 2 of 2 is empty" in empty.err
    for verb, rest in (("ask", ["what ?"]), ("chat", [])):
        early = run(verb, tmp_path / "none.png", *rest, "--model", "no such model")
        assert early.code == 2 and "none.png" in early.err
    beams = run("chat", pictures / "red.png", *talker, "--strategy", "beam")
    assert beams.code == 2 and "as it goes" in beams.err
    monkeypatch.setattr("sys.stdin", None)
    closed = run("chat", pictures / "red.png", *talker)
    assert closed.code == 2 and "standard input, which is closed" in closed.err
