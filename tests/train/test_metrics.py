"""Lines of figures: what a kill or a full disk leaves of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlm.errors import TrainingError
from vlm.train.metrics import Log, read_metrics


def log(folder: Path, step: int = 0) -> Log:
    return Log(folder, active=True, step=step, steps=9, progress=False)


def test_lines_after_the_checkpoint_are_cut(tmp_path: Path) -> None:
    first = log(tmp_path)
    for step in (1, 2, 3):
        first.write("train", step, {"loss": 1.0 / step})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tra')
    again = log(tmp_path, step=2)
    again.write("train", 3, {"loss": 7.0})
    again.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 0.5),
        (3, 7.0),
    ]


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="this system has no /dev/full")
def test_a_full_disk_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    found = log(tmp_path)
    with pytest.raises(TrainingError, match=r"metrics\.jsonl: the figures can't be written .*--resume"):
        found.write("train", 1, {"loss": 1.0})
    found.close()
