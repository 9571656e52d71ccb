"""`vlm doctor`: exit status, words and evidence from a run folder."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from tests.apps.conftest import Run
from tests.tasks.small import plain
from vlm.apps.doctor import read_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run of 40 steps (two epochs of 80 pictures by fours) that learns."""
    run, data = tmp_path / "run", tmp_path / "data"
    (run / "model").mkdir(parents=True)
    data.mkdir()
    for number in range(4):
        plain("red").save(data / f"{number}.png")
        (data / f"{number}.txt").write_text("red")
    lines = [
        {"kind": "train", "step": 2 * n + 2, "time": n, "loss": 2 - n / 20, "itc": 2 - n / 20, "scale": 20 + n}
        for n in range(20)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = f"data: [{json.dumps(str(data))}]\nloader: {{batch_size: 4}}\ntrain: {{epochs: 2.0, steps: 0}}\n"
    (run / "config.yaml").write_text(config)
    (run / "manifest.json").write_text(json.dumps({"samples": 80, "command": ["vlm", "train", "clip", "--out", "x"]}))
    return run


def test_a_healthy_run(run: Run, folder: Path) -> None:
    done = run("doctor", folder)
    assert done.code == 0 and not done.err
    assert "step 40 of 40" in done.out and "healthy" in done.out
    assert run("doctor", folder / "metrics.jsonl").code == 0


def test_what_is_wrong_is_said(run: Run, folder: Path) -> None:
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text + '{"kind": "train", "step": 41, "loss": NaN}\n{"kind": "tr')
    done = run("doctor", folder)
    assert done.code == 1 and "wrong: not finite" in done.out and "step 41: loss nan" in done.out
    assert "train.optim.lr" in done.out and "healthy" not in done.out


def test_an_interrupted_run_can_be_resumed(run: Run, folder: Path) -> None:
    (folder / "model").rmdir()
    text = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(text[:12]) + "\n")
    assert "watch: still running" in run("doctor", folder).out
    old = time.time() - 7200
    os.utime(folder / "metrics.jsonl", (old, old))
    done = run("doctor", folder)
    assert done.code == 1 and f"vlm train clip --out {folder} --resume" in done.out


def test_a_run_that_logged_nothing_yet_is_told_from_no_run(run: Run, folder: Path) -> None:
    (folder / "metrics.jsonl").write_text("")
    done = run("doctor", folder)
    assert done.code == 2 and "hasn't logged a step yet" in done.err and "--resume" in done.err


def test_pictures_are_tried(run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "2.png").write_bytes(b"no picture")
    done = run("doctor", folder)
    assert done.code == 1 and "1 of 4 pictures tried" in done.out and "2.png" in done.out
    assert run("doctor", folder, "--pictures", "0").code == 0
    for file in (tmp_path / "data").iterdir():
        file.unlink()
    gone = run("doctor", folder)
    assert gone.code == 0 and "isn't at hand" in gone.err


def test_steps_are_counted_as_the_engine_counts_them(folder: Path) -> None:
    assert read_run(folder).planned == 40
    (folder / "config.yaml").write_text("train: {steps: 7, epochs: 2.0}\n")
    assert read_run(folder).planned == 7
    (folder / "config.yaml").unlink()
    assert read_run(folder).planned == 0


@pytest.mark.parametrize("content", [None, "", "no json\n", "[1]\n", "\xff"])
def test_what_is_no_run_is_refused(run: Run, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content, encoding="latin-1")
    done = run("doctor", tmp_path)
    assert done.code == 2 and "metrics.jsonl" in done.err and "expected" in done.err


@pytest.mark.parametrize("line", ['{"step": "a", "loss": 1}', '{"kind": "train", "step": 3, "loss": null}'])
def test_lines_of_something_else_are_named(run: Run, tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 2.0}\n' + line + "\n")
    done = run("doctor", tmp_path)
    assert done.code == 2 and "line 2" in done.err and "expected a number" in done.err


def test_what_cannot_be_read_is_told_once(run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "page.md").write_text("no\nmetrics\nat all\n")
    assert run("doctor", tmp_path / "page.md").code == 2
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'page.md'}: 3 lines that can't be read, as after a kill, left out"
    ]


def test_a_bad_configuration_is_named(run: Run, folder: Path) -> None:
    (folder / "config.yaml").write_text("loader: {batch_size: many}\ntrain: {epochs: 2.0}\n")
    done = run("doctor", folder)
    assert done.code == 2 and "loader.batch_size" in done.err
    (folder / "manifest.json").write_text("[")
    assert run("doctor", folder).code == 2
