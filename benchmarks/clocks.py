"""The clock and the memory of a device, and the rate of a large matrix product on it."""

from __future__ import annotations

import statistics
import time
import tracemalloc
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ood_engine.cli import timing

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MIB = 2**20
Call = Callable[[], Any]


def synchronize() -> None:
    """Wait for the device; raises where it no longer answers."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@cache
def _flush_buffer() -> Tensor:
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return torch.zeros(max(2 * size, MIB) // 4, device="cuda")


def time_ms(call: Call, count: int) -> float:
    """Milliseconds of one of `count` calls; on CUDA the flush before each lets the host get ahead, so that events have no gap."""
    if DEVICE.type == "cpu":
        start = time.perf_counter()
        for _ in range(count):
            call()
        return 1000 * (time.perf_counter() - start) / count
    buffer = _flush_buffer()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for before, after in pairs:
        buffer.add_(1.0)
        before.record()
        call()
        after.record()
    synchronize()
    return statistics.fmean(before.elapsed_time(after) for before, after in pairs)


def captured(call: Call) -> Call | None:
    """A replay of the call as a CUDA graph; None where it cannot be captured, as autograd cannot."""
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()
    except RuntimeError:
        synchronize()
        return None

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def peak_mib(call: Call) -> float:
    """Peak memory of a call beyond its operands, its result included: of torch's allocator and, on a CPU, of Python's (NumPy)."""
    python = 0

    def traced() -> None:
        nonlocal python
        tracemalloc.start()
        call()
        python = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()

    of_torch = timing.peak_mib(call if DEVICE.type == "cuda" else traced, DEVICE)
    return (of_torch or 0.0) + python / MIB


@cache
def matmul_flops(dtype: torch.dtype) -> float:
    """Flops a second of a large matrix product: the other limit beside the copy, measured once a run."""
    size = 512 if DEVICE.type == "cpu" else 8192
    left, right = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    return 2 * size**3 / (statistics.median(time_ms(lambda: left @ right, 1) for _ in range(5)) / 1000)
