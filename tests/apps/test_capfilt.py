"""``vlm capfilt run`` as a process: its options, a kill at any moment, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.apps.conftest import Run
from tests.tasks.capfilt.small import BROKEN, content, med, sets, settings

OPTIONS = ["--batch-size", "1", "--shard-samples", "2", "--max-new-tokens", "6", "--min-new-tokens", "2"]
OPTIONS += ["--threshold", "0.985", "--check-pictures", "4", "--device", "cpu", "--no-train"]


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    settings(folder)
    models = ["--captioner", str(folder / "captioner"), "--filter", str(folder / "filter")]
    places = ["--web", str(folder / "web"), "--human", str(folder / "human"), "--out", str(out)]
    return ["capfilt", "run", *places, *models, "--config", str(folder / "new.yaml"), *OPTIONS, *more]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As many as the processes that are killed have: sums of another order differ in their last digit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def kill_when(command: list[str], reached: Callable[[], bool]) -> None:
    """Start a process and kill it as soon as something is reached."""
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    end = time.monotonic() + 120
    while not reached() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr and process.stderr.read()


def test_a_kill_at_any_moment_changes_nothing(tmp_path: Path, run: Run) -> None:
    sets(tmp_path, web=60)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, out, err = run(*arguments(tmp_path, whole))
    assert code == 1 and f"1 picture could not be read; {whole / 'report.json'} names them" in err
    assert "filter on exchanged texts: precision" in out and "vlm train blip --data" in out
    assert [one["key"] for one in json.loads((whole / "report.json").read_text())["unreadable"]] == [BROKEN]
    command = [sys.executable, "-m", "vlm.apps.cli", *arguments(tmp_path, cut, "--workers", "2")]
    units = len(list((whole / "judged").iterdir()))
    for wanted in (1, 12):  # finished shards at which it is killed
        kill_when(command, lambda wanted=wanted: len(list((cut / "judged").glob("*.json"))) >= wanted)  # type: ignore[misc]
        done = list((cut / "judged").glob("*.json"))
        assert wanted <= len(done) < units
        for path in done:
            assert json.loads(path.read_text())["unit"] == path.stem
            assert path.read_bytes() == (whole / "judged" / path.name).read_bytes()
        for path in (cut / "data").glob("*.tar"):
            with tarfile.open(path) as archive:
                assert archive.getmembers()
    code, *_ = run(*arguments(tmp_path, cut))
    assert code == 1
    assert content(cut) == content(whole)


@pytest.mark.slow
def test_kills_while_it_trains_change_no_weight_and_no_text(tmp_path: Path, run: Run) -> None:
    given, yaml = arguments(tmp_path, tmp_path / "whole"), str(tmp_path / "new.yaml")
    med(0).save(tmp_path / "med")
    more = ["--captioner", "", "--filter", "", "--model", str(tmp_path / "med"), "--train"]
    more += ["--captioner-config", yaml, "--filter-config", yaml, "--tune", "train.steps=20"]
    more += ["--tune", "train.save_every=4", "--pretrain", "train.steps=20", "--pretrain", "train.save_every=4"]
    assert run(*given, *more)[0] == 1
    cut = tmp_path / "cut"
    command = [sys.executable, "-m", "vlm.apps.cli", *given, *more, "--out", str(cut)]
    for part in ("captioner", "filter", "pretrained"):
        kill_when(command, lambda part=part: any((cut / part / "checkpoints").glob("step-*")))  # type: ignore[misc]
        assert not (cut / part / "model").exists()
    assert run(*given, *more, "--out", cut)[0] == 1
    assert content(cut) == content(tmp_path / "whole")
    for part in ("captioner", "filter", "pretrained"):
        weights = [(folder / part / "model" / "model.safetensors").read_bytes() for folder in (cut, tmp_path / "whole")]
        assert weights[0] == weights[1]


def test_what_it_refuses(tmp_path: Path, run: Run) -> None:
    given = arguments(tmp_path, tmp_path / "out")
    cases = {
        ("--web", "no/such"): "no/such: no such file or folder",
        ("--captioner", str(tmp_path / "none")): "none",
        ("--strategy", "nuclear"): "unknown strategy 'nuclear' (did you mean 'nucleus'?)",
        (
            "--beams",
            "3",
        ): "--beams is for beam search, and the strategy is nucleus: leave it out, or add",
        ("--strategy", "beam", "--top-p", "0.9"): "--top-p is for nucleus search, and the strategy is beam",
        ("--threshold", "2"): "capfilt.threshold is a probability",
        ("--train", "--config", "huge"): "no blip configuration named 'huge'",
        ("--out", str(tmp_path / "new.yaml")): "new.yaml: is a file, expected a folder",
        ("--engine", "spark"): "unknown engine 'spark'; choose from local, ray",
        ("--max-new-tokens", "90"): "more than its texts can have, 48",
    }
    for change, message in cases.items():
        code, _, err = run(*given, *change)
        assert code == 2 and message in err, (change, err)
        assert "Traceback" not in err
    assert not (tmp_path / "out" / "capfilt.json").exists()
