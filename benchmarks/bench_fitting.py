"""pytest-benchmark suite: fitting; see `ood_engine.bench.subjects.fitting`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ood_engine.bench.subjects.fitting import plans

__all__ = ["plans", "test_fitting"]


def test_fitting(measured: Callable[[Any], None], benchmark: Any) -> None:
    measured(benchmark)
