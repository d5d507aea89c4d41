"""One test measures one case: every provider is compared with fp64 first, then all are timed in turns, round by round.

On a CPU the clock is `time.perf_counter`. On CUDA a call becomes a graph where it can be captured, and events around its replay
tell the time; the second-level cache is flushed before each, outside the events. A round is one turn of every provider, so that a
slow spell of the machine meets all alike. Two runs are compared by the ratio to the reference row of the same rounds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ood_kernels.workloads import Cost

from .cases import COPY, Case, Provider, first_line
from .clocks import DEVICE, MIB, clock, matmul_flops

__all__ = ["QUICK", "BrokenDeviceError", "Effort", "Timer", "Turns", "error_of", "measure", "spread"]

Row = dict[str, Any]

_MOST_COPY_BYTES, _LEAST_COPY_BYTES = 512 * MIB, 2**12
_LONG_MS = 20.0
"""A call that takes longer pushes its own operands out of the caches: it needs no call before it that warms them."""


class BrokenDeviceError(RuntimeError):
    """The device answers no longer, and everything after it in this process would fail as well."""


class Effort(NamedTuple):
    """How long is measured: rounds as long as the seconds of every provider last, but at least `least_rounds`."""

    rounds: int = 11
    seconds: float = 0.4
    least_rounds: int = 3
    turn_ms: float = 5.0


QUICK = Effort(rounds=7, seconds=0.15)


class Benchmark(Protocol):
    """What is needed of pytest-benchmark's fixture."""

    extra_info: dict[str, Any]

    def pedantic(self, target: Callable[[], Any], *, setup: Callable[[], Any], rounds: int) -> Any:
        """Call setup and target in turns, round by round."""
        ...


class Timer:
    """Hands the time that was measured to pytest-benchmark, whose own clock would count the calls around it."""

    seconds = 0.0

    @classmethod
    def now(cls) -> float:
        """What pytest-benchmark reads before and after a turn."""
        return cls.seconds


class Turns:
    """Stands in for pytest-benchmark's fixture where that is not installed: the rows are the same, its own table is missing."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, target: Callable[[], Any], *, setup: Callable[[], Any], rounds: int) -> None:
        """See `Benchmark`."""
        for _ in range(rounds):
            setup()
            target()


def error_of(result: Any, truth: Sequence[Tensor]) -> float:
    """Largest difference, relative to the largest magnitude of each tensor; the worst tensor counts, and NaN before all.

    Raises:
        ValueError: not the tensors of the truth, by number or shape.
    """
    ours = [result] if isinstance(result, Tensor) else [part for part in result if isinstance(part, Tensor)]
    shapes = [list(tensor.shape) for tensor in ours], [list(tensor.shape) for tensor in truth]
    if shapes[0] != shapes[1]:
        raise ValueError(f"result of shapes {shapes[0]}, expected {shapes[1]}")
    pairs = [(one, right) for one, right in zip(ours, truth, strict=True) if right.numel()]
    errors = [float((one.double() - right).abs().max() / right.abs().max()) for one, right in pairs]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def measure(case: Case, benchmark: Benchmark, effort: Effort = Effort()) -> list[Row]:  # noqa: B008
    """Measure one case and keep its rows in the `extra_info` of the fixture too.

    Returns:
        A row a provider; one that raised or is wrong has an `error` and no times.

    Raises:
        BrokenDeviceError: the device is out of order after a provider; `args[1]` are the rows so far.
    """
    rows: dict[str, Row] = {}
    timed: dict[str, _Timed] = {}
    for provider in (*case.providers, *_copies(case)):
        rows[provider.name] = row = _described(case, provider)
        try:
            row |= _checked(case, provider, provider.call())
            call, is_graph = clock().prepare(provider.call, provider.graph)
            if is_graph:
                row |= _checked(case, provider, call()) | {"graph": True}
            row["peak_mib"] = clock().peak_mib(provider.call, provider.uses_numpy)
            timed[provider.name] = _Timed(provider, call, row.get("samples", 1), effort.turn_ms)
            clock().synchronize()
        except Exception as error:  # whatever one provider does, the others are measured
            row["error"] = first_line(error)
            timed.pop(provider.name, None)
            try:
                clock().synchronize()
            except Exception as broken:
                raise BrokenDeviceError(first_line(error), list(rows.values())) from broken
    for name, reason in case.missing.items():
        rows[name] = _described(case, Provider(name, lambda: None, steps=())) | {"missing": reason}
    if timed:
        _take_turns(list(timed.values()), benchmark, effort)
        for name, one in timed.items():
            rows[name] |= one.fields(timed.get(case.reference))
        _annotate(case, rows)
    benchmark.extra_info["rows"] = list(rows.values())
    return list(rows.values())


class _Timed:
    """A provider that gave the right result, and its times."""

    def __init__(self, provider: Provider, call: Callable[[], Any], samples: int, turn_ms: float) -> None:
        self.provider, self._call, self._samples = provider, call, samples
        one_ms = clock().time_ms(call, 1, provider.flush)
        if one_ms < turn_ms:
            one_ms = clock().time_ms(call, 2, provider.flush)
        self.is_long = one_ms > _LONG_MS
        self.count = max(1, math.ceil(turn_ms / max(one_ms, 1e-4)))
        self.turn_seconds = (self.count + (not self.is_long)) * one_ms / 1000
        self.times_ms: list[float] = []

    def turn(self) -> None:
        if not self.is_long:
            self._call()
        self.times_ms.append(clock().time_ms(self._call, self.count, self.provider.flush))

    def fields(self, reference: _Timed | None) -> Row:
        """Median, minimum and interquartile range in milliseconds, and the same of the ratio to the reference, sample by sample."""
        times = self.times_ms
        found = {"median_ms": statistics.median(times), "min_ms": min(times), "spread_ms": spread(times)}
        found |= {"rounds": len(times), "calls": self.count}
        if reference is not None:
            share = reference._samples / self._samples
            ratios = [share * own / other for own, other in zip(times, reference.times_ms, strict=True)]
            found |= {"ratio": statistics.median(ratios), "ratio_spread": spread(ratios)}
        return found


def spread(values: Sequence[float]) -> float:
    """The interquartile range; 0 of a single value."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def _take_turns(timed: Sequence[_Timed], benchmark: Benchmark, effort: Effort) -> None:
    first, *rivals = timed
    wanted = effort.seconds * len(timed) / sum(one.turn_seconds for one in timed)
    rounds = max(effort.least_rounds, min(effort.rounds, int(wanted)))
    turns = 0

    def take_rivals() -> None:
        nonlocal turns
        start = turns % max(1, len(rivals))
        for one in rivals[start:] + rivals[:start]:
            one.turn()
        turns += 1

    def take_first() -> None:
        first.turn()
        Timer.seconds += first.times_ms[-1] / 1000

    benchmark.pedantic(take_first, setup=take_rivals, rounds=rounds)


def _copies(case: Case) -> Iterator[Provider]:
    """A copy that reads half of the least bytes of the case and writes the other half."""
    if not case.steps:
        return
    least = sum(step.bytes for step in case.steps)
    size = min(max(least, _LEAST_COPY_BYTES), _MOST_COPY_BYTES) // 2
    source = torch.ones(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    yield Provider(COPY, lambda: target.copy_(source), tolerance=None, steps=[Cost(0, 2 * size)])


def _described(case: Case, provider: Provider) -> Row:
    samples = provider.samples or case.sizes.get("N")
    steps = case.steps if provider.steps is None and provider.samples is None else provider.steps or ()
    row = {
        "subject": case.subject,
        "workload": case.workload,
        "shape": " ".join(f"{name}={size}" for name, size in case.sizes.items()),
        "dtype": str(case.dtype).removeprefix("torch."),
        "layout": case.layout or None,
        "provider": provider.name,
        "samples": samples,
        "bytes": sum(step.bytes for step in steps) or None,
        "flops": sum(step.flops for step in steps) or None,
        "note": provider.note,
    }
    return {name: value for name, value in row.items() if value is not None}


def _checked(case: Case, provider: Provider, result: Any) -> Row:
    """Compare a result with the truth.

    Raises:
        ValueError: it is wrong.
    """
    if provider.tolerance is None or not case.truth:
        return {}
    truth = case.truth if provider.samples is None else [part[: provider.samples] for part in case.truth]
    error = error_of(result if provider.check is None else provider.check(result), truth)
    if not error <= provider.tolerance:
        raise ValueError(f"wrong: largest error {error:.2e}, allowed {provider.tolerance:.0e}")
    return {"max_error": error}


def _annotate(case: Case, rows: Mapping[str, Row]) -> None:
    """Shares of what the machine can do at all: the rate of the copy and of a large product, both of this run."""
    copied = rows.get(COPY, {})
    if "median_ms" not in copied:
        return
    copy_rate = copied["bytes"] / (copied["median_ms"] / 1000)
    for provider in case.providers:
        row = rows[provider.name]
        if "median_ms" not in row or "bytes" not in row:
            continue
        seconds, rate = row["median_ms"] / 1000, matmul_flops(case.dtype)
        row["share_of_copy"] = row["bytes"] / seconds / copy_rate
        row["share_of_matmul"] = row.get("flops", 0) / seconds / rate
        steps = provider.steps or case.steps
        row["limit_ms"] = 1000 * sum(step.seconds(rate, copy_rate) for step in steps)
