"""Runs: resume after a kill, other rank counts, non-finite losses, full disks, averages, metrics."""

import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from tests.train.small import ALONE, SAMPLES, Cut, batch, make_batches, network, order, spawn, stops_after, trainer
from vlm.errors import ConfigError, TrainingError
from vlm.train.metrics import keep_until, read_metrics

ROOT = Path(__file__).resolve().parents[2]


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"}


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def test_loss_falls_and_metrics_are_written(tmp_path):
    trainer(
        tmp_path,
        steps=40,
        evaluate_every=10,
        job={"evaluate": lambda model: {"training": float(model.training)}},
    ).fit()
    values = losses(tmp_path)
    assert list(values) == list(range(1, 41))
    assert sum(values[s] for s in range(37, 41)) < 0.8 * sum(values[s] for s in range(1, 5))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["training"] for line in lines if line["kind"] == "evaluate"] == [0.0] * 4
    assert {"lr", "gradient_norm", "samples_per_second", "scale"} <= lines[0].keys()
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_resume_gives_the_unbroken_runs_losses_and_weights(tmp_path):
    whole = trainer(tmp_path / "whole", ema=0.9)
    whole.fit()
    trainer(tmp_path / "cut", steps=10, ema=0.9, job={"batches": stops_after(make_batches(ALONE), 7)}).fit_until_cut()
    resumed = trainer(tmp_path / "cut", steps=10, ema=0.9)
    resumed.fit(resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for name, value in weights(whole.network).items():
        assert torch.equal(value, weights(resumed.network)[name]), name
    for name, value in whole.average.average.items():
        assert torch.equal(value, resumed.average.average[name]), name


@pytest.fixture(autouse=True)
def fit_until_cut(monkeypatch):
    from vlm.train.engine import Trainer

    def run(self):
        with pytest.raises(Cut):
            self.fit()

    monkeypatch.setattr(Trainer, "fit_until_cut", run, raising=False)


SLOW_RUN = """
    import sys, time
    from pathlib import Path
    sys.path.insert(0, {root!r})
    from tests.train.small import trainer, make_batches, ALONE
    import torch
    torch.set_num_threads(1)
    def slowly(epoch, skip):
        for item in make_batches(ALONE)(epoch, skip):
            time.sleep(0.02)
            yield item
    if __name__ == "__main__":
        run = Path({run!r})
        resume = any(run.glob("checkpoints/step-*/trainer.json"))
        trainer(run, steps=24, save_every=2, job={{"batches": slowly}}).fit(resume=resume)
"""


def test_kill_9_at_any_moment_then_resume(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    trainer(whole, steps=24, save_every=2).fit()
    script = tmp_path / "job.py"
    script.write_text(textwrap.dedent(SLOW_RUN.format(root=str(ROOT), run=str(killed))))
    for kills, wait in enumerate((0.15, 0.4, 0.23)):
        process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, text=True)
        before = len(list(killed.glob("checkpoints/step-*")))
        deadline = time.monotonic() + 90
        while len(list(killed.glob("checkpoints/step-*"))) == before and not done(killed, 4 + 6 * kills):
            assert process.poll() is None or process.returncode == 0, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finished = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert losses(killed) == pytest.approx(losses(whole), abs=1e-6)
    assert not list(killed.glob("checkpoints/.tmp*"))


def done(run: Path, step: int) -> bool:
    try:
        return max(losses(run)) >= step
    except (OSError, ValueError):
        return False


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_resume_on_two_ranks_goes_on_with_the_same_samples(tmp_path, kind):
    trainer(tmp_path / "whole", steps=8).fit()
    trainer(tmp_path / "cut", steps=8, job={"batches": stops_after(make_batches(ALONE), 6)}).fit_until_cut()
    spawn(resume_as, kind, str(tmp_path / "cut"))
    seen = json.loads((tmp_path / "cut" / "seen.json").read_text())
    assert seen == [n for numbers in order(0) + order(1) for n in numbers][SAMPLES:]
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)


def resume_as(here, kind, run):
    seen: list[int] = []
    trainer(Path(run), here, steps=8, parallel=kind, job={"batches": make_batches(here, seen)}).fit(resume=True)
    if here.first:
        Path(run, "seen.json").write_text(json.dumps(seen))


def test_not_finite_loss_names_the_keys_and_keeps_the_checkpoint(tmp_path):
    sick = order(1)[2][3]
    with pytest.raises(TrainingError, match=rf"step 7: the loss is nan.*step-00000004.*sample-{sick}\b"):
        trainer(tmp_path, job={"batches": sick_later(sick)}).fit()
    position = json.loads((tmp_path / "checkpoints" / "step-00000004" / "trainer.json").read_text())
    assert position["step"] == 4
    trainer(tmp_path).fit(resume=True)
    assert max(losses(tmp_path)) == 10


def test_all_keys_of_a_large_batch_are_kept(tmp_path):
    numbers = list(range(70))

    def batches(epoch, skip):
        yield batch(numbers, len(numbers), broken=69)

    path = tmp_path / "nonfinite.json"
    with pytest.raises(TrainingError) as stopped:
        trainer(tmp_path, job={"batches": batches}).fit()
    message = str(stopped.value)
    assert f"all 70 stand in {path}): sample-0, " in message and message.endswith("sample-63, ...")
    found = json.loads(path.read_text())
    assert found["keys"] == [f"sample-{number}" for number in numbers]
    assert (found["step"], found["what"]) == (1, "the loss is nan")
    path.unlink()
    path.mkdir()
    with pytest.raises(TrainingError, match=r"step 1: the loss is nan.*70; .*can't be written.*sample-0, "):
        trainer(tmp_path, job={"batches": batches}).fit()


def sick_later(number):
    """Sample `number` is broken from the second epoch on."""

    def batches(epoch, skip):
        return make_batches(ALONE, broken=number if epoch else -1)(epoch, skip)

    return batches


def test_full_disk_names_the_last_good_checkpoint(tmp_path):
    calls = []

    def export(state, folder):
        calls.append(folder)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        folder.mkdir()

    with pytest.raises(TrainingError, match=r"No space left.*last good checkpoint is .*step-00000004.*--resume"):
        trainer(tmp_path, job={"export": export}).fit()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]


SMALL_DISK = """
    import resource, signal, sys
    from pathlib import Path
    sys.path.insert(0, {root!r})
    from tests.train.small import trainer
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    trainer(Path({run!r}), steps=8).fit(resume=True)
"""


def test_interrupted_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    import torch.distributed.checkpoint as dcp

    def stopped(*_, **__):
        raise CheckpointException("save", {0: (KeyboardInterrupt(), [])})

    trainer(tmp_path, steps=2).fit()
    monkeypatch.setattr(dcp, "save", stopped)
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, steps=4).fit(resume=True)
    monkeypatch.undo()
    assert trainer(tmp_path, steps=4).fit(resume=True).step == 4


def test_full_disk_within_the_state(tmp_path):
    """torch wraps what it meets there in an exception of its own that isn't an Exception."""
    trainer(tmp_path, steps=4).fit()
    script = tmp_path / "job.py"
    script.write_text(textwrap.dedent(SMALL_DISK.format(root=str(ROOT), run=str(tmp_path))))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("vlm.errors.TrainingError") and "can't be written" in last and "step-00000004" in last
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]


def test_damaged_state_is_named(tmp_path):
    trainer(tmp_path, steps=4).fit()
    for path in (tmp_path / "checkpoints/step-00000004/state").glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TrainingError, match=r"step-00000004: the checkpoint can't be read"):
        trainer(tmp_path, steps=8).fit(resume=True)


def test_keeps_the_last_and_the_best(tmp_path):
    figures = iter([1.0, 5.0, 2.0, 3.0, 4.0])
    trainer(
        tmp_path,
        steps=10,
        evaluate_every=2,
        save_every=2,
        keep=2,
        best="score",
        job={"evaluate": lambda model: {"score": next(figures)}},
    ).fit()
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000008", "step-00000010"]
    position = json.loads((tmp_path / "checkpoints/step-00000010/trainer.json").read_text())
    assert (position["best"], position["best_step"]) == (5.0, 4)


def test_unknown_best_metric(tmp_path):
    with pytest.raises(TrainingError, match="gives score"):
        trainer(tmp_path, evaluate_every=2, best="scoer", job={"evaluate": lambda model: {"score": 1.0}}).fit()


def test_average_is_exported_and_evaluated(tmp_path):
    from safetensors.torch import load_file

    found = {}
    made = trainer(tmp_path, steps=6, ema=0.8, job={"evaluate": lambda model: found.update(weights(model)) or {}})
    made.fit()
    exported = load_file(tmp_path / "checkpoints/step-00000006/model/model.safetensors")
    for name, average in made.average.average.items():
        assert torch.equal(exported[name], average) and torch.equal(found[name], average), name
        assert not torch.equal(average, weights(made.network)[name]), name


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_evaluating_the_average_leaves_the_training_alone(tmp_path, kind):
    for name in ("plain", "evaluated"):
        spawn(average_on_ranks, str(tmp_path / name), kind, name == "evaluated")
    assert losses(tmp_path / "evaluated") == pytest.approx(losses(tmp_path / "plain"), abs=1e-6)


def average_on_ranks(here, run, kind, evaluated):
    def evaluate(model):
        model.encode_image(torch.randn(2, 3, 16, 16))
        return {}

    job = {"evaluate": evaluate} if evaluated else {}
    trainer(Path(run), here, steps=5, ema=0.9, evaluate_every=2, save_every=0, parallel=kind, job=job).fit()


def test_frozen_parameters_stay_and_have_no_state(tmp_path):
    before = weights(network())
    made = trainer(tmp_path, optim={"freeze": ("text.tokens", "text.layers.0"), "lr_scale": {"text.": 0.1}})
    made.fit()
    after = weights(made.network)
    frozen = [name for name in before if name.startswith(("text.tokens", "text.layers.0"))]
    assert frozen and all(torch.equal(before[name], after[name]) for name in frozen)
    assert all(not torch.equal(before[name], after[name]) for name in before if name not in frozen)
    slots = {id(p) for p in made.optimizer.state}
    assert all((id(p) in slots) == (name not in frozen) for name, p in made.network.named_parameters())


@pytest.mark.parametrize("key", ["freeze", "lr_scale"])
def test_unknown_parameter_prefix(tmp_path, key):
    with pytest.raises(ConfigError, match=r"text\.tokenz.*did you mean 'text.tokens"):
        trainer(tmp_path, optim={key: {"text.tokenz": 1.0}})


def test_resume_before_the_first_checkpoint_begins_again(tmp_path):
    trainer(tmp_path / "whole").fit()
    trainer(tmp_path / "early", steps=3, save_every=0).fit()
    for path in sorted((tmp_path / "early" / "checkpoints").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    trainer(tmp_path / "early").fit(resume=True)
    assert losses(tmp_path / "early") == losses(tmp_path / "whole")


def test_resume_with_other_data(tmp_path):
    trainer(tmp_path).fit()
    with pytest.raises(TrainingError, match="data has changed"):
        trainer(tmp_path, job={"fingerprint": "other"}).fit(resume=True)


def test_empty_epoch_is_an_error(tmp_path):
    with pytest.raises(TrainingError, match="empty"):
        trainer(tmp_path, job={"batches": lambda epoch, skip: iter(())}).fit()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_learns(tmp_path, precision):
    made = trainer(tmp_path, steps=30, precision=precision)
    made.fit()
    values = losses(tmp_path)
    assert values[30] < values[1]
    assert all(p.dtype == torch.float32 for p in made.network.parameters())


def test_compiled_network_gives_the_same_losses(tmp_path):
    pytest.importorskip("triton")
    trainer(tmp_path / "plain", steps=3).fit()
    trainer(tmp_path / "compiled", steps=3, compile=True).fit()
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), abs=1e-4)


def test_metrics_after_the_checkpoint_and_cut_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "train", "step": 2}\n{"kind": "tra')
    keep_until(path, 1)
    assert path.read_text() == '{"kind": "train", "step": 1}\n'


def test_batch_helper_is_deterministic():
    assert torch.equal(batch([3, 4]).pixels, batch([3, 4]).pixels)
