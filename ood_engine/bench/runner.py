"""Runs plans: every provider is held to the truth, then all are timed in turns; rows are handed on after every case."""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from .cases import Case, Effort, Plan, Provider
from .clock import Clock, Sample, clock_for
from .limits import Limits
from .rows import SIZES, make_row

__all__ = ["SLOW", "errors", "held_to_truth", "run"]

SLOW = "OOD_ENGINE_BENCH_SLOW"
"""Environment variable "PROVIDER:FACTOR": makes that provider so many times as slow, to see that a comparison tells."""

_MOST_CALLS_A_TURN = 200
_FRACTIONS = torch.tensor([0.05, 0.5, 0.95, 0.99], dtype=torch.float64)
_NAMES = ("p5_ms", "p50_ms", "p95_ms", "p99_ms")


class _Ready(NamedTuple):
    """A provider that gave the right result."""

    provider: Provider
    fields: dict[str, Any]


def run(
    plans: Iterable[Plan],
    effort: Effort,
    machine: Mapping[str, Any],
    keep: Callable[[Plan, list[dict[str, Any]], Mapping[str, str]], None],
) -> None:
    """Measure every plan.

    Args:
        plans: cases, most important first.
        effort: how much is measured.
        machine: fields of every row that say where and with what.
        keep: is given a plan, its finished rows, and the providers that are missing with the reasons, after every case.

    Raises:
        InputError: the environment variable `SLOW` is not PROVIDER:FACTOR.
    """
    slow = _slow()
    clock = clock_for(effort.device)
    limits = Limits(clock, effort)
    # What was imported is no garbage: set aside, collecting takes no time.
    gc.freeze()
    try:
        for plan in plans:
            rows, missing = _measure(plan, effort, clock, limits, slow)
            keep(plan, [{**row, **machine} for row in rows], missing)
            gc.collect()
    finally:
        gc.unfreeze()


def _measure(
    plan: Plan, effort: Effort, clock: Clock, limits: Limits, slow: tuple[str, float]
) -> tuple[list[dict[str, Any]], Mapping[str, str]]:
    threads = torch.get_num_threads()
    try:
        case = plan.build()
        providers = [*case.providers, *([] if case.cost is None else [limits.copy(case.cost.bytes)])]
    except Exception as error:
        return [], {"all": f"{plan}: {_reason(error)}"}
    finally:
        # Fitting takes one thread for its eigenvalues; what follows is not to be timed so.
        torch.set_num_threads(threads)
    ready: list[_Ready] = []
    rows = []
    for provider in (_slowed(provider, slow) for provider in _with_graphs(providers, clock, effort)):
        try:
            ready.append(_Ready(provider, _prepare(provider, case, clock)))
        except Exception as error:
            rows.append(_row(plan, case, provider) | {"refused": _reason(error)})
    # Memory is looked at first, for all: the profiler must not run between calls that are timed.
    samples, failures = _interleave(ready, plan, effort, clock)
    measured = []
    for index, (one, rounds) in enumerate(zip(ready, samples, strict=True)):
        row = _row(plan, case, one.provider) | one.fields
        if index in failures:
            rows.append(row | {"refused": failures[index]})
        else:
            measured.append(row | _times(rounds))
    limits.annotate(measured, plan.dtype)
    return [*measured, *rows], case.missing


def _with_graphs(providers: Iterable[Provider], clock: Clock, effort: Effort) -> Iterable[Provider]:
    for provider in providers:
        yield provider
        if provider.captures and effort.device.type == "cuda":
            yield provider._replace(name=f"{provider.name}, CUDA graph", call=_Captured(provider.call, clock))


class _Captured:
    """Captures at the first call, so that a failure is the failure of this provider alone."""

    def __init__(self, call: Callable[[], Any], clock: Clock) -> None:
        self._call, self._clock = call, clock
        self._replay: Callable[[], Any] | None = None

    def __call__(self) -> Any:
        if self._replay is None:
            self._replay = self._clock.capture(self._call)
        return self._replay()


def held_to_truth(provider: Provider, case: Case) -> dict[str, float | None]:
    """Call a provider once; the largest error of its result and what it may be, None both where there is no truth.

    Raises:
        WrongResultError: it is larger.
    """
    result = provider.call()
    if not case.truth or provider.tolerance is None:
        return {"max_error": None, "tolerance": None}
    truth = [part if provider.samples is None else part[: provider.samples] for part in case.truth]
    error = errors(result if provider.check is None else provider.check(result), truth)
    if not error <= provider.tolerance:
        raise WrongResultError(f"largest error {error:.2e}, expected at most {provider.tolerance:.0e}")
    return {"max_error": error, "tolerance": provider.tolerance}


def _prepare(provider: Provider, case: Case, clock: Clock) -> dict[str, Any]:
    """Fields of the row that are known before it is timed; raises where the result is wrong."""
    fields = held_to_truth(provider, case)
    # Garbage that went during the call would count as memory that the call gave back, or be warned about by the profiler.
    gc.collect()
    return {**fields, "peak_extra_mib": clock.peak_extra_mib(provider.call, provider.uses_numpy)}


class WrongResultError(ValueError):
    """A provider whose result is further from the truth than it may be; it is not timed."""


def errors(result: Any, truth: Sequence[Tensor]) -> float:
    """Largest difference, relative to the largest magnitude of each tensor of the truth; the worst tensor counts.

    Raises:
        WrongResultError: other tensors than the truth has, by number or shape, or values that are not finite.
    """
    given = [result] if isinstance(result, Tensor) else [part for part in result if isinstance(part, Tensor)]
    shapes = [list(part.shape) for part in given], [list(part.shape) for part in truth]
    if shapes[0] != shapes[1]:
        raise WrongResultError(f"result of shapes {shapes[0]}, expected {shapes[1]}")
    worst = 0.0
    for one, right in zip(given, truth, strict=True):
        difference = float((one.detach().double() - right).abs().max() / right.abs().max().clamp_min(1e-300))
        if difference != difference or difference == float("inf"):
            raise WrongResultError("result with NaN or infinite values")
        worst = max(worst, difference)
    return worst


def _interleave(
    ready: Sequence[_Ready], plan: Plan, effort: Effort, clock: Clock
) -> tuple[list[list[list[Sample]]], dict[int, str]]:
    """The samples of every provider, round by round; and, by their index, why some broke off."""
    rounds: list[list[list[Sample]]] = [[] for _ in ready]
    failures: dict[int, str] = {}
    spent, most = [0.0] * len(ready), plan.seconds * effort.most_seconds
    for turn in range(effort.rounds):
        first = turn % max(1, len(ready))
        for index in [*range(first, len(ready)), *range(first)]:
            calls = sum(map(len, rounds[index]))
            if index in failures or (spent[index] > most and (calls >= 3 or spent[index] > calls * most)):
                continue
            start = time.perf_counter()
            try:
                rounds[index].append(_turn(ready[index].provider, plan, effort, clock))
            except Exception as error:
                failures[index] = _reason(error)
            spent[index] += time.perf_counter() - start
    return rounds, failures


def _turn(provider: Provider, plan: Plan, effort: Effort, clock: Clock) -> list[Sample]:
    """Calls of one provider, at least one, until the seconds of a turn have passed."""
    start = time.perf_counter()
    samples = [clock.time(provider.call, plan.cold)]
    while time.perf_counter() - start < effort.least_seconds and len(samples) < _MOST_CALLS_A_TURN:
        samples.append(clock.time(provider.call, plan.cold))
    return samples


def _times(rounds: Sequence[Sequence[Sample]]) -> dict[str, Any]:
    samples = [sample for one in rounds for sample in one]
    host = torch.tensor([sample.host_ms for sample in samples], dtype=torch.float64)
    fields: dict[str, Any] = dict(zip(_NAMES, host.quantile(_FRACTIONS).tolist(), strict=True))
    device = [sample.device_ms for sample in samples if sample.device_ms is not None]
    if device:
        found = torch.tensor(device, dtype=torch.float64).quantile(_FRACTIONS).tolist()
        fields |= dict(zip((f"device_{name}" for name in _NAMES), found, strict=True))
    medians = [statistics.median(sample.host_ms for sample in one) for one in rounds]
    return fields | {"runs": len(samples), "rounds_ms": medians}


def _row(plan: Plan, case: Case, provider: Provider) -> dict[str, Any]:
    cost = Limits.cost_of(provider, case)
    return make_row(
        subject=plan.subject,
        provider=provider.name,
        workload=plan.workload,
        shape=plan.shape,
        **{name: plan.sizes.get(name) for name in SIZES},
        dtype=str(plan.dtype).removeprefix("torch."),
        memory_format=plan.memory_format,
        cache="cold" if plan.cold else "warm",
        sweeps=list(plan.sweeps),
        samples_run=provider.samples or plan.sizes.get("N"),
        bytes=None if cost is None else cost.bytes,
        flops=None if cost is None else cost.flops,
        note=provider.note,
    )


def _slow() -> tuple[str, float]:
    text = os.environ.get(SLOW, "")
    if not text:
        return "", 1.0
    name, _, number = text.rpartition(":")
    try:
        factor = float(number)
    except ValueError:
        factor = math.nan
    if not name or not 1 <= factor < math.inf:
        raise InputError(f"{SLOW}={text!r}: expected PROVIDER:FACTOR with a factor of at least 1, such as reference:2")
    return name, factor


def _slowed(provider: Provider, slow: tuple[str, float]) -> Provider:
    name, factor = slow
    if provider.name != name:
        return provider

    def call() -> Any:
        start = time.perf_counter()
        result = provider.call()
        time.sleep((factor - 1) * (time.perf_counter() - start))
        return result

    return provider._replace(call=call)


def _reason(error: Exception) -> str:
    message = str(error).strip().splitlines()
    return f"{type(error).__name__}: {message[0] if message else 'without a message'}"
