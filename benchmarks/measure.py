"""What every benchmark needs: time, peak memory, versions, and an interval for a median."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def peak_mb(device: str) -> float:
    """Highest memory so far in MB: of the GPU's tensors, or of the process."""
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage's peak would include that of the process which started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def held_mb(device: str) -> float:
    """Memory at this moment in MB, as `peak_mb`. Raises OSError for a process whose system doesn't tell (not Linux)."""
    if device != "cpu":
        import torch

        return torch.cuda.memory_allocated() / 1e6
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) * 1024 / 1e6


def reset_peak(device: str = "cpu") -> bool:
    """Let `peak_mb` of this process begin anew; false where the system can't."""
    if device != "cpu":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def give_back() -> None:
    """Give what was freed, and the allocator keeps, back to the system, where that can be done (glibc)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def timed(step: Callable[[int], None], numbers: Sequence[int], device: str) -> float:
    """Seconds of some steps; a GPU is waited for on both ends."""
    import torch

    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for number in numbers:
        step(number)
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def listed(versions: Mapping[str, str]) -> str:
    """What `versions` gives in words, such as ``torch 2.14.1, timm 1.0.31``."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def versions(*distributions: str) -> dict[str, str]:
    """Installed versions."""
    from importlib.metadata import version

    return {name: version(name) for name in distributions}


def machine(device: str) -> str:
    """Name of the GPU or of the processor."""
    if device != "cpu":
        import torch

        return torch.cuda.get_device_name(device)
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def median_interval(values: Sequence[float], wanted: float = 0.95) -> dict[str, float]:
    """Median, and the narrowest pair of order statistics that covers it with at least the wanted chance.

    Exact for any distribution (binomial); with fewer than six values the whole range is given, with its
    own, smaller coverage.
    """
    ordered, n = sorted(values), len(values)

    def coverage(cut: int) -> float:
        return 1 - 2 * sum(math.comb(n, i) for i in range(cut + 1)) / 2**n

    cut = max((k for k in range((n - 1) // 2 + 1) if coverage(k) >= wanted), default=0)
    low, high = ordered[cut], ordered[n - 1 - cut]
    return {"median": statistics.median(ordered), "low": low, "high": high, "coverage": max(0.0, coverage(cut))}


def llm_mb(llm: Any) -> float:
    """Megabytes of a language model's weights, however they are held."""
    held = [*llm.parameters(), *llm.buffers()]
    held += [state.absmax for one in held if (state := getattr(one, "quant_state", None)) is not None]  # nf4's scales
    return sum(one.numel() * one.element_size() for one in held) / 1e6


def write_results(out: Path, name: str, values: dict[str, Any], text: str) -> None:
    """Write NAME.json and NAME.md (the table `text`, also printed) into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(values, indent=1) + "\n", "utf-8")
    (out / f"{name}.md").write_text(text, "utf-8")
    print(text)
