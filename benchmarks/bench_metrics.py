"""pytest-benchmark suite: metrics; see `ood_engine.bench.subjects.metrics`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ood_engine.bench.subjects.metrics import plans

__all__ = ["plans", "test_metrics"]


def test_metrics(measured: Callable[[Any], None], benchmark: Any) -> None:
    measured(benchmark)
