"""pytest-benchmark suite: projections onto explicit, dual and factored bases; see `ood_engine.bench.subjects.projection`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ood_engine.bench.subjects.projection import plans

__all__ = ["plans", "test_projection"]


def test_projection(measured: Callable[[Any], None], benchmark: Any) -> None:
    measured(benchmark)
