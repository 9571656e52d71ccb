"""Ranks: where this process stands among them, how a network is spread over them, and exact gathers."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vlm.errors import ConfigError


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


def spread(network: nn.Module, kind: str, here: Ranks) -> nn.Module:
    """The network for training on all ranks: itself on one, wrapped by DDP, or sharded in place by FSDP2.

    With FSDP2 every repeated layer (an element of a ModuleList or Sequential) is a unit, then the rest.
    """
    if here.count == 1:
        return network
    if kind == "ddp":
        devices = [here.device] if here.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(network, device_ids=devices)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(here.device.type, (here.count,))
    for module in network.modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            for layer in module:
                if any(True for _ in layer.parameters()):
                    fully_shard(layer, mesh=mesh)
    fully_shard(network, mesh=mesh)
    for verb in ("encode_image", "encode_text"):  # evaluation calls them; only `forward` gathers by itself
        if hasattr(network, verb):
            register_fsdp_forward_method(network, verb)
    return network


@contextmanager
def synchronised(network: nn.Module, enabled: bool) -> Iterator[None]:
    """Whether gradients are averaged over the ranks in the backward passes inside."""
    if isinstance(network, nn.parallel.DistributedDataParallel) and not enabled:
        with network.no_sync():
            yield
        return
    switch = getattr(network, "set_requires_gradient_sync", None)
    if switch is not None:
        switch(enabled)
    yield


def gather(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    """Everyone's rows in the order of ranks: (n_r, ...) to (sum of n_r, ...), without gradient.

    sizes: n_r of each rank, which may differ.
    """
    if len(sizes) == 1:
        return tensor.detach()
    longest = max(sizes)
    padded = tensor.new_zeros((longest, *tensor.shape[1:]))
    padded[: len(tensor)] = tensor.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


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
