"""How one call is timed, and the memory it takes, on a CPU and on a GPU."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from .measure import MIB, peak_allocated_mib

__all__ = ["Clock", "CpuClock", "CudaClock", "Sample", "clock_for"]

Call = Callable[[], Any]
_CPU_FLUSH_BYTES = 256 * MIB


class Sample(NamedTuple):
    """One call.

    Attributes:
        host_ms: from before the call until its result is there.
        device_ms: between events around it; None on a CPU.
    """

    host_ms: float
    device_ms: float | None


class Clock(Protocol):
    """What is asked of a device."""

    def time(self, call: Call, cold: bool) -> Sample:
        """Time one call, after its operands were pushed out of the caches where `cold`."""
        ...

    def peak_extra_mib(self, call: Call, uses_numpy: bool) -> float:
        """Most memory that was held during a call beyond what was before, its result included."""
        ...

    def capture(self, call: Call) -> Call:
        """The call as a CUDA graph."""
        ...


class CpuClock:
    """Wall time; memory of torch's allocator, or of Python's, which NumPy's arrays are in."""

    def __init__(self) -> None:
        self._flush: torch.Tensor | None = None

    def time(self, call: Call, cold: bool) -> Sample:
        """See `Clock`."""
        if cold:
            if self._flush is None:
                self._flush = torch.zeros(_CPU_FLUSH_BYTES // 4)
            self._flush.add_(1.0)
        start = time.perf_counter()
        call()
        return Sample(1000 * (time.perf_counter() - start), None)

    def peak_extra_mib(self, call: Call, uses_numpy: bool) -> float:
        """See `Clock`."""
        if not uses_numpy:
            return peak_allocated_mib(call)
        tracemalloc.start()
        try:
            call()
            return tracemalloc.get_traced_memory()[1] / MIB
        finally:
            tracemalloc.stop()

    def capture(self, call: Call) -> Call:
        """There is no such thing on a CPU."""
        raise NotImplementedError("a CPU has no CUDA graphs")


class CudaClock:
    """Events for the GPU alone, wall time with a wait for the host."""

    def __init__(self, device: torch.device) -> None:
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.zeros(max(2 * size, MIB) // 4, device=device)

    def time(self, call: Call, cold: bool) -> Sample:
        """See `Clock`."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if cold:
            self._flush.add_(1.0)
        torch.cuda.synchronize()
        start = time.perf_counter()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return Sample(1000 * (time.perf_counter() - start), begin.elapsed_time(end))

    def peak_extra_mib(self, call: Call, uses_numpy: bool) -> float:
        """See `Clock`."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        del result
        return float(torch.cuda.max_memory_allocated() - before) / MIB

    def capture(self, call: Call) -> Call:
        """See `Clock`; warmed up on a stream of its own first, as capturing asks for."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()

        def replay() -> Any:
            graph.replay()
            return result

        return replay


def clock_for(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()
