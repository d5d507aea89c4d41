"""pytest-benchmark suite: the whole engine around a model's forward; see `ood_engine.bench.subjects.engine`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ood_engine.bench.subjects.engine import plans

__all__ = ["plans", "test_engine"]


def test_engine(measured: Callable[[Any], None], benchmark: Any) -> None:
    measured(benchmark)
