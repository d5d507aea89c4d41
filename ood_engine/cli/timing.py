"""Interleaved timing and peak memory of calls to be compared."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["interleave", "peak_mib", "summary_ms"]

MIB = 2**20
WARM_UP = 3


def interleave(
    calls: Mapping[str, Callable[[], object]], device: torch.device, *, seconds: float, least_rounds: int
) -> dict[str, list[float]]:
    """Time calls in turns, so that disturbances of the machine affect all of them alike.

    In each round every call runs once, up to device synchronisation; the order alternates between rounds. The first `WARM_UP`
    rounds are discarded.

    Args:
        calls: name → call.
        device: device of the calls.
        seconds: time after which no further round starts.
        least_rounds: minimum number of rounds, even if they take longer.

    Returns:
        Name → milliseconds per round.
    """
    order = list(calls)
    rounds_ms: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(WARM_UP):
        for name in order:
            calls[name]()
    _synchronize(device)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rounds_ms[order[0]]) < least_rounds:
        for name in order:
            start = time.perf_counter()
            calls[name]()
            _synchronize(device)
            rounds_ms[name].append(1000 * (time.perf_counter() - start))
        order.reverse()
    return rounds_ms


def summary_ms(rounds_ms: Sequence[float]) -> dict[str, float]:
    """Median, minimum, and 5th and 95th percentiles."""
    times = torch.tensor(rounds_ms, dtype=torch.float64, device="cpu")
    quantiles = times.quantile(torch.tensor([0.5, 0.0, 0.05, 0.95], dtype=torch.float64, device="cpu"))
    return dict(zip(("median_ms", "min_ms", "p5_ms", "p95_ms"), quantiles.tolist(), strict=True))


def peak_mib(call: Callable[[], object], device: torch.device) -> float | None:
    """Peak memory allocated by torch during the call, results included; None on devices without accounting."""
    if device.type == "cuda":
        _synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        _synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    if device.type != "cpu":
        return None
    # Kineto would otherwise log to standard error at every start and stop.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recording:
        call()
    assert recording.profiler is not None
    assert recording.profiler.kineto_results is not None
    events = [event for event in recording.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / MIB


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
