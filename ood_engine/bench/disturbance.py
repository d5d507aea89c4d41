"""Whether other programs wanted the same cores while something was measured."""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["MOST_INTERRUPTIONS", "MOST_MISSING_CORES", "Disturbance", "Usage"]

MOST_INTERRUPTIONS = 100.0
"""A second: how often the system takes a core from a process of two busy threads on an idle machine is about 30, beside
another busy program several hundred."""

MOST_MISSING_CORES = 0.25
"""By how many the cores that torch's threads and other programs want may exceed those there are."""

_BUSY = (0, 1, 2, 5, 6, 7)
"""Columns of a CPU in /proc/stat that are not idle: user, nice, system, interrupts, and stolen by other virtual machines."""


class Usage(NamedTuple):
    """Counters since some time in the past.

    Attributes:
        at: seconds.
        interruptions: how often a core was taken from this process against its will.
        own_seconds: of this process and of its children that have ended, on all cores together.
        all_seconds: of everything, on the cores that this process may use; None where the system does not say.
    """

    at: float
    interruptions: int
    own_seconds: float
    all_seconds: float | None

    @classmethod
    def now(cls) -> Usage | None:
        """The counters; None where the system has none."""
        try:
            resource = importlib.import_module("resource")
        except ImportError:
            return None
        own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        own_seconds = sum(part.ru_utime + part.ru_stime for part in (own, children))
        return cls(time.monotonic(), own.ru_nivcsw, own_seconds, _busy_seconds())


class Disturbance:
    """Says of the time since it was asked before whether it was disturbed: often interrupted, and with too few cores for all.

    A program whose own threads are many is interrupted often as well, one that starts compilers has others beside it.
    """

    def __init__(self) -> None:
        self._before = Usage.now()

    def __call__(self) -> bool | None:
        """None where the system does not say."""
        before, after = self._before, Usage.now()
        self._before = after
        if before is None or after is None or after.at <= before.at:
            return None
        seconds = after.at - before.at
        if (after.interruptions - before.interruptions) / seconds <= MOST_INTERRUPTIONS:
            return False
        if before.all_seconds is None or after.all_seconds is None:
            return True
        others = (after.all_seconds - before.all_seconds - after.own_seconds + before.own_seconds) / seconds
        return torch.get_num_threads() + others > len(os.sched_getaffinity(0)) + MOST_MISSING_CORES


def _busy_seconds() -> float | None:
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        ticks = sum(int(line[1 + column]) for line in lines if line and line[0] in cores for column in _BUSY)
        return ticks / os.sysconf("SC_CLK_TCK")
    return None
