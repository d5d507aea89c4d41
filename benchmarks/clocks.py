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
from torch.profiler import ProfilerActivity, profile

__all__ = ["DEVICE", "MIB", "Clock", "CudaClock", "clock", "matmul_flops"]

Call = Callable[[], Any]
MIB = 2**20
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Clock:
    """The time of a call on a CPU."""

    def prepare(self, call: Call, capture: bool) -> tuple[Call, bool]:
        """What is timed, and whether it is a CUDA graph."""
        return call, False

    def time_ms(self, call: Call, count: int, flush: bool) -> float:
        """Milliseconds of one of `count` calls in a row."""
        start = time.perf_counter()
        for _ in range(count):
            call()
        return 1000 * (time.perf_counter() - start) / count

    def peak_mib(self, call: Call, uses_numpy: bool) -> float:
        """Most memory held during a call beyond what was held before, its result included."""
        return numpy_peak_mib(call) if uses_numpy else torch_peak_mib(call)

    def synchronize(self) -> None:
        """Wait for what was started."""


class CudaClock(Clock):
    """The time of a call on the current GPU."""

    def __init__(self) -> None:
        size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flush = torch.zeros(max(2 * size, MIB) // 4, device="cuda")

    def prepare(self, call: Call, capture: bool) -> tuple[Call, bool]:
        """See `Clock`; what cannot be captured, such as autograd, is called as it is."""
        if not capture:
            return call, False
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
            self.synchronize()
            return call, False

        def replay() -> Any:
            graph.replay()
            return result

        return replay, True

    def time_ms(self, call: Call, count: int, flush: bool) -> float:
        """See `Clock`; while what comes before runs, the host gets ahead, so that no gap lies between the events of a replay."""
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in pairs:
            self._flush.add_(1.0) if flush else call()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return statistics.fmean(start.elapsed_time(end) for start, end in pairs)

    def peak_mib(self, call: Call, uses_numpy: bool) -> float:
        """See `Clock`."""
        return cuda_peak_mib(call)

    def synchronize(self) -> None:
        """See `Clock`; raises where the device is out of order."""
        torch.cuda.synchronize()


@cache
def clock() -> Clock:
    """The clock of `DEVICE`."""
    return CudaClock() if DEVICE.type == "cuda" else Clock()


@cache
def matmul_flops(dtype: torch.dtype) -> float:
    """Flops a second of a large matrix product: the other limit beside the copy, measured once a run."""
    size = 1024 if DEVICE.type == "cpu" else 8192
    left, right = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    times = [clock().time_ms(lambda: left @ right, 1, True) for _ in range(7)]
    return 2 * size**3 / (statistics.median(times) / 1000)


def torch_peak_mib(call: Callable[[], object]) -> float:
    """Largest sum of what torch's CPU allocator handed out during the call and had not got back, results included."""
    # Kineto otherwise writes a line to standard error at every start and stop.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recording:
        result = call()
    del result
    assert recording.profiler is not None
    kineto = recording.profiler.kineto_results
    assert kineto is not None
    memory = [event for event in kineto.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(memory, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / MIB


def numpy_peak_mib(call: Callable[[], object]) -> float:
    """Of Python's allocator, which NumPy's arrays are in."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1] / MIB
    finally:
        tracemalloc.stop()


def cuda_peak_mib(call: Callable[[], object]) -> float:
    """Of torch's CUDA allocator."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    del result
    return float(torch.cuda.max_memory_allocated() - before) / MIB
