"""CapFilt whole: what is kept and written, what it costs nobody, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vlm
from tests.tasks.capfilt.small import ALONE, BROKEN, HERE, content, med, settings
from tests.tasks.small import random_model
from vlm.data.images import decode_image
from vlm.data.sources import open_source
from vlm.errors import ConfigError, DataError, MissingVerbError
from vlm.generate import GenerationConfig
from vlm.tasks.capfilt import run as steps
from vlm.tasks.capfilt import work
from vlm.tasks.capfilt.run import run_capfilt
from vlm.tasks.capfilt.settings import CapfiltConfig, Execution

THRESHOLD = 0.985
"""What the small filter drops about half of the texts by."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("capfilt")


@pytest.fixture(scope="module")
def done(folder: Path) -> Path:
    """A finished run, without a new model."""
    out = folder / "done"
    run(settings(folder, threshold=THRESHOLD), out)
    return out


def run(config: CapfiltConfig, out: Path, how: Execution = HERE, **more: Any) -> Any:
    return run_capfilt(config, out, ALONE, how=how, pretrain=False, **more)


def texts(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Every text of the records by key and provenance; a human picture's last one."""
    records = [json.loads(path.read_text()) for path in (out / "judged").glob("*.json")]
    rows = [row for record in records for row in record["rows"]]
    return {(row["key"], text["provenance"]): text for row in rows for text in row["texts"]}


def test_what_is_kept_and_written(folder: Path, done: Path) -> None:
    found = texts(done)
    web = {key: text for key, text in found.items() if key[1] != "human"}
    assert len(web) == 20 and 0 < sum(text["kept"] for text in web.values()) < 20
    assert all(text["kept"] == (text["itm"] > THRESHOLD) for text in web.values())
    assert all(text["kept"] for key, text in found.items() if key[1] == "human")
    assert len({text["text"] for key, text in found.items() if key[1] == "synthetic"}) > 5
    source, before = open_source(str(done / "data")), open_source([str(folder / "web"), str(folder / "human")])
    assert source.problems.total == 0
    places = {key: number for number, key in enumerate(before.keys)}
    seen = set()
    for number in range(len(source)):
        sample = source[number]
        old, meta = before[places[sample.meta["key"]]], sample.meta
        assert sample.image == old.image
        assert set(meta["captions"]) == {text["text"] for text in meta["texts"]}
        for text in meta["texts"]:
            assert text == {n: v for n, v in found[meta["key"], text["provenance"]].items() if n != "kept"} or (
                text["provenance"] == "human"
            )
            seen.add((meta["key"], text["provenance"]))
        if meta["key"].startswith("web"):
            assert meta["licence"] == "CC0" and not {"tags", "web"} & set(meta)
        else:
            assert meta["tags"] == ["t"] and meta["concept"] == old.meta["concept"]
            assert [text["text"] for text in meta["texts"]] == old.meta["captions"]
    assert seen == {key for key, text in found.items() if text["kept"]}


def test_scores_are_those_of_the_pair_alone_and_web_texts_the_uploaders(folder: Path, done: Path) -> None:
    judge, source, found = vlm.load(folder / "filter", device="cpu"), open_source(str(folder / "web")), texts(done)
    for key in ("web0", "web2"):
        sample, text = source[source.keys.index(key)], found[key, "web"]
        assert text["text"] == (sample.meta.get("web") or sample.meta["captions"][0])
        pixels = judge.pixels(decode_image(sample.image))
        with torch.inference_mode():
            itm = float(judge.match(pixels, judge.tokens(text["text"])).softmax(dim=1)[0, 1])
        assert text["itm"] == pytest.approx(itm, abs=2e-6)


def test_a_broken_picture_is_reported_and_left_out(done: Path) -> None:
    report = json.loads((done / "report.json").read_text())
    assert [one["key"] for one in report["unreadable"]] == [BROKEN]
    assert "not a picture" in report["unreadable"][0]["error"]
    assert report["pictures"]["web"] == {"pictures": 11, "without_text": 0, "unreadable": 1} | {
        "with_kept_text": len({key for (key, kind), text in texts(done).items() if kind != "human" and text["kept"]})
    }
    assert f"Unreadable: {BROKEN}" in (done / "report.md").read_text()


def test_the_report_counts_what_the_shards_hold(done: Path) -> None:
    report, source = json.loads((done / "report.json").read_text()), open_source(str(done / "data"))
    kept = [text["provenance"] for number in range(len(source)) for text in source.meta(number)["texts"]]
    assert {name: found["kept"] for name, found in report["texts"].items()} == {
        name: kept.count(name) for name in ("web", "synthetic", "human")
    }
    web = report["texts"]["web"]
    assert web["texts"] == 10 and web["kept_share"]["value"] == pytest.approx(web["kept"] / 10)
    assert report["texts"]["human"]["kept_share"]["value"] == 1
    page = (done / "report.html").read_text()
    assert page.count("<figure>") == 10 and page.count("data:image/webp;base64,") == 10
    shown = {kind: page.count(f'<p class="{kind}">') for kind in ("kept", "dropped")}
    total = web["kept"] + report["texts"]["synthetic"]["kept"]
    assert shown == {"kept": total, "dropped": 20 - total}
    assert "&lt;b&gt;" in page and "<b>" not in page


@pytest.mark.parametrize(
    "how", [Execution(batch_size=3, device="cpu", workers=2), Execution(batch_size=1, device="cpu")], ids=str
)
def test_nothing_depends_on_how_it_is_computed(folder: Path, done: Path, tmp_path: Path, how: Execution) -> None:
    run(settings(folder, threshold=THRESHOLD), tmp_path / "out", how)
    if how.workers:
        assert content(tmp_path / "out") == content(done)
    other = texts(tmp_path / "out")
    for key, text in texts(done).items():
        assert (other[key]["text"], other[key]["kept"]) == (text["text"], text["kept"])


def test_a_new_seed_or_key_draws_other_texts(folder: Path, done: Path, tmp_path: Path) -> None:
    run(settings(folder, threshold=THRESHOLD, seed=1), tmp_path / "out")
    first, second = texts(done), texts(tmp_path / "out")
    written = [key for key in first if key[1] == "synthetic"]
    assert sum(first[key]["text"] != second[key]["text"] for key in written) > 5
    assert all(first[key]["text"] == second[key]["text"] for key in first if key[1] == "web")


def test_finished_shards_arent_made_again_and_missing_ones_are(
    folder: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, told = tmp_path / "out", []
    shutil.copytree(done, out)
    (out / "judged" / "web-00001.json").unlink()
    (out / "data" / ".tmp-web-00001.tar-0123").write_bytes(b"half")
    again = []
    write_unit = work.write_unit
    monkeypatch.setattr(work, "write_unit", lambda *given: (again.append(given[1].name), write_unit(*given)))
    run(settings(folder, threshold=THRESHOLD), out, progress=lambda *step: told.append(step))
    assert again == ["web-00001"] and told == [(12, 16), (16, 16)]
    assert content(out) == content(done)


def test_a_break_between_shard_and_record_leaves_both_whole(
    folder: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, write_text = tmp_path / "out", work.write_text

    def broken(path: Path, text: str) -> None:
        if path.name == "web-00001.json":
            raise DataError("no space left")
        write_text(path, text)

    monkeypatch.setattr(work, "write_text", broken)
    with pytest.raises(DataError, match="no space left"):
        run(settings(folder, threshold=THRESHOLD), out)
    assert (out / "data" / "web-00001.tar").exists() and not (out / "judged" / "web-00001.json").exists()
    monkeypatch.undo()
    run(settings(folder, threshold=THRESHOLD), out)
    assert content(out) == content(done)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"threshold": 0.5}, r"settings\.threshold: 0\.985 before, 0\.5 now"),
        ({"seed": 3}, r"settings\.seed: 0 before, 3 now"),
        ({"generation": GenerationConfig("beam", max_new_tokens=6)}, r"settings\.generation\.strategy: \"nucleus\""),
        ({"judge": "captioner"}, r"  filter: "),
        ({"web": ("human",)}, r"data\.web: "),
    ],
)
def test_what_has_changed_is_refused_by_name(
    folder: Path, done: Path, tmp_path: Path, changes: dict[str, Any], name: str
) -> None:
    if "judge" in changes:
        changes = {"judge": str(folder / changes["judge"])}
    if "web" in changes:
        changes = {"web": (str(folder / "human"),)}
    before = content(done)
    with pytest.raises(ConfigError, match=name):
        run(replace(settings(folder, threshold=THRESHOLD), **changes), done)
    assert content(done) == before


def test_without_captioner_or_filter(folder: Path, tmp_path: Path) -> None:
    run(settings(folder, threshold=THRESHOLD, synthetic=False, captioner=""), tmp_path / "filter")
    assert {kind for _, kind in texts(tmp_path / "filter")} == {"web", "human"}
    run(settings(folder, threshold=THRESHOLD, filtering=False), tmp_path / "captioner")
    assert all(text["kept"] for text in texts(tmp_path / "captioner").values())


def test_heads_settings_and_ranks_that_cant_be_used(folder: Path, tmp_path: Path) -> None:
    med(heads=("itc", "itm")).save(tmp_path / "retriever")
    with pytest.raises(MissingVerbError, match="has no lm head"):
        run(settings(folder, captioner="", model=str(tmp_path / "retriever")), tmp_path / "out")
    with pytest.raises(MissingVerbError, match="a clip model has no lm, itc, itm head of a MED"):
        random_model().save(tmp_path / "clip")
        run(settings(folder, captioner="", judge="", model=str(tmp_path / "clip")), tmp_path / "out")
    assert not (tmp_path / "out" / "capfilt.json").exists()
    with pytest.raises(MissingVerbError, match="has no lm head"):
        run(settings(folder, captioner=str(tmp_path / "retriever")), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"capfilt\.model: name the pre-trained MED that captioner and judge"):
        settings(folder, captioner="", judge="")
    with pytest.raises(ConfigError, match=r"capfilt\.threshold is a probability.*got 1"):
        settings(folder, threshold=1.0)
    with pytest.raises(ConfigError, match=r"sequences must be 1"):
        settings(folder, generation=GenerationConfig("nucleus", sequences=2))
    with pytest.raises(ConfigError, match=r"unknown engine 'rya' \(did you mean 'ray'"):
        Execution(engine="rya")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"capfilt\.address is for engine ray"):
        Execution(address="auto")
    with pytest.raises(ConfigError, match="runs as one process"):
        run_capfilt(settings(folder), tmp_path / "out", replace(ALONE, count=2))


def test_a_folder_in_use_is_left_alone(folder: Path, done: Path) -> None:
    before = content(done)
    code = f"from pathlib import Path\nfrom vlm.files import held_alone\nwith held_alone(Path({str(done)!r})):\n"
    command = [sys.executable, "-c", code + "    print('held', flush=True)\n    input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(DataError, match="another process works there"):
            run(settings(folder, threshold=THRESHOLD), done)
        other.kill()
    assert content(done) == before
    run(settings(folder, threshold=THRESHOLD), done)


def test_the_filter_is_measured_once(folder: Path, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "score_exchanged", None)
    run(settings(folder, threshold=THRESHOLD), done)
    check = json.loads((done / "report.json").read_text())["filter"]
    assert check["recall"]["count"] == 2 and check["own_kept"]["count"] == 2
    assert not check["trained_on"] and "fine-tuned" not in (done / "report.md").read_text()
