"""`vlm caption`: what it writes is what the captioner says; it goes on where it stopped; mistakes are answered."""

from __future__ import annotations

import csv
import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.apps.conftest import Run
from tests.apps.speaker import lines_of, said, shard, small
from tests.models.small_blip import BLIP, build
from vlm.tasks.caption import Captioner
from vlm.weights.loaded import VisionLanguageModel

# Where pictures come from


def test_jsonl_of_a_folder(caption: Run, pictures: Path) -> None:
    done = caption(pictures, "--batch-size", 2)
    assert done.code == 0
    assert lines_of(done.out) == said(*sorted(pictures.iterdir()))
    assert len({str(texts) for texts in lines_of(done.out).values()}) == 5
    scores = [row["captions"][0]["score"] for row in map(json.loads, done.out.splitlines())]
    assert all(score < 0 for score in scores)


def test_shards_lists_globs_and_files(
    caption: Run, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shards").mkdir()
    tar = shard(tmp_path / "shards" / "web-0.tar", pictures)
    expected = {Path(path).name: texts for path, texts in said(*sorted(pictures.iterdir())).items()}
    for place in (tar, tmp_path / "shards", tmp_path / "shards" / "web-*.tar", tmp_path / "shards" / "web-{0..0}.tar"):
        done = caption(place)
        assert done.code == 0, done.err
        assert lines_of(done.out) == {f"{tar}:{name}": texts for name, texts in expected.items()}
    (tmp_path / "shards" / "loose.png").write_bytes((pictures / "red.png").read_bytes())  # beside a shard
    done = caption(tmp_path / "shards")
    loose = {str(tmp_path / "shards" / "loose.png"): expected["red.png"]}
    assert lines_of(done.out) == {f"{tar}:{name}": texts for name, texts in expected.items()} | loose
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{pictures / 'blue.png'}\n\n{tar}\n"))
    done = caption("-", pictures / "r*.png", pictures / "blue.png")
    names = [path.rsplit("/", 1)[1] for path in lines_of(done.out)]
    assert names == ["blue.png", *(f"web-0.tar:{name}" for name in expected), "red.png"]


def test_settings_reach_the_search(caption: Run, pictures: Path) -> None:
    where = sorted(pictures.iterdir())
    done = caption(pictures, "--strategy", "nucleus", "-n", 3, "--top-p", 0.7, "--temperature", 1.5, "--seed", 0)
    assert lines_of(done.out) == said(*where, strategy="nucleus", sequences=3, top_p=0.7, temperature=1.5)
    done = caption(pictures, "--beams", 2, "--min-new-tokens", 4, "--no-repeat-ngram", 1, "--length-penalty", 2)
    assert lines_of(done.out) == said(*where, beams=2, min_new_tokens=4, no_repeat_ngram=1, length_penalty=2.0)
    done = caption(pictures / "red.png", "--prompt", "a red")
    assert next(iter(lines_of(done.out).values()))[0].startswith("a red")


# Where captions go


def test_csv(caption: Run, pictures: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "found.csv"
    done = caption(pictures, "-f", "csv", "-o", file, "-n", 2)
    assert (done.code, done.out) == (0, "")
    rows = list(csv.reader(io.StringIO(file.read_text("utf-8"))))
    assert rows[0] == ["path", "rank", "caption", "score"]
    expected = said(*sorted(pictures.iterdir()), sequences=2)
    flat = [[path, str(rank), text] for path, texts in expected.items() for rank, text in enumerate(texts, 1)]
    assert [row[:3] for row in rows[1:]] == flat
    assert sorted(path.name for path in file.parent.iterdir()) == [".found.csv.settings", "found.csv"]
    again = caption(pictures, "-f", "csv", "-n", 2)
    assert again.out == file.read_text("utf-8")


def test_summary(caption: Run, pictures: Path) -> None:
    done = caption(pictures)
    words = [text[0].split() for text in lines_of(done.out).values()]
    pairs = [list(pairwise(text)) for text in words]
    repeated = sum(len(row) - len(set(row)) for row in pairs) / sum(map(len, pairs))
    length = sum(map(len, words)) / 5
    assert f"{length:.1f} words each, {100 * repeated:.1f} % of word pairs repeated" in done.err
    assert "5 of 5 pictures have captions, " in done.err and "pictures/s" in done.err


def test_the_bar_shows_rate_and_remaining_time(caption: Run, pictures: Path) -> None:
    assert "pictures/s]" not in caption(pictures).err
    done = caption(pictures, "--progress", "--batch-size", 1)
    assert "5/5 [00:0" in done.err and "<00:0" in done.err and " pictures/s]" in done.err


# A second run


def test_it_goes_on_where_it_stopped(
    caption: Run, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "found.jsonl"
    whole = caption(pictures).out
    own, seen = Captioner.caption_pixels, []

    def breaks(self: Captioner, pixels: Any, keys: Any = None) -> Any:
        seen.append(len(pixels))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return own(self, pixels, keys)

    monkeypatch.setattr(Captioner, "caption_pixels", breaks)
    stopped = caption(pictures, "-o", file, "--batch-size", 1)
    assert stopped.code == 130 and not file.exists()
    (journal,) = tmp_path.glob(".found.jsonl.part")
    first, _, rest = journal.read_text("utf-8").partition("\n")
    assert json.loads(first)["settings"]["strategy"] == "beam"
    assert lines_of(rest) == dict(list(lines_of(whole).items())[:2])
    with journal.open("a") as torn:
        torn.write('{"path": "half a l')
    done = caption(pictures, "-o", file, "--batch-size", 2)
    assert done.code == 0 and "5 of 5 pictures have captions, 2 of them from before" in done.err
    assert sum(seen[3:]) == 3
    assert lines_of(file.read_text("utf-8")) == lines_of(whole)
    assert not journal.exists()


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_finished_file_takes_in_what_is_new(
    caption: Run, pictures: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "found"
    caption(pictures / "red.png", pictures / "blue.png", "-f", form, "-o", file, "-n", 2)
    first = file.read_text("utf-8")
    done = caption(pictures, "-f", form, "-o", file, "-n", 2)
    assert done.code == 0 and "2 of them from before" in done.err
    text = file.read_text("utf-8")
    assert text.startswith(first) and text.count(".png") == (5 if form == "jsonl" else 10)
    monkeypatch.setattr("vlm.apps.caption.load_model", lambda *_: pytest.fail("a model was loaded for nothing"))
    done = caption(pictures, "-f", form, "-o", file, "-n", 2)
    assert done.code == 0 and "5 of them from before (--fresh" in done.err
    assert file.read_text("utf-8") == text


def test_one_model_load_for_all(caption: Run, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm.weights import load

    calls: list[Any] = []
    own = load.load
    monkeypatch.setattr(load, "load", lambda *a, **k: (calls.append(a), own(*a, **k))[1])
    assert caption(pictures, "--batch-size", 1).code == 0
    assert len(calls) == 1


# What can't be done


def test_some_unreadable(caption: Run, pictures: Path, tmp_path: Path) -> None:
    (pictures / "cut.png").write_bytes((pictures / "red.png").read_bytes()[:40])
    tar = shard(tmp_path / "web.tar", pictures)
    done = caption(pictures, pictures / "gone.png", tar, "--batch-size", 2)
    assert done.code == 1
    assert len(lines_of(done.out)) == 10
    skipped = [line for line in done.err.splitlines() if line.startswith("skipped: ")]
    names = (f"{pictures / 'cut.png'}:", "gone.png", f"{tar}:cut.png")
    assert [name in line for name, line in zip(names, skipped, strict=True)] == [True] * 3
    assert "3 of 13 pictures could not be read" in done.err


def test_none_readable(caption: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"")
    done = caption(tmp_path / "bad.png", tmp_path / "gone.png", "-o", tmp_path / "out.jsonl")
    assert done.code == 2 and "no picture could be read" in done.err and not done.out
    assert [path.name for path in tmp_path.iterdir()] == ["bad.png"]


def test_a_model_without_a_decoder_is_refused(run: Run, model: str, pictures: Path, tmp_path: Path) -> None:
    done = run("caption", pictures, "--model", model, "--device", "cpu")
    assert done.code == 2 and "has no generate; BLIP and BLIP-2 can" in done.err
    retrieval = VisionLanguageModel(
        build(type(BLIP)(**{**vars(BLIP), "heads": ("itc", "itm")})),
        small().tokenizer, small().transform, name="retrieval", family="blip",
    )  # fmt: skip
    retrieval.save(tmp_path / "retrieval")
    done = run("caption", pictures, "--model", tmp_path / "retrieval", "--device", "cpu")
    assert done.code == 2 and "has no lm head (it has: itc, itm)" in done.err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--strategy", "beams"), "did you mean 'beam'"),
        (("--format", "json"), "did you mean 'jsonl'"),
        (("--beams", 2, "-n", 3), "beam search gives 2"),
        (("--format", "txt", "--output", "x"), "leave --output out"),
        (("--max-new-tokens", 0), "max_new_tokens must be"),
        (
            ("--top-p", 0.9),
            "--top-p is for nucleus search, and the strategy is beam: leave it out, or add --st",
        ),
        (("--top-k", 0), "--top-k is for nucleus search"),
        (("--strategy", "greedy", "--temperature", 2), "--temperature is for nucleus search, and the strategy is gre"),
        (("--strategy", "nucleus", "--beams", 3), "--beams is for beam search, and the strategy is nucleus"),
        (("--strategy", "greedy", "--beams", 1), "--beams is for beam search, and the strategy is greedy"),
        (("--strategy", "greedy", "--length-penalty", 1), "--length-penalty is for beam search"),
    ],
)
def test_bad_options_are_named(
    run: Run, pictures: Path, options: tuple[object, ...], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm.apps.caption.load_model", lambda *_: pytest.fail("the model was loaded first"))
    done = run("caption", pictures, *options)
    assert done.code == 2 and named in done.err
