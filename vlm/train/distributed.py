"""Ranks: where this process stands among them, how a network is spread over them, and exact gathers."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vlm.errors import ConfigError

VERBS = ("encode_image", "encode_text", "match", "lm_logits", "teach")
"""Methods of networks that run layers outside of `forward`."""


@dataclass(frozen=True)
class Ranks:
    """This process among all of them; one rank when nothing launched several."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and shows things."""
        return self.rank == 0


@contextmanager
def ranks(device: str = "auto") -> Iterator[Ranks]:
    """Join the group that ``torchrun`` started, or stand alone; leaves the group at the end.

    device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``. Raises ConfigError when the device isn't there.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = pick_device(device, local)
    if count == 1 or dist.is_initialized():
        joined = dist.is_initialized()
        yield Ranks(dist.get_rank() if joined else 0, dist.get_world_size() if joined else 1, chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), chosen)
    finally:
        dist.destroy_process_group()


def leave() -> NoReturn:
    """End a finished rank's process with status 0, all output flushed.

    While an interpreter goes down, threads of torch's gloo backend now and then abort it ("terminate called
    without an active exception"), and torchrun then calls a run failed that has written all of its files.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def pick_device(device: str, local: int = 0) -> torch.device:
    """The device of a rank. Raises ConfigError when it isn't there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r}: expected auto, cpu, cuda or cuda:N") from error
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"device {device!r}: torch finds no GPU here; use --device cpu")
        if (chosen.index or 0) >= torch.cuda.device_count():
            raise ConfigError(f"device {device!r}: there are {torch.cuda.device_count()} GPUs here, counted from 0")
        return chosen if chosen.index is not None else torch.device("cuda", local)
    other = torch.accelerator.current_accelerator()
    if chosen.type != "cpu" and (other is None or chosen.type != other.type):
        raise ConfigError(f"device {device!r}: torch can't compute on it here; expected auto, cpu, cuda or cuda:N")
    return chosen


def spread(network: nn.Module, kind: str, here: Ranks, *, teacher: bool = False) -> nn.Module:
    """The network for training on all ranks: itself on one, wrapped by DDP, or sharded in place by FSDP2.

    With FSDP2 every repeated layer (an element of a ModuleList or Sequential) is a unit, then the rest; and a
    part of a layer that says `runs_alone`, since it is called outside of its layer.
    teacher: the network gets no gradient, so DDP, which only averages those, leaves it as it is.
    """
    if here.count == 1 or (teacher and kind == "ddp"):
        return network
    if kind == "ddp":
        devices = [here.device] if here.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(network, device_ids=devices)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(here.device.type, (here.count,))
    for module in network.modules():
        if getattr(module, "runs_alone", False):
            fully_shard(module, mesh=mesh)
    for module in network.modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            for layer in module:
                if any(True for _ in layer.parameters()):
                    fully_shard(layer, mesh=mesh)
    fully_shard(network, mesh=mesh)
    for verb in VERBS:  # evaluation calls them; only `forward` gathers by itself
        if hasattr(network, verb):
            register_fsdp_forward_method(network, verb)
    return network


@contextmanager
def synchronised(network: nn.Module, enabled: bool, *, paired: bool = False) -> Iterator[None]:
    """Whether gradients are averaged over the ranks in the backward passes inside.

    paired: the step has several backward passes over the same parameters. DDP then never averages by itself
    (see `average_gradients`), FSDP2 in each of them, since the average is linear.
    """
    if isinstance(network, nn.parallel.DistributedDataParallel) and (paired or not enabled):
        with network.no_sync():
            yield
        return
    switch = getattr(network, "set_requires_gradient_sync", None)
    if switch is not None:
        switch(enabled or paired)
    yield


def order(sizes: Sequence[int], device: torch.device | str = "cpu") -> list[Tensor]:
    """Of each rank, its rows' numbers in the joined batch: ranks take turns, as the loader deals samples out."""
    turns = sorted((row, rank) for rank, size in enumerate(sizes) for row in range(size))
    numbers: list[list[int]] = [[] for _ in sizes]
    for number, (_, rank) in enumerate(turns):
        numbers[rank].append(number)
    return [torch.tensor(rows, dtype=torch.int64, device=device) for rows in numbers]


def gather(tensor: Tensor, places: Sequence[Tensor]) -> Tensor:
    """Everyone's rows as the joined batch: (n_r, ...) to (sum of n_r, ...), without gradient.

    places: of each rank, its n_r rows' numbers in the joined batch, from `order`; the n_r may differ.
    """
    if len(places) == 1:
        return tensor.detach()
    padded = tensor.new_zeros((max(map(len, places)), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor.detach()
    parts = [torch.empty_like(padded) for _ in places]
    dist.all_gather(parts, padded)
    whole = tensor.new_empty((sum(map(len, places)), *tensor.shape[1:]))
    for part, rows in zip(parts, places, strict=True):
        whole[rows] = part[: len(rows)]
    return whole


def share_from(rank: int, tensor: Tensor, here: Ranks) -> None:
    """Fill everyone's `tensor` with that of one rank, in place."""
    if here.count > 1:
        flags = tensor.view(torch.uint8) if tensor.dtype is torch.bool else tensor
        dist.broadcast(flags, src=rank)


def sum_to(rank: int, tensor: Tensor, here: Ranks) -> None:
    """Sum everyone's `tensor` into that of one rank, in place; the others' hold nothing of use afterwards."""
    if here.count > 1:
        dist.reduce(tensor, dst=rank)


def average_gradients(parameters: Iterable[nn.Parameter], here: Ranks, *, bucket: int = 8_000_000) -> None:
    """Average gradients over ranks, in flat buckets of about `bucket` numbers; a missing one counts as zero.

    DDP itself averages in the one backward pass that follows a forward; a step with pairs has two.
    """
    if here.count == 1:
        return
    waiting: list[Tensor] = []
    held = 0
    trained = [p for p in parameters if p.requires_grad]
    for place, parameter in enumerate(trained):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        waiting.append(parameter.grad)
        held += parameter.numel()
        if held >= bucket or place == len(trained) - 1:
            flat = torch.cat([gradient.reshape(-1) for gradient in waiting])
            dist.all_reduce(flat)
            flat /= here.count
            for gradient, part in zip(waiting, flat.split([g.numel() for g in waiting]), strict=True):
                gradient.copy_(part.view_as(gradient))
            waiting, held = [], 0


def gather_sizes(rows: int, here: Ranks) -> list[int]:
    """Rows of each rank."""
    if here.count == 1:
        return [rows]
    counts = [torch.zeros(1, dtype=torch.int64, device=here.device) for _ in range(here.count)]
    dist.all_gather(counts, torch.tensor([rows], device=here.device))
    return [int(count) for count in counts]


def sum_(tensor: Tensor, here: Ranks) -> Tensor:
    """Sum over ranks, in place."""
    if here.count > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_objects(value: Any, here: Ranks) -> list[Any]:
    """Each rank's value."""
    if here.count == 1:
        return [value]
    values: list[Any] = [None] * here.count
    dist.all_gather_object(values, value)
    return values


def wait(here: Ranks) -> None:
    """Let all ranks arrive."""
    if here.count > 1:
        dist.barrier()


def reshard(network: nn.Module) -> None:
    """Drop the whole parameters that FSDP2 keeps after a forward; any other network stays as it is."""
    from torch.distributed.fsdp import FSDPModule

    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def unwrapped(network: nn.Module) -> nn.Module:
    """The network itself, inside DDP."""
    return network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network
