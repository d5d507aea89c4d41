"""Times and memory of one call, on a CPU, and on a GPU that is not there; and the limits of the machine."""

from __future__ import annotations

import contextlib
import types

import numpy as np
import pytest
import torch

from ood_engine.bench import clock as clocks
from ood_engine.bench import limits
from ood_engine.bench.cases import Effort
from ood_engine.bench.clock import CpuClock, CudaClock, Sample, clock_for
from ood_engine.bench.limits import Limits
from ood_engine.bench.measure import MIB
from ood_kernels.workloads import Cost

CPU = torch.device("cpu")
EFFORT = Effort("quick", 1, 0.0, 1.0, CPU)


def test_the_device_chooses_the_clock(fake_gpu):
    assert isinstance(clock_for(CPU), CpuClock)
    fake_gpu.cache_bytes = 0
    assert isinstance(CudaClock(CPU), CudaClock)


def test_time_on_a_cpu_is_that_of_the_call(monkeypatch):
    ticks = iter([10.0, 10.25])
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: next(ticks))
    assert CpuClock().time(lambda: None, False) == Sample(250.0, None)


def test_caches_are_flushed_before_a_cold_call_and_outside_its_time(monkeypatch):
    monkeypatch.setattr(clocks, "_CPU_FLUSH_BYTES", 4096)
    clock, seen = CpuClock(), []

    def call() -> None:
        seen.append(None if clock._flush is None else int(clock._flush.sum()))

    for cold in (False, True, True, False):
        clock.time(call, cold)
    assert seen == [None, 1024, 2048, 2048]
    events: list[str] = []
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: float(events.append(f"tick {int(clock._flush[0])}") or 0))
    clock.time(lambda: events.append("call"), True)
    assert events == ["tick 3", "call", "tick 3"]


def test_what_is_flushed_is_larger_than_the_caches_of_a_cpu():
    assert clocks._CPU_FLUSH_BYTES >= 256 * MIB


def test_memory_of_torch_is_what_was_held_at_most_and_the_result():
    def call() -> torch.Tensor:
        big = torch.ones(4 * MIB // 4)
        total = big.sum()
        del big
        return torch.ones(MIB // 4) + total

    assert CpuClock().peak_extra_mib(call, uses_numpy=False) == pytest.approx(4, abs=0.1)
    assert CpuClock().peak_extra_mib(lambda: torch.ones(3 * MIB // 4), uses_numpy=False) == pytest.approx(3, abs=0.1)
    assert CpuClock().peak_extra_mib(lambda: None, uses_numpy=False) == 0


def test_memory_of_numpy_is_told_from_that_of_torch():
    held = np.ones(2 * MIB, np.uint8)
    assert CpuClock().peak_extra_mib(lambda: np.ones(5 * MIB, np.uint8), uses_numpy=True) == pytest.approx(5, abs=0.1)
    assert CpuClock().peak_extra_mib(lambda: held.sum(), uses_numpy=True) < 0.1
    assert CpuClock().peak_extra_mib(lambda: np.ones(5 * MIB, np.uint8), uses_numpy=False) < 0.1


def test_memory_of_numpy_is_no_longer_traced_after_a_failure():
    import tracemalloc

    with pytest.raises(ZeroDivisionError):
        CpuClock().peak_extra_mib(lambda: 1 / 0, uses_numpy=True)
    assert not tracemalloc.is_tracing()


def test_a_cpu_has_no_graphs():
    with pytest.raises(NotImplementedError):
        CpuClock().capture(lambda: None)


class FakeGpu:
    """What is asked of torch.cuda; the time on the device passes by `work`."""

    def __init__(self) -> None:
        self.cache_bytes, self.now_ms, self.held, self.peak = 4 * MIB, 0.0, 0, 0
        self.log: list[str] = []
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.now_ms

            def synchronize(self) -> None:
                gpu.log.append("wait")

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        class Stream:
            def wait_stream(self, other: Stream) -> None:
                gpu.log.append("wait for stream")

        class Graph:
            def replay(self) -> None:
                gpu.log.append("replay")

        def named(context: str):
            @contextlib.contextmanager
            def enter(_):
                gpu.log.append(f"enter {context}")
                yield
                gpu.log.append(f"leave {context}")

            return enter

        self.Event, self.Stream, self.CUDAGraph = Event, Stream, Graph
        self.stream, self.graph = named("stream"), named("capture")
        self.current_stream = Stream

    def get_device_properties(self, device: torch.device) -> types.SimpleNamespace:
        return types.SimpleNamespace(L2_cache_size=self.cache_bytes)

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def memory_allocated(self) -> int:
        return self.held

    def reset_peak_memory_stats(self) -> None:
        self.peak = self.held

    def max_memory_allocated(self) -> int:
        return self.peak

    def work(self, milliseconds: float) -> None:
        self.now_ms += milliseconds
        self.log.append("call")

    def allocate(self, size: int) -> None:
        self.held += size
        self.peak = max(self.peak, self.held)


@pytest.fixture
def fake_gpu(monkeypatch):
    """Takes the place of torch.cuda."""
    gpu = FakeGpu()
    names = ("get_device_properties", "synchronize", "memory_allocated", "reset_peak_memory_stats")
    for name in (*names, "max_memory_allocated", "Event", "Stream", "CUDAGraph", "stream", "graph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(gpu, name))
    return gpu


def test_time_on_a_gpu_is_between_events_and_waited_for(fake_gpu):
    sample = CudaClock(CPU).time(lambda: fake_gpu.work(0.75), False)
    assert sample.device_ms == 0.75
    assert sample.host_ms >= 0
    assert fake_gpu.log == ["synchronize", "call", "wait"]


def test_a_gpu_is_flushed_of_twice_its_cache_before_a_cold_call(fake_gpu):
    clock = CudaClock(CPU)
    assert clock._flush.numel() * 4 == 8 * MIB
    clock.time(lambda: None, False)
    assert float(clock._flush.sum()) == 0
    clock.time(lambda: None, True)
    assert float(clock._flush[0]) == 1


def test_memory_on_a_gpu_is_the_peak_beyond_what_was_held(fake_gpu):
    fake_gpu.allocate(7 * MIB)

    def call() -> None:
        fake_gpu.allocate(3 * MIB)
        fake_gpu.allocate(-2 * MIB)

    assert CudaClock(CPU).peak_extra_mib(call, uses_numpy=False) == 3


def test_a_graph_is_warmed_up_captured_once_and_replayed(fake_gpu):
    replay = CudaClock(CPU).capture(lambda: fake_gpu.work(1) or "result")
    warm_up = ["wait for stream", "enter stream", "call", "call", "call", "leave stream", "wait for stream"]
    assert fake_gpu.log == [*warm_up, "enter capture", "call", "leave capture"]
    assert replay() == "result"
    assert fake_gpu.log[-1] == "replay"
    assert fake_gpu.log.count("call") == 4


class SteadyClock(CpuClock):
    """Every call takes two milliseconds, half of them on the device."""

    calls = 0

    def time(self, call, cold):
        call()
        self.calls += 1
        return Sample(2.0, 1.0)


def test_a_copy_reads_half_of_the_bytes_and_writes_the_other():
    provider = Limits(CpuClock(), EFFORT).copy(2**20)
    target = provider.call()
    assert target.numel() == 2**19
    assert bool((target == 1).all())
    assert provider.cost == Cost(0, 2**20)
    assert provider.tolerance is None


def test_the_bytes_of_a_copy_stay_within_reason(monkeypatch):
    monkeypatch.setattr(limits, "_MOST_COPY_BYTES", 2**16)
    made = Limits(CpuClock(), EFFORT)
    assert made.copy(1).cost == Cost(0, 4096)
    assert made.copy(2**40).cost == Cost(0, 2**16)


def test_the_rate_of_a_product_is_measured_once_a_dtype(monkeypatch):
    monkeypatch.setattr(limits, "_PRODUCT_SIZE", {"cpu": 16})
    clock = SteadyClock()
    made = Limits(clock, EFFORT)
    assert made.rate(torch.float32) == pytest.approx(2 * 16**3 / 1e-3)
    calls = clock.calls
    made.rate(torch.float32)
    assert clock.calls == calls
    made.rate(torch.float64)
    assert clock.calls == 2 * calls
    assert set(made.flops_a_second) == {torch.float32, torch.float64}
