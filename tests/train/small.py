"""A job small enough for seconds: a tiny CLIP on pictures and texts made from their numbers."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from vlm.data.batch import Batch, Tokens
from vlm.models.clip import Clip, ClipConfig
from vlm.models.transformer import TransformerConfig
from vlm.models.vit import ViTConfig
from vlm.train.config import OptimConfig, TrainConfig
from vlm.train.distributed import Ranks, leave, ranks
from vlm.train.engine import Job, Trainer

SAMPLES, GLOBAL_BATCH = 44, 12
CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)


def network(seed: int = 0, **settings) -> Clip:
    torch.manual_seed(seed)
    image = ViTConfig(image_size=16, patch_size=8, width=32, layers=2, heads=2, mlp_width=64)
    text = TransformerConfig(vocab_size=50, context_length=12, width=32, layers=2, heads=2, mlp_width=64)
    values = {"embed_dim": 16, "image": image, "text": text} | settings
    return Clip(ClipConfig(**values))


def batch(numbers: list[int], consumed: int = 0, broken: int = -1) -> Batch:
    """Rows made from their sample numbers alone; sample `broken` has pixels that aren't finite."""
    pixels, ids, lengths = [], [], []
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        pixels.append(torch.randn(3, 16, 16, generator=generator))
        lengths.append(3 + number % 5)
        ids.append(torch.randint(1, 50, (12,), generator=generator))
    if broken in numbers:
        pixels[numbers.index(broken)][0, 0, 0] = float("nan")
    width = max(lengths)
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    tokens = Tokens(torch.stack(ids)[:, :width] * mask, mask)
    # Every seventh sample shares its concept with others, so that positives cross batches and ranks.
    same = torch.tensor([[(n % 7 and n + 1000) or 7, n + 5000] for n in numbers])
    return Batch(torch.stack(pixels), tokens, same, tuple(f"sample-{n}" for n in numbers), consumed)


def order(epoch: int) -> list[list[int]]:
    """Global batches of an epoch; the last one is short, so that ranks differ in their rows."""
    numbers = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch)).tolist()
    return [numbers[i : i + GLOBAL_BATCH] for i in range(0, SAMPLES, GLOBAL_BATCH)]


def make_batches(here: Ranks, seen: list[int] | None = None, broken: int = -1):
    def batches(epoch: int, skip: int) -> Iterator[Batch]:
        done = 0
        for numbers in order(epoch):
            done += len(numbers)
            if done > skip:
                if seen is not None:
                    seen.extend(numbers)
                yield batch(numbers[here.rank :: here.count], done, broken)

    return batches


class Cut(Exception):
    """Ends a run in the middle."""


def stops_after(batches, count):
    """The batches, and `Cut` in place of the one after `count` of them."""
    state = {"left": count}

    def cut(epoch, skip):
        for item in batches(epoch, skip):
            if state["left"] == 0:
                raise Cut
            state["left"] -= 1
            yield item

    return cut


def forget_last(run: Path, step: int) -> None:
    """As after a kill between two checkpoints: the one after `step` is gone, and with it the model."""
    for name in ("model", f"checkpoints/step-{step:08d}"):
        shutil.rmtree(run / name)


def export(state: dict[str, torch.Tensor], folder: Path) -> None:
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors")


def config(**settings) -> TrainConfig:
    optim = OptimConfig(lr=1e-3, warmup=2, **settings.pop("optim", {}))
    defaults = {"steps": 10, "log_every": 1, "save_every": 4, "precision": "fp32", "optim": optim}
    return TrainConfig(**defaults | settings)


def trainer(
    run: Path, here: Ranks = ALONE, *, job: dict | None = None, model: dict | None = None, **settings
) -> Trainer:
    run.mkdir(parents=True, exist_ok=True)
    (run / "manifest.json").write_text('{"data": ""}')
    clip = network(**(model or {}))
    made = Job(clip, make_batches(here), 4, export)
    return Trainer(dataclasses.replace(made, **(job or {})), config(**settings), run, here, progress=False)


def in_rank(rank: int, count: int, port: int, task, arguments: tuple) -> None:
    """Run `task(here, *arguments)` as one rank of a gloo group (entry of `spawn`'s processes)."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # as torchrun has it: the process above serves that port
    )
    with ranks("cpu") as here:
        task(here, *arguments)
    leave()


PRELOADED = ["torch.distributed.checkpoint", "torch.distributed.fsdp", "tests.train.small_pairs", "vlm.train.run"]


def spawn(task, *arguments, count: int = 2, seconds: float = 600) -> None:
    """Run `task(here, *arguments)` on `count` gloo ranks, which are killed when one fails or time is up.

    They fork from a server that has imported already what takes longer than most tasks.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    # Held from the start, so that no other test's process takes the port.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started = torch.multiprocessing.start_processes(
        in_rank, (count, store.port, task, arguments), nprocs=count, join=False, start_method="forkserver"
    )
    end = time.monotonic() + seconds
    try:
        while not started.join(timeout=max(0.0, end - time.monotonic())):
            assert time.monotonic() < end, f"{count} ranks weren't done in {seconds} s"
    finally:
        for process in started.processes:
            process.kill()
