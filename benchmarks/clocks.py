"""The clock and the memory of a device, and the rate of a large matrix product on it."""

from __future__ import annotations

import os
import statistics
import time
import tracemalloc
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

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
    if DEVICE.type == "cuda":
        synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        synchronize()
        return float(torch.cuda.max_memory_allocated() - before) / MIB
    # Kineto otherwise writes a line to standard error at every start and stop.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recording:
        tracemalloc.start()
        result = call()
        python = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    del result
    assert recording.profiler is not None
    kineto = recording.profiler.kineto_results
    assert kineto is not None
    memory = [event for event in kineto.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(memory, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return (peak + python) / MIB


@cache
def matmul_flops(dtype: torch.dtype) -> float:
    """Flops a second of a large matrix product: the other limit beside the copy, measured once a run."""
    size = 512 if DEVICE.type == "cpu" else 8192
    left, right = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    return 2 * size**3 / (statistics.median(time_ms(lambda: left @ right, 1) for _ in range(5)) / 1000)
