"""Runs of a stage with pairs and a teacher: resume, kill -9, other ranks, losses that aren't finite."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.small import Cut, spawn, stops_after
from tests.train.small_pairs import albef_run, hidden_batches
from vlm.errors import TrainingError
from vlm.train.distributed import Ranks
from vlm.train.engine import Trainer
from vlm.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
WATCHED = ("loss", "itc", "itm", "mlm", "itm_accuracy", "mlm_accuracy", "alpha", "scale", "teacher_distance")


def curve(run: Path) -> dict[tuple[int, str], float]:
    """Every watched figure of every step."""
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"]
    return {(line["step"], name): line[name] for line in lines for name in WATCHED if name in line}


def tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Student, teacher and queue."""
    assert trainer.teaching is not None
    found = {f"student.{name}": value for name, value in trainer.network.state_dict().items()}
    found |= {f"teacher.{name}": value for name, value in trainer.teaching.teacher.network.state_dict().items()}
    return found | {f"queue.{name}": value for name, value in trainer.teaching.queue.state().items()}


def test_a_run_learns_and_tells_all_its_parts(tmp_path: Path) -> None:
    run = albef_run(tmp_path, steps=30)
    slots = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    run.fit()
    values = curve(tmp_path)
    assert {name for _, name in values} == set(WATCHED)
    means = [sum(values[s, "loss"] for s in steps) for steps in (range(1, 5), range(27, 31))]
    assert means[1] < 0.9 * means[0]
    assert values[1, "alpha"] == 0.0 and values[30, "alpha"] == pytest.approx(0.4)
    assert all(values[step, "teacher_distance"] > 0 for step in range(1, 31))
    assert run.teaching is not None
    teacher = run.teaching.teacher.network
    assert not any(p.requires_grad or p.grad is not None or id(p) in slots for p in teacher.parameters())


def test_resume_goes_on_with_student_teacher_and_queue(tmp_path: Path) -> None:
    whole = albef_run(tmp_path / "whole")
    whole.fit()
    with pytest.raises(Cut):
        albef_run(tmp_path / "cut", job={"batches": stops_after(hidden_batches(), 7)}).fit()
    resumed = albef_run(tmp_path / "cut")
    resumed.fit(resume=True)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    for name, value in tensors(whole).items():
        assert torch.equal(value, tensors(resumed)[name]), name


KILLED_RUN = """
    import sys, time
    from pathlib import Path
    sys.path.insert(0, {root!r})
    import torch
    torch.set_num_threads(1)
    from tests.train.small_pairs import albef_run, hidden_batches
    def slowly(epoch, skip):
        for item in hidden_batches()(epoch, skip):
            time.sleep(0.05)
            yield item
    run = Path({run!r})
    resume = any(run.glob("checkpoints/step-*/trainer.json"))
    albef_run(run, steps=16, save_every=2, job={{"batches": slowly}}).fit(resume=resume)
"""


def test_kill_9_in_mid_run_then_resume_gives_the_unbroken_curve(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    albef_run(whole, steps=16, save_every=2).fit()
    script = tmp_path / "job.py"
    script.write_text(textwrap.dedent(KILLED_RUN.format(root=str(ROOT), run=str(killed))))
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(list(killed.glob("checkpoints/step-*/trainer.json"))) < 2:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert max(step for step, _ in curve(killed)) < 16
    finished = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr
    assert curve(killed) == pytest.approx(curve(whole), abs=1e-6)


def ranks_resume(here: Ranks, kind: str, run: str) -> None:
    trainer = albef_run(Path(run), here, parallel=kind)
    trainer.fit(resume=True)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_resume_on_two_ranks_goes_on_with_teacher_and_queue(tmp_path: Path, kind: str) -> None:
    albef_run(tmp_path / "whole").fit()
    with pytest.raises(Cut):
        albef_run(tmp_path / "cut", job={"batches": stops_after(hidden_batches(), 6)}).fit()
    spawn(ranks_resume, kind, str(tmp_path / "cut"))
    assert curve(tmp_path / "cut") == pytest.approx(curve(tmp_path / "whole"), abs=2e-5)


def test_a_loss_that_isnt_finite_stops_with_the_keys(tmp_path: Path) -> None:
    def batches(epoch: int, skip: int) -> Any:
        return hidden_batches(broken=31 if epoch else -1)(epoch, skip)

    run = albef_run(tmp_path, save_every=1, job={"batches": batches})
    with pytest.raises(TrainingError, match=r"loss is nan.*sample-31") as failure:
        run.fit()
    steps = run.checkpoints.steps()
    assert steps and str(run.checkpoints.path(steps[-1])) in str(failure.value)
    sound = albef_run(tmp_path)
    sound.resume()
    assert all(value.isfinite().all() for value in tensors(sound).values())
