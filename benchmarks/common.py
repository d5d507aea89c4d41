"""One test measures one case: every provider is compared with fp64 first, then all are timed in turns, round by round.

On a CPU the clock is `time.perf_counter`. On CUDA a call becomes a graph where it can be captured, and events around its replay
tell the time; the second-level cache is flushed before each, outside the events. A round is one turn of every provider, so that a
slow spell of the machine meets all alike. Two runs are compared by the ratio to the reference row of the same rounds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ood_kernels.workloads import Cost

from .clocks import DEVICE, MIB, Call, captured, matmul_flops, peak_mib, synchronize, time_ms

OURS, REFERENCE, COMPILED, COPY = "ood-engine", "reference", "torch.compile", "copy of the same bytes"
PLAIN, AUTOGRAD = "plain products", "autograd, a sample at a time"

Row = dict[str, Any]

_MOST_COPY_BYTES, _LEAST_COPY_BYTES = 512 * MIB, 2**12
_LONG_MS = 20.0
"""A call that takes longer pushes its own operands out of the caches: it needs no call before it that warms them."""


class BrokenDeviceError(RuntimeError):
    """The device no longer answers, and everything after it in this process would fail as well; `args[1]` are the rows so far."""


class Effort(NamedTuple):
    """Rounds for `seconds` a provider, but `least_rounds` at least; in a turn, calls for `turn_ms`."""

    rounds: int = 11
    seconds: float = 0.4
    least_rounds: int = 3
    turn_ms: float = 5.0


QUICK = Effort(rounds=7, seconds=0.15)


class Provider(NamedTuple):
    """One way to compute what a case asks for, or why it is missing here.

    Attributes:
        check: from the result to the tensors that are compared with the truth; None takes the result itself.
        tolerance: largest error, relative to the largest magnitude of each tensor; None where there is nothing to compare.
        samples: of one call, where it takes only the first ones of the case; its work is then not known.
        steps: minimal work of one call, where it is not that of the case.
        peak: measures its memory in MiB, where torch's allocator does not show what counts.
    """

    name: str
    call: Call = lambda: None
    check: Callable[[Any], Any] | None = None
    tolerance: float | None = 1e-4
    samples: int | None = None
    steps: Sequence[Cost] | None = None
    graph: bool = True
    note: str | None = None
    missing: str | None = None
    peak: Callable[[], float] | None = None


class Case(NamedTuple):
    """One computation at one size, and everyone who can do it; pytest-benchmark's own table shows the first.

    The reference is the provider whose time is the unit of the ratios, the truth the result in fp64, and each step has its minimal
    arithmetic and traffic.
    """

    subject: str
    workload: str
    sizes: Mapping[str, int]
    providers: Sequence[Provider]
    reference: str
    truth: Sequence[Tensor] = ()
    steps: Sequence[Cost] = ()
    dtype: torch.dtype = torch.float32
    layout: str | None = None


def planned(make: Callable[..., Case], *arguments: Any, name: str, quick: bool = False) -> Any:
    """Parameter of a test: a case whose operands are made when it runs; without `quick` it is left out of a quick run."""
    return pytest.param(partial(make, *arguments), id=name, marks=() if quick else pytest.mark.slow)


def first_line(error: BaseException) -> str:
    """Type and first line of a message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]


def error_of(result: Any, truth: Sequence[Tensor]) -> float:
    """Largest difference, relative to the largest magnitude of each tensor; NaN where one is."""
    found = [result] if isinstance(result, Tensor) else [part for part in result if isinstance(part, Tensor)]
    shapes = [list(tensor.shape) for tensor in found], [list(tensor.shape) for tensor in truth]
    if shapes[0] != shapes[1]:
        raise ValueError(f"result of shapes {shapes[0]}, expected {shapes[1]}")
    pairs = zip(found, truth, strict=True)
    return float(torch.stack([(one.double() - right).abs().max() / right.abs().max() for one, right in pairs]).max())


class Timer:
    """Hands the time that was measured to pytest-benchmark, whose own clock would count the calls around it."""

    seconds = 0.0

    @classmethod
    def now(cls) -> float:
        return cls.seconds


def in_rounds(target: Call, *, setup: Call, rounds: int) -> None:
    """What pytest-benchmark's `pedantic` does, where it is not installed."""
    for _ in range(rounds):
        setup()
        target()


def measure(case: Case, effort: Effort = Effort(), pedantic: Callable[..., Any] = in_rounds) -> list[Row]:  # noqa: B008
    """Measure one case.

    Returns:
        A row a provider; one that raised or is wrong has an `error` and no times.
    """
    rows: dict[str, Row] = {}
    timed: dict[str, _Timed] = {}
    for provider in (*case.providers, *_copies(case)):
        rows[provider.name] = row = _described(case, provider)
        if provider.missing:
            continue
        try:
            row |= _checked(case, provider, provider.call())
            replay = captured(provider.call) if provider.graph and DEVICE.type == "cuda" else None
            if replay is not None:
                row |= _checked(case, provider, replay()) | {"graph": True}
            row["peak_mib"] = peak_mib(provider.call) if provider.peak is None else provider.peak()
            timed[provider.name] = _Timed(replay or provider.call, row.get("samples", 1), effort.turn_ms)
            synchronize()
        except Exception as error:  # whatever one provider does, the others are measured
            row["error"] = first_line(error)
            timed.pop(provider.name, None)
            try:
                synchronize()
            except Exception as broken:
                raise BrokenDeviceError(first_line(error), list(rows.values())) from broken
    if timed:
        _take_turns(list(timed.values()), effort, pedantic)
        for name, one in timed.items():
            rows[name] |= one.fields(timed.get(case.reference))
        _annotate(case, rows)
    return list(rows.values())


class _Timed:
    """A provider whose result is right, and its times."""

    def __init__(self, call: Call, samples: int, turn_ms: float) -> None:
        self._call, self._samples = call, samples
        one_ms = time_ms(call, 1)
        if one_ms < turn_ms:
            one_ms = time_ms(call, 2)
        self._is_long = one_ms > _LONG_MS
        self._count = max(1, math.ceil(turn_ms / max(one_ms, 1e-4)))
        self.turn_seconds = (self._count + (not self._is_long)) * one_ms / 1000
        self.times_ms: list[float] = []

    def turn(self) -> None:
        if not self._is_long:
            self._call()
        self.times_ms.append(time_ms(self._call, self._count))

    def fields(self, reference: _Timed | None) -> Row:
        """Median, minimum and interquartile range in milliseconds, and the ratio to the reference, sample by sample."""
        times = self.times_ms
        found = {"median_ms": statistics.median(times), "min_ms": min(times), "spread_ms": _spread(times)}
        found |= {"rounds": len(times), "calls": self._count}
        if reference is not None:
            share = reference._samples / self._samples
            ratios = [share * own / other for own, other in zip(times, reference.times_ms, strict=True)]
            found |= {"ratio": statistics.median(ratios), "ratio_spread": _spread(ratios)}
        return found


def _spread(values: Sequence[float]) -> float:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def _take_turns(timed: Sequence[_Timed], effort: Effort, pedantic: Callable[..., Any]) -> None:
    first, *rivals = timed
    wanted = effort.seconds * len(timed) / sum(one.turn_seconds for one in timed)

    def take_rivals() -> None:
        for one in rivals:
            one.turn()
        rivals.append(rivals.pop(0)) if rivals else None

    def take_first() -> None:
        first.turn()
        Timer.seconds += first.times_ms[-1] / 1000

    pedantic(take_first, setup=take_rivals, rounds=max(effort.least_rounds, min(effort.rounds, int(wanted))))


def _copies(case: Case) -> Iterator[Provider]:
    """A copy that reads half of the minimal bytes of the case and writes the other half."""
    if case.steps:
        size = min(max(sum(step.bytes for step in case.steps), _LEAST_COPY_BYTES), _MOST_COPY_BYTES) // 2
        source = torch.ones(size, dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        yield Provider(COPY, lambda: target.copy_(source), tolerance=None, steps=[Cost(0, 2 * size)])


def _described(case: Case, provider: Provider) -> Row:
    steps = case.steps if provider.steps is None and provider.samples is None else provider.steps or ()
    row = {
        "subject": case.subject,
        "workload": case.workload,
        "shape": " ".join(f"{name}={size}" for name, size in case.sizes.items()),
        "dtype": str(case.dtype).removeprefix("torch."),
        "layout": case.layout,
        "provider": provider.name,
        "samples": provider.samples or case.sizes.get("N"),
        "bytes": sum(step.bytes for step in steps) or None,
        "flops": sum(step.flops for step in steps) or None,
        "note": provider.note,
        "missing": provider.missing,
    }
    return {name: value for name, value in row.items() if value is not None}


def _checked(case: Case, provider: Provider, result: Any) -> Row:
    """Compare a result with the truth; ValueError where it is wrong."""
    if provider.tolerance is None or not case.truth:
        return {}
    truth = [part[: provider.samples] for part in case.truth]
    error = error_of(result if provider.check is None else provider.check(result), truth)
    if not error <= provider.tolerance:
        raise ValueError(f"wrong: largest error {error:.2e}, allowed {provider.tolerance:.0e}")
    return {"max_error": error}


def _annotate(case: Case, rows: Mapping[str, Row]) -> None:
    """Shares of what the machine can do at all: the rate of the copy and of a large product, both of this run."""
    copied = rows.get(COPY, {})
    if "median_ms" not in copied:
        return
    copy_rate, rate = copied["bytes"] / (copied["median_ms"] / 1000), matmul_flops(case.dtype)
    for provider in case.providers:
        row = rows[provider.name]
        if "median_ms" in row and "bytes" in row:
            seconds = row["median_ms"] / 1000
            row["share_of_copy"] = row["bytes"] / seconds / copy_rate
            row["share_of_matmul"] = row.get("flops", 0) / seconds / rate
            row["limit_ms"] = 1000 * sum(step.seconds(rate, copy_rate) for step in provider.steps or case.steps)
