"""pytest-benchmark suite: latency at batch 1; see `ood_engine.bench.subjects.latency`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ood_engine.bench.subjects.latency import plans

__all__ = ["plans", "test_latency"]


def test_latency(measured: Callable[[Any], None], benchmark: Any) -> None:
    measured(benchmark)
