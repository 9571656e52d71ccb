"""Captions against references: files, matching of names, intervals, and what is refused."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from vlm.apps.cli import app
from vlm.errors import ConfigError, DataError
from vlm.tasks.caption_metrics import bleu, bleu_counts, cider_d
from vlm.tasks.caption_report import References, evaluate_captions, read_predictions, read_references
from vlm.tasks.caption_tokens import caption_words

TEXTS = {
    "a.png": ["A red cat sits on a mat.", "a cat on a mat"],
    "b.png": ["Two dogs run in the grass."],
    "c.png": ["a blue car in front of a house", "the car is blue"],
    "d.png": ["a slice of pizza with cheese"],
}
OWN = {
    "a.png": "a cat sits on a mat",
    "b.png": "two dogs run",
    "c.png": "a blue house",
    "d.png": "a slice of cake with cheese",
}
REFERENCES = References("texts", TEXTS)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_figures_have_intervals_and_what_others_captions_get():
    report = evaluate_captions(OWN, REFERENCES, draws=300)
    words = [caption_words(OWN[key]) for key in TEXTS]
    texts = [[caption_words(text) for text in some] for some in TEXTS.values()]
    expected = bleu(bleu_counts(words, texts).sum(axis=0))
    for order in range(4):
        assert report.figures[f"BLEU-{order + 1}"].value == pytest.approx(expected[order])
    assert report.figures["CIDEr-D"].value == pytest.approx(cider_d(words, texts).mean())
    for name, figure in report.figures.items():
        assert figure.low <= figure.value <= figure.high and figure.count == 4, name
        assert figure.low < figure.high and figure.chance < figure.value, name
    assert report.pictures[0]["image"] == "a.png" and report.pictures[0]["references"] == TEXTS["a.png"]
    assert np.mean([picture["ROUGE-L"] for picture in report.pictures]) == pytest.approx(
        report.figures["ROUGE-L"].value
    )


def test_pictures_of_one_group_are_drawn_together():
    texts = {f"{name}{copy}": text for name, text in TEXTS.items() for copy in range(9)}
    own = {f"{name}{copy}": text for name, text in OWN.items() for copy in range(9)}
    alone = evaluate_captions(own, References("many", texts), draws=300).figures
    grouped = evaluate_captions(own, References("many", texts, [key[0] for key in texts]), draws=300).figures
    for name in alone:
        assert alone[name].value == grouped[name].value
        assert grouped[name].high - grouped[name].low > 1.5 * (alone[name].high - alone[name].low), name


@pytest.mark.parametrize("plain", ["pictures/{}", "{}", "data/x-0.tar.gz:{}", "shot.{}"])
def test_names_match_whole_or_without_folder_and_ending(plain):
    own = {plain.format(key): text for key, text in OWN.items()}
    if plain == "shot.{}":
        with pytest.raises(DataError, match=r"no picture is both in the predictions \(such as shot.a.png\)"):
            evaluate_captions(own, REFERENCES)
        return
    assert evaluate_captions(own, REFERENCES, draws=10).figures["BLEU-1"].count == 4
    if ":" in plain:
        keys = References("keys", {key.split(".")[0]: texts for key, texts in TEXTS.items()})
        assert len(evaluate_captions(own, keys, draws=10).pictures) == 4
    stems = {key.split(".")[0]: text for key, text in OWN.items()}
    assert evaluate_captions(stems, REFERENCES, draws=10).figures["BLEU-1"].count == 4


def test_names_that_would_fall_together_are_kept_apart():
    own = {"x/a.png": "a cat", "y/a.png": "a dog"}
    with pytest.raises(DataError, match="no picture is both"):
        evaluate_captions(own, References("r", {"a.png": ["a cat"]}))


def test_a_folders_captions_are_found_among_those_of_several():
    """`vlm caption human web` writes the folders' names; `--data human` calls its pictures as they are in it."""
    own = {f"{folder}/{key}": text for folder in ("human", "web") for key, text in OWN.items()}
    report = evaluate_captions(own, References("human", TEXTS), draws=10)
    assert report.figures["BLEU-1"].count == len(report.pictures) == len(TEXTS)
    # A picture that has no caption there doesn't take that of another folder's picture of its name.
    del own["human/a.png"]
    with pytest.raises(DataError, match=r"a\.png"):
        evaluate_captions(own, References("human", TEXTS), draws=10)


def test_missing_predictions_are_named_skipped_or_count_as_empty():
    own = {key: text for key, text in OWN.items() if key != "b.png"} | {"z.png": "more"}
    with pytest.raises(DataError, match=r"1 of 4 pictures of texts have no caption, such as b.png"):
        evaluate_captions(own, REFERENCES)
    skipped = evaluate_captions(own, REFERENCES, missing="skip", draws=10)
    assert len(skipped.pictures) == 3 and skipped.left_out == {
        "pictures without a caption": 1,
        "captions of pictures that aren't in the references": 1,
    }
    empty = evaluate_captions(own, REFERENCES, missing="empty", draws=10)
    assert len(empty.pictures) == 4 and empty.pictures[1]["ROUGE-L"] == 0
    assert empty.figures["ROUGE-L"].value < skipped.figures["ROUGE-L"].value
    with pytest.raises(ConfigError, match="did you mean 'skip'"):
        evaluate_captions(own, REFERENCES, missing="skipp")


def test_one_picture_has_no_cider(caplog):
    report = evaluate_captions({"a.png": "a cat"}, References("one", {"a.png": ["a cat"]}), draws=10)
    assert "CIDEr-D" not in report.figures and report.figures["BLEU-1"].value == pytest.approx(1)
    assert "at least 2 pictures" in caplog.text


def test_references_without_words_don_t_count():
    texts = {"a.png": ["a cat", "..."], "b.png": ["a dog"]}
    report = evaluate_captions({"a.png": "a cat", "b.png": ""}, References("r", texts), draws=10)
    assert report.pictures[0]["CIDEr-D"] > 4
    with pytest.raises(DataError, match=r"no reference for b.png holds a word"):
        evaluate_captions({"a.png": "a cat", "b.png": "x"}, References("r", texts | {"b.png": ["!!"]}))


def test_files_of_any_kind(tmp_path):
    rows = jsonl(tmp_path / "own.jsonl", [{"image": "./p/a.png", "captions": ["a cat", "cat"]}, {"key": 7, "text": ""}])
    assert read_predictions(rows) == ({"p/a.png": "a cat", "7": ""}, 1)
    found = [{"caption": "a cat", "score": -0.5}, {"caption": "cat"}]
    assert read_predictions(jsonl(tmp_path / "own.jsonl", [{"path": "a.png", "captions": found}])) == (
        {"a.png": "a cat"}, 1,
    )  # fmt: skip
    (tmp_path / "own.csv").write_text("path,rank,caption,score\na.png,1,a cat,\na.png,2,cat,\nb.png,1,a dog,\n")
    assert read_predictions(tmp_path / "own.csv") == ({"a.png": "a cat", "b.png": "a dog"}, 1)
    (tmp_path / "own.csv").write_text('file,caption\na.png,"a, b"\nb.png,\n')
    assert read_predictions(tmp_path / "own.csv") == ({"a.png": "a, b", "b.png": ""}, 0)
    (tmp_path / "refs.csv").write_text("image,caption\na.png,one\nb.png,two\na.png,three\n")
    assert read_references(tmp_path / "refs.csv").captions == {"a.png": ["one", "three"], "b.png": ["two"]}
    refs = jsonl(tmp_path / "refs.jsonl", [{"image": "a.png", "captions": ["one", "two"]}])
    assert read_references(refs).captions == {"a.png": ["one", "two"]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"image": "a", "caption": "x"}, {"image": "./a", "caption": "y"}], "row 2: a has a caption in row 1 already"),
        ([{"image": "a", "caption": 3}], "row 1: no caption"),
        ([{"image": "a", "caption": "x"}, {"image": "b"}], "row 2: no caption"),
        ([{"caption": "x"}], "row 1: no picture is named, expected one under image or"),
        ([{"image": " ", "caption": "x"}], "row 1: no picture is named"),
        ([[1]], "not a JSON object: own.jsonl, row 1"),
        ([], "holds no captions"),
    ],
)
def test_rows_that_can_t_be_read_are_named(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        read_predictions(jsonl(tmp_path / "own.jsonl", rows))


def test_command(tmp_path):
    own = jsonl(tmp_path / "own.jsonl", [{"image": f"pics/{key}", "caption": text} for key, text in OWN.items()])
    refs = jsonl(tmp_path / "refs.jsonl", [{"image": key, "captions": texts} for key, texts in TEXTS.items()])
    run = CliRunner().invoke(app, ["eval", "captions", str(own), "-r", str(refs), "-o", str(tmp_path / "out")])
    assert run.exit_code == 0, run.output
    assert "4 pictures" in run.output and "| CIDEr-D" in run.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["pictures"] == 4 and set(report["figures"]["BLEU-4"]) == {"value", "low", "high", "chance", "count"}
    lines = (tmp_path / "out" / "per_picture.jsonl").read_text().splitlines()
    assert [json.loads(line)["image"] for line in lines] == list(TEXTS)
    run = CliRunner().invoke(app, ["eval", "captions", str(own)])
    assert isinstance(run.exception, ConfigError) and "either --references FILE or --data DATA" in str(run.exception)


def test_what_vlm_caption_writes_is_read(tmp_path):
    from vlm.apps.caption_files import rendered

    rows = [
        {"path": f"x.tar:{key}", "captions": [{"caption": text, "score": -1.0}, {"caption": "more"}]}
        for key, text in OWN.items()
    ]
    for form in ("jsonl", "csv"):
        (tmp_path / f"own.{form}").write_text("".join(rendered(rows, form, header=True)))
        own, further = read_predictions(tmp_path / f"own.{form}")
        assert further == 4 and len(evaluate_captions(own, REFERENCES, draws=10).pictures) == 4


def test_command_against_the_data_s_own_captions(tmp_path):
    from vlm.data.sources import open_source

    source = open_source("web-test")
    rows = [{"key": key, "caption": source.meta(n)["captions"][0]} for n, key in enumerate(source.keys[:30])]
    own = jsonl(tmp_path / "own.jsonl", rows)
    command = ["eval", "captions", str(own), "--data", "web-test", "--missing", "skip", "-o", str(tmp_path / "out")]
    assert CliRunner().invoke(app, command).exit_code == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["pictures"] == 30 and report["figures"]["BLEU-1"]["value"] == pytest.approx(1)
    assert report["left_out"] == {"pictures without a caption": len(source) - 30}
