"""Measuring on a GPU: checked first, then timed with events in turns, every call on operands that the cache does not hold."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ood_engine.bench.measure import MIB
from ood_kernels.workloads import Cost

__all__ = ["CudaInstrument", "Instrument", "Prepared", "Subject", "WrongResultError", "errors", "interleave", "prepare"]

Run = Callable[[], Any]
Mode = Literal["calls", "graph", "one-call graphs"]
_MOST_CALLS = 512
_MOST_GRAPHS = 16


class WrongResultError(ValueError):
    """A subject whose result is further from the truth than it may be; it is not timed."""


class Instrument(Protocol):
    """What is needed of a device to measure on it.

    Attributes:
        cache_bytes: size of the last-level cache, which has to be flushed between calls.
    """

    cache_bytes: int

    def time_ms(self, runs: Sequence[Run]) -> float:
        """Milliseconds from the start of the first run to the end of the last."""
        ...

    def capture(self, runs: Sequence[Run]) -> tuple[Run, Any]:
        """All runs as one graph: how to start it, and the result of the last run, which every start fills anew."""
        ...

    def peak_bytes(self, run: Run) -> int:
        """By how much the memory in use grew at most during a run, its result included."""
        ...

    def synchronize(self) -> None:
        """Wait until the device is idle; raises where it is out of order, which no later call can mend."""
        ...


class CudaInstrument:
    """The current CUDA device, timed with events."""

    def __init__(self) -> None:
        self.cache_bytes: int = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size

    def time_ms(self, runs: Sequence[Run]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for run in runs:
            run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def capture(self, runs: Sequence[Run]) -> tuple[Run, Any]:
        graph, result = torch.cuda.CUDAGraph(), None
        with torch.cuda.graph(graph):
            for run in runs:
                result = run()
        return graph.replay, result

    def peak_bytes(self, run: Run) -> int:
        self.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        self.synchronize()
        del result
        return int(torch.cuda.max_memory_allocated() - before)

    def synchronize(self) -> None:
        torch.cuda.synchronize()


class Subject(NamedTuple):
    """Something to measure.

    Attributes:
        subject: what is computed.
        provider: who computes it.
        call: one call on the i-th copy of the operands; every copy holds the same values.
        cost: least arithmetic and traffic of a call.
        truth: what a call returns, in fp64; empty where there is nothing to check.
        tolerance: largest difference to the truth, relative to the largest magnitude of the tensor.
        precision: of its matrix products.
        mode: plain calls, many calls in one CUDA graph, or a CUDA graph for every call.
        samples: of one call, where it takes fewer than the case has.
        product: (M, N, K) of a matrix product.
        note: for the reader of the row.
    """

    subject: str
    provider: str
    call: Callable[[int], Any]
    cost: Cost
    truth: Sequence[Tensor] = ()
    tolerance: float = 0.0
    precision: str | None = None
    mode: Mode = "calls"
    samples: int | None = None
    product: tuple[int, int, int] | None = None
    note: str | None = None


class Prepared(NamedTuple):
    """A subject that gave the right result and is ready to be timed.

    Attributes:
        runs: one after the other, over and over.
        calls: of the subject in one run.
        turns: runs in a round.
        fields: of the row: errors and memory.
    """

    runs: Sequence[Run]
    calls: int
    turns: int
    fields: dict[str, Any]


def tensors_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [part for part in result if isinstance(part, Tensor)]


def errors(result: Any, truth: Sequence[Tensor]) -> tuple[float, float]:
    """Largest and root mean square difference, relative to the largest magnitude of each tensor; the worst tensor counts.

    Raises:
        WrongResultError: not the tensors of the truth, by number or shape.
    """
    ours = tensors_of(result)
    shapes = [list(tensor.shape) for tensor in ours], [list(tensor.shape) for tensor in truth]
    if shapes[0] != shapes[1]:
        raise WrongResultError(f"result of shapes {shapes[0]}, expected {shapes[1]}")
    pairs = []
    for one, right in zip(ours, truth, strict=True):
        if right.numel():
            difference = (one.double() - right).abs_() / right.abs().max()
            pairs.append((float(difference.max()), float(difference.square_().mean().sqrt())))
    # max() would drop a NaN that does not come first.
    bad = [pair for pair in pairs if math.isnan(sum(pair))]
    return bad[0] if bad else (max(pair[0] for pair in pairs), max(pair[1] for pair in pairs))


def prepare(subject: Subject, instrument: Instrument, least_ms: float) -> Prepared:
    """Warm a subject up, hold its result to the truth, and plan rounds of about `least_ms`.

    Raises:
        WrongResultError: the result is wrong.
    """
    fields: dict[str, Any] = {"tolerance": subject.tolerance or None}
    _check(subject, subject.call(0), fields)
    first = partial(subject.call, 0)
    instrument.time_ms([first] * 2)
    one_ms = max(instrument.time_ms([first] * 3) / 3, 1e-4)
    # As many copies in turn as it takes to push the first of them out of the cache, and one more.
    copies = min(_MOST_CALLS, 1 + math.ceil(2 * instrument.cache_bytes / max(1, subject.cost.bytes)))
    wanted = min(_MOST_CALLS, math.ceil(least_ms / one_ms))
    calls = [partial(subject.call, index) for index in range(copies)]
    if subject.mode == "calls":
        result_bytes = _bytes(first())
        fields["peak_extra_mib"] = max(0, instrument.peak_bytes(first) - result_bytes) / MIB
        return Prepared(calls, 1, wanted, fields)
    if subject.mode == "one-call graphs":
        replays = []
        for call in calls[:_MOST_GRAPHS]:
            replay, result = instrument.capture([call])
            replay()
            _check(subject, result, fields)
            replays.append(replay)
        return Prepared(replays, 1, wanted, fields)
    captured = list(itertools.islice(itertools.cycle(calls), max(copies, wanted)))
    replay, result = instrument.capture(captured)
    replay()
    _check(subject, result, fields)
    return Prepared([replay], len(captured), 1, fields)


def _check(subject: Subject, result: Any, fields: dict[str, Any]) -> None:
    if not subject.truth:
        return
    largest, root = errors(result, subject.truth)
    fields |= {"max_error": largest, "rms_error": root}
    if not largest <= subject.tolerance:
        raise WrongResultError(f"wrong: largest error {largest:.2e}, allowed {subject.tolerance:.0e}")


def _bytes(result: Any) -> int:
    distinct = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors_of(result)}
    return sum(distinct.values())


def interleave(prepared: Mapping[int, Prepared], instrument: Instrument, rounds: int) -> dict[int, list[float]]:
    """Milliseconds of one call, round by round, in turns, so that a slow spell of the GPU meets all subjects alike."""
    endless = {name: itertools.cycle(ready.runs) for name, ready in prepared.items()}
    rounds_ms: dict[int, list[float]] = {name: [] for name in prepared}
    names = list(prepared)
    # The first round warms up and is not kept.
    for turn in range(-1, rounds):
        first = turn % max(1, len(names))
        for name in names[first:] + names[:first]:
            ready = prepared[name]
            runs = list(itertools.islice(endless[name], ready.turns))
            elapsed = instrument.time_ms(runs) / (ready.turns * ready.calls)
            if turn >= 0:
                rounds_ms[name].append(elapsed)
    return rounds_ms
