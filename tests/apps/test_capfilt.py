"""``vlm capfilt run`` as a process: its options, a kill at any moment, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from tests.apps.conftest import Run
from tests.tasks.capfilt.small import BROKEN, content, sets, settings

OPTIONS = ["--batch-size", "1", "--shard-samples", "2", "--max-new-tokens", "6", "--min-new-tokens", "2"]
OPTIONS += ["--threshold", "0.985", "--check-pictures", "4", "--device", "cpu", "--no-train"]


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    settings(folder)
    models = ["--captioner", str(folder / "captioner"), "--filter", str(folder / "filter")]
    places = ["--web", str(folder / "web"), "--human", str(folder / "human"), "--out", str(out)]
    return ["capfilt", "run", *places, *models, "--config", str(folder / "new.yaml"), *OPTIONS, *more]


def test_a_kill_at_any_moment_changes_nothing(tmp_path: Path, run: Run) -> None:
    sets(tmp_path, web=60)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, out, err = run(*arguments(tmp_path, whole))
    assert code == 1 and f"1 pictures could not be read; {whole / 'report.json'} names them" in err
    assert "filter on exchanged texts: precision" in out and "vlm train blip --data" in out
    assert [one["key"] for one in json.loads((whole / "report.json").read_text())["unreadable"]] == [BROKEN]
    command = [sys.executable, "-m", "vlm.apps.cli", *arguments(tmp_path, cut, "--workers", "2")]
    units = len(list((whole / "judged").iterdir()))
    for wanted in (1, 12):  # finished shards at which it is killed
        process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
        end = time.monotonic() + 120
        while len(list((cut / "judged").glob("*.json"))) < wanted and process.poll() is None:
            assert time.monotonic() < end, process.stderr and process.stderr.read()
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
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


def test_what_it_refuses(tmp_path: Path, run: Run) -> None:
    given = arguments(tmp_path, tmp_path / "out")
    cases = {
        ("--web", "no/such"): "no/such: no such file or folder",
        ("--captioner", str(tmp_path / "none")): "none",
        ("--strategy", "nuclear"): "unknown strategy 'nuclear' (did you mean 'nucleus'?)",
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
    assert not (tmp_path / "out").exists()
