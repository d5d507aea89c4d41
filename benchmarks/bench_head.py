"""pytest-benchmark suite: the head pass; see `ood_engine.bench.subjects.head`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ood_engine.bench.subjects.head import plans

__all__ = ["plans", "test_head"]


def test_head(measured: Callable[[Any], None], benchmark: Any) -> None:
    measured(benchmark)
